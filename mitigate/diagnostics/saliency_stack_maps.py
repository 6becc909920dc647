"""The maps of one token as a stack makes them: its text replayed under the stack, the last pass with a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Point,
    Rows,
    Subscription,
    Tags,
)
from mitigate.core.stack import Stack
from mitigate.ops.saliency import cotangent

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.adapters import LoadedModel

#: Who takes part in choosing tokens: it leaves the forwards alone, and here the text is given.
_CHOOSING = frozenset({Point.SELECT_TOKEN, Point.TOKEN_CHOSEN})


@dataclass(frozen=True, kw_only=True)
class WeightKeeper(Method):
    """Keeps the weights ``[B, H, T, T]`` of a pass with a graph, as all methods before it left them; changes nothing.

    Parameters
    ----------
    layers
        Layers to keep.
    """

    name: ClassVar[str] = "map"
    summary: ClassVar[str] = "keeps differentiable attention weights of all rows"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS}))

    layers: tuple[int, ...] = (0,)

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Write, since what is returned is what the model goes on with: the leaf of the graph."""
        where = "weights of all rows"
        point, access = Point.ATTENTION_PROBS, Access.WRITE
        return [Subscription(point=point, access=access, layers=self.layers, rows=Rows.ALL, where=where)]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """Make the lowest layer's weights the leaf; those above depend on it."""
        if not torch.is_grad_enabled():
            return None
        weights = event.probs if event.probs.requires_grad else event.probs.detach().requires_grad_()
        state.kept = {**state.get("kept", {}), event.layer: weights}
        return weights


def acting(methods: Mapping[str, Method], facts: ModelFacts) -> tuple[dict[str, Method], list[str]]:
    """Split a stack into the methods that act in forwards, and the keys of those that take part in choosing tokens."""
    choosing = [
        key for key, method in methods.items() if any(item.point in _CHOOSING for item in method.subscriptions(facts))
    ]
    return {key: method for key, method in methods.items() if key not in choosing}, choosing


def under_stack(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    written: Sequence[int],
    target: int,
    layers: Sequence[int],
    methods: Mapping[str, Method],
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return layer -> ``(A, dA)``, ``[H, T, T]`` each, as `attention_and_gradients`, under a stack.

    The written tokens are passed through step by step without a cache, so that methods see what they saw when the text
    was written; only the last pass, over the whole text, has a graph.
    """
    from mitigate.diagnostics.saliency_maps import forced

    keeper = WeightKeeper(layers=tuple(layers))
    key = "map"
    while key in methods:
        key += "_"
    needing = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    with Stack({**methods, key: keeper}).attach(loaded.model, loaded.processor) as handle:

        def passes(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
            for count in range(len(written)):
                model(**forced(inputs, written[:count]), use_cache=False, return_dict=True)
            with torch.enable_grad():
                out = model(**forced(inputs, written), use_cache=False, return_dict=True)
                logits = out.logits[:, -1].float()
                direction = cotangent(logits.detach(), torch.tensor([target], device=logits.device))
                request = handle.bus.request if handle.bus is not None else None
                kept = request.state(key).kept if request is not None else {}
                weights = [kept[layer] for layer in layers]
                gradients = torch.autograd.grad((direction * logits).sum(), weights)
            for layer, weight, gradient in zip(layers, weights, gradients, strict=True):
                found[layer] = (weight.detach()[0].float(), gradient[0].float())
            return input_ids

        try:
            for parameter in needing:
                parameter.requires_grad_(False)
            handle.generate(**inputs, custom_generate=passes, max_new_tokens=len(written) + 1, do_sample=False)
        finally:
            for parameter in needing:
                parameter.requires_grad_(True)
    return found
