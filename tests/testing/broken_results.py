"""Methods whose results or declarations are wrong, with the check and the words that must catch them.

Most are built-in methods with one thing broken.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from mitigate.core import Access, Fidelity, Method, Phase, Point, Rows, Subscription, Tags
from mitigate.errors import UnsupportedModel
from mitigate.methods.clva import CLVA
from mitigate.methods.dleaf import DLEAF
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from tests.testing.catching import caught_by

_HIDDEN, _PROBS = Point.HIDDEN_STATES, Point.ATTENTION_PROBS


@dataclass(frozen=True, kw_only=True)
class Adding(Method):
    """Adds something to the output of block 1."""

    name: ClassVar[str] = "adding"
    summary: ClassVar[str] = "adds something to hidden states"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({_HIDDEN}))
    gain: float = 0.5

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=_HIDDEN, access=Access.WRITE, layers=(1,))]

    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return event.hidden + self.gain * self._what(event)

    def _what(self, event: Any) -> Any:
        return event.hidden.roll(1, -1)

    @classmethod
    def identity(cls) -> Self:
        return cls(gain=0.0)


# -------------------------------------------------------------------------------------------------------------- effect


@caught_by("check_identity", r"with identity\(\) the model differs from the model alone: sample 0, token 0")
class StrongIdentity(LocoRE):
    @classmethod
    def identity(cls) -> Self:
        return cls(beta=0.01)


@caught_by("check_identity", r"has no identity\(\)")
class NoIdentity(Adding):
    @classmethod
    def identity(cls) -> Self:
        raise NotImplementedError


@caught_by("check_has_effect", r"on_hidden_states was called \d+ times and changed nothing: a silent no-op", lam=1.5)
class SilentCopy(SCR):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return None if event.phase is Phase.DIAGNOSTIC else event.hidden.clone()


@caught_by("check_has_effect", r"on_attention_scores was called \d+ times and changed nothing", alpha=2.0)
class ForgetsToReturn(CLVA):
    def on_attention_scores(self, event: Any, state: Any) -> None:
        super().on_attention_scores(event, state)


@caught_by("check_has_effect", r"on_select_token was called \d+ times and changed nothing", proposal="greedy_order")
class AcceptsEverything(SGRS):
    def _threshold(self, state: Any, event: Any) -> Any:
        return torch.zeros_like(event.logits[:, 0])


@caught_by("check_has_effect", r"the edit has no effect", beta=0.5, mode="logit_bias")
class ShiftsAllScores(LocoRE):
    def on_attention_scores(self, event: Any, state: Any) -> Any:
        return event.scores + 1.0


@caught_by("check_has_effect", r"subscribes to write attention_probs, but its handler was never called", beta=0.5)
class NeverCalled(LocoRE):
    def subscriptions(self, model: Any) -> list[Subscription]:
        (own,) = super().subscriptions(model)
        return [dataclasses.replace(own, phases=frozenset({Phase.LOOKAHEAD}))]


@caught_by("check_has_effect", r"writes nothing with these parameters")
class OnlyReads(LocoRE):
    tags: ClassVar[Tags] = Tags(reads=frozenset({_PROBS}), writes=frozenset({_PROBS, Point.ATTENTION_SCORES}))

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [dataclasses.replace(own, access=Access.READ) for own in super().subscriptions(model)]

    def on_attention_probs(self, event: Any, state: Any) -> None:
        return None


@caught_by("check_counts_what_it_did", r"changed sample 0 but counted nothing for it")
class Uncounted(Adding):
    """Edits behind the bus's back."""

    def on_hidden_states(self, event: Any, state: Any) -> None:
        event.hidden.add_(self.gain)


@caught_by("check_counts_what_it_did", r"counts \['share'\] as nan")
class CountsNonsense(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        state.count("share", float("nan"))
        return super().on_hidden_states(event, state)


@caught_by("check_generate", r"model\.generate gives other tokens than handle\.generate")
class OnlyThroughTheHandle(Adding):
    """Acts on named samples only."""

    def _what(self, event: Any) -> Any:
        gone = _CALLS.setdefault(id(event.request), len(_CALLS))
        return 10.0 * (gone + 1) * event.hidden.roll(gone, -1)


_CALLS: dict[int, int] = {}


# ------------------------------------------------------------------------------------------- batches, padding, caches


@caught_by("check_batch", r"gets another result in a left-padded batch than alone", beta=0.5)
class AveragesOverSamples(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs * (1.0 + event.probs.mean(0, keepdim=True) * (self._gain(event) - 1.0) * 5)


@caught_by("check_batch", r"gets another result in a left-padded batch than alone")
class FirstSampleOnly(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return torch.cat([super().on_hidden_states(event, state)[:1], event.hidden[1:]])


@caught_by("check_padding", r"1 columns of padding before 'describe .*' change its result at sample 0, token 0")
@caught_by("check_batch", r"take positions from event\.layout")
class FirstColumn(LocoRE):
    """Takes column 0 for the first token."""

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return torch.cat([event.probs[..., :1] * 3.0, event.probs[..., 1:]], -1)


@caught_by("check_padding", r"columns of padding before .* change its result")
class AveragesOverPadding(Adding):
    def _what(self, event: Any) -> Any:
        return event.hidden.mean(1, keepdim=True)


@caught_by("check_padding", r"columns of padding before .* change its result", lam=1.5)
@caught_by("check_positions", r"touches position \d+ of sample 0, role PROMPT, but its roles are IMAGE", lam=1.5)
class HardCodedPositions(SCR):
    """Takes columns 35 to 610 for the picture, as forks of one model do."""

    def on_hidden_states(self, event: Any, state: Any) -> Any:
        if event.phase is Phase.DIAGNOSTIC or event.start > 0:
            return None
        hidden = event.hidden.clone()
        hidden[:, 35:611] *= self.lam
        return hidden


@caught_by("check_cache", r"without a cache the result differs .* rows=Rows\.PREDICTORS", beta=0.5)
class LastRowOnly(LocoRE):
    def subscriptions(self, model: Any) -> list[Subscription]:
        return [dataclasses.replace(own, rows=Rows.LAST) for own in super().subscriptions(model)]


@caught_by("check_cache", r"without a cache the result differs")
class PrefillOnly(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return super().on_hidden_states(event, state) if event.step == 0 else None


@caught_by("check_dtypes", r"on_attention_probs \(layer 0.* returns torch\.float64 for torch\.float32", beta=0.5)
class DoublePrecision(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return super().on_attention_probs(event, state).double()


@caught_by("check_dtypes", r"returns torch\.float32 for torch\.bfloat16 in a torch\.bfloat16 model")
class FloatHidden(Adding):
    def _what(self, event: Any) -> Any:
        return event.hidden.float()


@caught_by("check_dtypes", r"logits of a torch\.float16 model are not finite")
class Overflows(Adding):
    def _what(self, event: Any) -> Any:
        return event.hidden * 60000.0 / event.hidden.abs().amax(-1, keepdim=True) * 2


@caught_by("check_device", r"on_attention_probs .* mixes tensors of two devices in \w+; give device", beta=0.5)
class ForgetsTheDevice(LocoRE):
    def _window(self, event: Any, matrix: Any) -> Any:
        keys = torch.arange(matrix.shape[-1])
        return (event.rows[:, None] - keys == 1).unsqueeze(0).unsqueeze(0)


@caught_by("check_device", r"on_attention_probs .* mixes tensors of two devices in", beta=0.5)
class NamesTheDevice(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs * torch.ones(event.probs.shape[-1], device="cpu") * 1.1


@caught_by("check_device", r"on_hidden_states .* returns a tensor that is not on the event's device")
class StaysOnTheCPU(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return event.hidden.cpu() * 2


@caught_by("check_device", r"on_hidden_states .* returns a tensor that is not on the event's device")
class OtherDevice(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return event.hidden.to("meta")


# ------------------------------------------------------------------------------------------------------ where it acts


@caught_by("check_probabilities", r"changes the sum of attention rows by .*normalised=False", beta=0.5)
class KeepsNoSum(LocoRE):
    def subscriptions(self, model: Any) -> list[Subscription]:
        return [dataclasses.replace(own, normalised=True) for own in super().subscriptions(model)]


@caught_by("check_probabilities", r"makes negative attention weights", beta=0.5)
class NegativeWeights(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs - 0.05 * (event.probs > 0)


@caught_by("check_probabilities", r"gives weight \(.*\) to keys that are padding or lie ahead", gate="always")
class UniformMix(DLEAF):
    """Mixes heads with a uniform row over all columns, padding included."""

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return 0.9 * event.probs + 0.1 / event.probs.shape[-1]


@caught_by("check_probabilities", r"makes weights that are not finite", beta=0.5, mode="post_renorm")
class DividesByNothing(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs / (event.probs.sum(-1, keepdim=True) - event.probs.sum(-1, keepdim=True))


@caught_by("check_positions", r"touches position \d+ of sample \d, role SYSTEM, but its roles are GENERATED, PROMPT")
class AlsoBeforeThePicture(LocoRE):
    def _window(self, event: Any, matrix: Any) -> Any:
        keys = torch.arange(matrix.shape[-1])
        return (keys < event.rows[:, None]).expand(event.layout.rows, -1, -1).unsqueeze(1)


@caught_by("check_positions", r"role SYSTEM, but its roles are IMAGE", alpha=2.0)
class AllScores(CLVA):
    def on_attention_scores(self, event: Any, state: Any) -> Any:
        return event.scores * 1.5


# ------------------------------------------------------------------------------------------------------ what it costs


@caught_by("check_cost", r"runs 1 extra forwards for 2 tokens, its tags allow 0: raise tags\.forwards", lam=1.5)
class FreePass(SCR):
    tags: ClassVar[Tags] = dataclasses.replace(SCR.tags, forwards_per_sample=0.0)


@caught_by("check_cost", r"runs 2 extra forwards for 2 tokens, its tags allow 1", lam=1.5)
class TwoPasses(SCR):
    def on_sample_begin(self, event: Any, state: Any) -> None:
        super().on_sample_begin(event, state)
        event.request.diagnose(state)


@caught_by("check_cost", r"backwards for 6 tokens, its tags allow 11: raise tags\.backwards", alpha=1.1)
class CheapGradients(SGRS):
    tags: ClassVar[Tags] = dataclasses.replace(SGRS.tags, backwards_per_token=1.0)


@caught_by("check_cost", r"runs \d+ extra backwards but counts none: state\.count\('extra_backwards'", alpha=1.1)
class UncountedGradients(SGRS):
    def _count(self, state: Any, draw: Any, place: Any, counts: Any) -> None:
        state.count("steps", 1.0)


@caught_by("check_cost_is_paid", r"declare 6 extra forwards for 6 tokens, but the dearest parameter set .* makes 0")
class Overpriced(LocoRE):
    tags: ClassVar[Tags] = dataclasses.replace(LocoRE.tags, forwards_per_token=1.0)


@caught_by("check_draws", r"tags\.stochastic is True, but no parameter set .* another result with another seed")
class NeverDraws(LocoRE):
    tags: ClassVar[Tags] = dataclasses.replace(LocoRE.tags, stochastic=True)


@caught_by("check_gradients", r"runs backwards without saying so: set tags\.gradient")
class UndeclaredGradient(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = event.probs.clone().requires_grad_()
            (slope,) = torch.autograd.grad(leaf.square().sum(), leaf)
        return event.probs * (1.0 + 0.1 * slope)


@caught_by("check_gradients", r"on_attention_probs .* leaves the grad mode changed")
class LeavesGradEnabled(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        torch.set_grad_enabled(True)
        return super().on_attention_probs(event, state)


@caught_by("check_gradients", r"leaves a gradient on .*: use autograd\.grad")
class FillsGradients(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        weight = event.request.bus.model.get_decoder().layers[1].mlp.down_proj.weight
        weight.grad = torch.zeros_like(weight)
        return super().on_hidden_states(event, state)


@caught_by("check_gradients", r"keeps a graph alive on state\.leaf after the step; detach\(\) it")
class KeepsTheGraph(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            state.leaf = event.hidden.clone().requires_grad_() * 2
        return super().on_hidden_states(event, state)


# -------------------------------------------------------------------------------------------------------- beside others


@caught_by("check_families", r"cannot be planned for .* IndexError: .* Derive layers from ModelFacts")
class DeepOnly(Adding):
    def subscriptions(self, model: Any) -> list[Subscription]:
        layer = list(range(model.layers))[3]
        return [Subscription(point=_HIDDEN, access=Access.WRITE, layers=(layer,))]


@caught_by("check_families", r"refuses every tiny model \(\w+: .*wants layer 20.*, so nothing can be checked")
class FixedLayer(Adding):
    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=_HIDDEN, access=Access.WRITE, layers=(20,))]


@caught_by("check_families", r"refuses every tiny model")
class Picky(Adding):
    def subscriptions(self, model: Any) -> list[Subscription]:
        raise UnsupportedModel("needs a model of seven billion parameters")


@caught_by("check_beams", r"in a beam search, beam \d of prompt \d gets other scores .* belongs on state\.per_row")
class RemembersByPlace(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        state.past = 0.8 * state.get("past", 0.0) + event.hidden[:, -1].detach()
        return torch.cat([event.hidden[:, :-1], event.hidden[:, -1:] + state.past[:, None]], 1)


@caught_by("check_composes", r"before .*: HookError while generating: .*cannot share.*refused when it is built")
class Unsociable(Adding):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        if len(event.request.bus.methods) > 1:
            raise RuntimeError("cannot share the model")
        return super().on_hidden_states(event, state)


@caught_by("check_is_observed", r"another result beside a method that only reads: .* more rows than asked", beta=0.5)
class FirstRowIsMine(LocoRE):
    """Takes the first row for the one it asked for."""

    def _window(self, event: Any, matrix: Any) -> Any:
        window = super()._window(event, matrix)
        return window[:, :, :1].expand(-1, -1, window.shape[2], -1)


@caught_by("check_has_effect", r"writes hidden_states but its tags do not say so: add it to tags\.writes")
@caught_by("check_detach", r"writes hidden_states but its tags do not say so: add it to tags\.writes")
class UndeclaredPoint(LocoRE):
    def subscriptions(self, model: Any) -> list[Subscription]:
        return [*super().subscriptions(model), Subscription(point=_HIDDEN, access=Access.WRITE, layers=(0,))]

    def on_hidden_states(self, event: Any, state: Any) -> Any:
        return event.hidden * 1.1


@caught_by("check_has_effect", r"asks for gradients but its tags do not say so: set tags\.gradient", alpha=1.1)
class UndeclaredGradientAccess(SGRS):
    @property
    def needs_gradient(self) -> bool:
        return False

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [
            dataclasses.replace(own, access=Access.GRADIENT) if own.access is Access.DIRECT else own
            for own in super().subscriptions(model)
        ]
