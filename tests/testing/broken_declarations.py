"""Methods whose parameters, counters and tags promise what they do not keep, with the check that must catch them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from mitigate.core import Access, Fidelity, Method, Point, Subscription, Tags
from mitigate.methods.control_random import ControlRandom
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from tests.testing.broken_results import Adding
from tests.testing.catching import caught_by

# ---------------------------------------------------------------------------------------------------------- parameters


@caught_by("check_parameters_matter", r"changing window in any set of test_params\(\) changes nothing: not the results")
class IgnoresItsWindow(LocoRE):
    def _window(self, event: Any, matrix: Any) -> Any:
        return LocoRE._window(LocoRE(include_self=self.include_self, history_start=self.history_start), event, matrix)


@caught_by("check_parameters_matter", r"adding: tiles is not seen on tiny models, but nothing even reads it")
@dataclass(frozen=True, kw_only=True)
class NeverReads(Adding):
    tiles: Annotated[str, "not seen on tiny models"] = "pooled"

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [{"gain": 0.25}, {"tiles": "stitched"}]


# ------------------------------------------------------------------------------------------------------ costs, counters


@caught_by("check_cost_is_paid", r"declare 2 extra forwards for 6 tokens, but the dearest .* makes 1: lower tags\.forw")
class Exaggerates(SCR):
    tags: ClassVar[Tags] = dataclasses.replace(SCR.tags, forwards_per_sample=2.0)


@caught_by("check_batch", r"counts rows=16 for prompt 0 \('describe .*'\) in a batch, \d alone: count per sample")
class CountsTheBatch(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        state.count("rows", float(len(event.hidden)))
        return super().on_hidden_states(event, state)


@caught_by("check_no_state_leak", r"counts brightness otherwise after the sample .* than alone: .* request\.image_key")
class CountsAnotherPicture(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        state.count("brightness", event.request.shared("first image", lambda: float(event.hidden.mean())))
        return super().on_hidden_states(event, state)


@caught_by("check_draws", r"no parameter set .* gives another result with another seed", beta=0.5)
class SeedsItself(ControlRandom):
    """Asks for the request's generators and draws from its own."""

    def on_sample_begin(self, event: Any, state: Any) -> None:
        super().on_sample_begin(event, state)
        state.seed = torch.full_like(state.seed, 7)


# -------------------------------------------------------------------------------------------------------- no way to act


@caught_by("check_without_grid", r"scr cannot work where image tokens form no grid .*Set tags\.spatial_grid", lam=1.5)
class NeedsAGrid(SCR):
    tags: ClassVar[Tags] = dataclasses.replace(SCR.tags, spatial_grid=False)


@dataclass(frozen=True, kw_only=True)
class Excluding(Method):
    """Excludes the least probable tokens."""

    name: ClassVar[str] = "excluding"
    summary: ClassVar[str] = "excludes tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.NEXT_TOKEN_LOGITS}))

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]

    def on_next_token_logits(self, event: Any, state: Any) -> Any:
        return event.logits.masked_fill(event.logits < event.logits.amax(-1, keepdim=True) - 1.0, -math.inf)


@caught_by("check_composes", r"the logits are not finite")
@caught_by("check_dtypes", r"logits of a torch\.bfloat16 model are not finite")
class ExcludesAll(Excluding):
    def on_next_token_logits(self, event: Any, state: Any) -> Any:
        return torch.full_like(event.logits, -math.inf)


@caught_by("check_dtypes", r"logits of a torch\.bfloat16 model are not finite")
class OneIsNoNumber(Excluding):
    def on_next_token_logits(self, event: Any, state: Any) -> Any:
        return event.logits.index_fill(1, torch.tensor([7], device=event.logits.device), math.nan)


@caught_by("check_dtypes", r"logits of a torch\.bfloat16 model are not finite")
class OneIsCertain(Excluding):
    def on_next_token_logits(self, event: Any, state: Any) -> Any:
        return event.logits.index_fill(1, torch.tensor([7], device=event.logits.device), math.inf)
