"""Methods that each leave something behind or remember something, with the check and the words that must catch them.

Most are built-in methods with one thing broken.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AttentionInterface

from mitigate.core import Access, Branch, Fidelity, Method, Phase, Point, Subscription, Tags
from mitigate.methods.clva import CLVA
from mitigate.methods.control_random import ControlRandom
from mitigate.methods.dleaf import DLEAF
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from tests.testing.catching import caught_by

_SEEN: dict[str, Any] = {}


def model_of(event: Any) -> Any:
    return event.request.bus.model


# --------------------------------------------------------------------------------------------------------- left behind


@caught_by("check_detach", r"leaves something behind after the with block: hooks of .*layers\.1", beta=0.5)
class LeakedHook(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        if event.layer == 1 and event.step == 0:
            model_of(event).get_decoder().layers[1].register_forward_hook(lambda *args: None)
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"attributes of the model \(strength is new\)", alpha=2.0, min_anchors=2)
class LeakedAttribute(CLVA):
    def on_attention_scores(self, event: Any, state: Any) -> Any:
        model_of(event).strength = self.alpha
        return super().on_attention_scores(event, state)


@caught_by("check_detach", r"configuration GenerationConfig \(top_k changed\)", alpha=1.1, proposal="greedy_order")
class ChangedGenerationConfig(SGRS):
    def on_select_token(self, event: Any, state: Any) -> Any:
        model_of(event).generation_config.top_k = 3
        return super().on_select_token(event, state)


@caught_by("check_detach", r"configuration CLIPVisionConfig \(_attn_implementation_internal changed\)", lam=1.5)
class SwitchedAttention(SCR):
    def on_sample_begin(self, event: Any, state: Any) -> None:
        model_of(event).config.vision_config._attn_implementation_internal = "eager"
        super().on_sample_begin(event, state)


@caught_by("check_detach", r"global attention functions", beta=0.5)
class RegisteredAttention(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        AttentionInterface.register("mine", lambda *args, **kwargs: None)
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"module torch\.nn\.functional \(softmax changed\)", beta=0.5)
class PatchedTorch(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        original = torch.nn.functional.softmax
        if not hasattr(original, "mine"):
            torch.nn.functional.softmax = lambda *args, **kwargs: original(*args, **kwargs)
            torch.nn.functional.softmax.mine = True  # type: ignore[attr-defined]
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"class LlamaMLP \(forward changed\)", beta=0.5)
class PatchedClass(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        mlp = type(model_of(event).get_decoder().layers[0].mlp)
        original = mlp.forward
        if not hasattr(original, "mine"):

            def forward(self: Any, value: Any) -> Any:
                return original(self, value)

            forward.mine = True  # type: ignore[attr-defined]
            mlp.forward = forward
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"training changed", beta=0.5)
class TrainingMode(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        model_of(event).train()
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"flags of .* \(requires_grad changed", beta=0.5)
class ThawedWeights(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        model_of(event).requires_grad_(True)
        return super().on_attention_probs(event, state)


@dataclass(frozen=True, kw_only=True)
class Hooking(Method):
    """Doubles the MLP's output through a hook of its own, for the length of a request."""

    name: ClassVar[str] = "hooking"
    summary: ClassVar[str] = "acts through its own hook"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.SAMPLE_BEGIN, Point.SAMPLE_END}))

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=Point.SAMPLE_BEGIN), Subscription(point=Point.SAMPLE_END)]

    def on_sample_begin(self, event: Any, state: Any) -> None:
        mlp = model_of(event).get_decoder().layers[1].mlp
        state.hook = mlp.register_forward_hook(lambda module, args, output: output * 2)

    def on_sample_end(self, event: Any, state: Any) -> None:
        state.hook.remove()


caught_by("check_detach_after_error", r"after an error in .* hooks of .*layers\.1\.mlp")(Hooking)


@caught_by("check_detach_after_error", r"after an error in .* same stack gives something else")
class Interrupted(Hooking):
    """Keeps on the model what an interrupted request left, and goes on with it."""

    def on_sample_begin(self, event: Any, state: Any) -> None:
        _SEEN["running"] = _SEEN.get("running", 0) + 1
        state.count("running", 1.0)

    def on_step_begin(self, event: Any, state: Any) -> None:
        if event.step == 1:
            model_of(event).get_decoder().layers[1].mlp.down_proj.weight.data.mul_(_SEEN["running"])

    def on_sample_end(self, event: Any, state: Any) -> None:
        model_of(event).get_decoder().layers[1].mlp.down_proj.weight.data.div_(_SEEN["running"])
        _SEEN["running"] -= 1

    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.SAMPLE_BEGIN, Point.STEP_BEGIN, Point.SAMPLE_END}))

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=point) for point in (Point.SAMPLE_BEGIN, Point.STEP_BEGIN, Point.SAMPLE_END)]


@caught_by("check_output_restored", r"the model's logits differ by .*; expected bit-identical ones", lam=1.5)
@caught_by("check_weights_untouched", r"on_hidden_states .* edits the weight .*embed_tokens", lam=1.5)
class EditedWeights(SCR):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        model_of(event).get_input_embeddings().weight.data.mul_(1.001)
        return super().on_hidden_states(event, state)


@caught_by("check_weights_untouched", r"on_sample_begin \(prefill, step 0\) edits the weight .*lm_head|embed_tokens")
class BorrowedWeights(Hooking):
    def on_sample_begin(self, event: Any, state: Any) -> None:
        model_of(event).lm_head.weight.data.mul_(2.0)

    def on_sample_end(self, event: Any, state: Any) -> None:
        model_of(event).lm_head.weight.data.div_(2.0)


# ------------------------------------------------------------------------------------------------------------ in place


@caught_by("check_inputs_untouched", r"on_attention_probs \(layer 0, prefill, step 0\) edits event\.probs in place")
class EditsProbs(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        event.probs.mul_(self._gain(event))
        return event.probs


@caught_by("check_inputs_untouched", r"edits event\.scores in place", mix_stage="pre", gate="always")
class EditsScores(DLEAF):
    def on_attention_scores(self, event: Any, state: Any) -> Any:
        event.scores.data.clamp_(max=2.0)
        return super().on_attention_scores(event, state)


@caught_by("check_inputs_untouched", r"edits event\.hidden in place", lam=1.5)
class EditsHidden(SCR):
    def on_hidden_states(self, event: Any, state: Any) -> Any:
        if event.phase is not Phase.DIAGNOSTIC:
            event.hidden[event.layout.image_mask[:, : event.hidden.shape[1]]] *= 1.5


@caught_by("check_inputs_untouched", r"edits event\.layout\.valid in place")
class EditsLayout(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        event.layout.valid[:, 0] = ~event.layout.valid[:, 0]
        return super().on_attention_probs(event, state)


@dataclass(frozen=True, kw_only=True)
class EditsBranchLogits(Method):
    name: ClassVar[str] = "contrasting"
    summary: ClassVar[str] = "contrasts with a stream without the picture"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.NEXT_TOKEN_LOGITS}), forwards_per_token=1.0)

    def branches(self) -> list[Branch]:
        return [Branch(name="blind", images=False)]

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]

    def on_next_token_logits(self, event: Any, state: Any) -> Any:
        return event.logits * 1.5 - event.branch_logits("blind").mul_(0.5)


caught_by("check_inputs_untouched", r"on_next_token_logits .* edits event\.branch_logits\('blind'\) in place")(
    EditsBranchLogits
)


@caught_by("check_inputs_untouched", r"edits event\.request\.finished in place")
class EndsSamples(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        event.request.finished = ~event.request.finished
        return super().on_attention_probs(event, state)


@caught_by("check_detach", r"environment \(MINE is new\)")
class SetsTheEnvironment(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        os.environ["MINE"] = "1"
        return super().on_attention_probs(event, state)


@caught_by("check_inputs_untouched", r"edits event\.request\.cache\.layers\[0\]\.values in place")
class EditsCache(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        event.request.cache.layers[0].values.mul_(1.5)
        return super().on_attention_probs(event, state)


@caught_by("check_inputs_untouched", r"edits (event\.request\.ids|the caller's input_ids) in place")
class EditsIds(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        event.request.ids[:, -1] = 9
        return super().on_attention_probs(event, state)


# ---------------------------------------------------------------------------------------------------------- remembered


@caught_by("check_no_state_leak", r"gives a sample another result after others than alone")
class RemembersOnItself(LocoRE):
    """Scales by what the first sample ever seen looked like."""

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        if "_first" not in vars(self):
            object.__setattr__(self, "_first", float(event.probs.max()))
        return event.probs * (1.0 + self._first * (self._gain(event) - 1.0))


@caught_by("check_no_state_leak", r"remembers between requests: the instance \(_last is new\)")
class RemembersQuietly(LocoRE):
    """Has no use for what it remembers yet."""

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        object.__setattr__(self, "_last", event.step)
        return super().on_attention_probs(event, state)


@caught_by("check_no_state_leak", r"remembers between requests: class RemembersOnItsClass \(seen changed", beta=0.5)
class RemembersOnItsClass(LocoRE):
    seen: ClassVar[list[int]] = []

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        self.seen.append(event.step)
        return super().on_attention_probs(event, state)


@caught_by(
    "check_no_state_leak",
    r"remembers between requests: module .*broken_lifecycle \(_SEEN changed \(0 is new",
    alpha=2.0,
)
class RemembersInItsModule(CLVA):
    def on_attention_scores(self, event: Any, state: Any) -> Any:
        _SEEN[str(len(_SEEN))] = event.step
        return super().on_attention_scores(event, state)


@caught_by("check_no_state_leak", r"gives a sample another result after the sample .* than alone", beta=0.5)
class SharesByLength(LocoRE):
    """Keeps a value of one picture for every prompt of the same length."""

    def on_attention_probs(self, event: Any, state: Any) -> Any:
        strength = event.request.shared(event.layout.prompt_length, lambda: float(event.probs.max()))
        return event.probs * (1.0 + strength * (self._gain(event) - 1.0))


@caught_by("check_deterministic", r"moves torch's global random state; draw from request\.generators", beta=0.5)
class GlobalTorchDraws(ControlRandom):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs * (1.0 + self.beta * (torch.rand(event.probs.shape[-1]) - 0.5))


@caught_by("check_deterministic", r"moves numpy's global random state", beta=0.5)
class GlobalNumpyDraws(ControlRandom):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs * float(1.0 + self.beta * np.random.rand())


@caught_by("check_deterministic", r"gives another result with the same seed", beta=0.5)
class SeedlessDraws(ControlRandom):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return event.probs * float(1.0 + self.beta * random.SystemRandom().random())


@caught_by("check_deterministic", r"depends on the seed: .* Set tags\.stochastic", beta=0.5)
class UndeclaredDraws(ControlRandom):
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.SAMPLE_BEGIN}), writes=frozenset({Point.ATTENTION_PROBS}))


@caught_by("check_quiet", r"prints 'layer 0'")
class Prints(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        print(f"layer {event.layer}")
        return super().on_attention_probs(event, state)


@caught_by("check_quiet", r"warns: careful")
class Warns(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        warnings.warn("careful", stacklevel=2)
        return super().on_attention_probs(event, state)


@caught_by("check_quiet", r"logs: mine: layer 0", alpha=1.1, proposal="greedy_order")
class Logs(SGRS):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        logging.getLogger("mine").info("layer 0")


@caught_by("check_trace", r"gives another result when it is traced")
class TracedOtherwise(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        return None if state.tracing else super().on_attention_probs(event, state)


@caught_by("check_trace", r"traces settings=LocoRE|traces settings=TracesObjects")
class TracesObjects(LocoRE):
    def on_attention_probs(self, event: Any, state: Any) -> Any:
        state.trace(event, settings=self)
        return super().on_attention_probs(event, state)
