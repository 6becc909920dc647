"""A method that only watches where the predicting row looks, and reports it as a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mitigate.core import AttentionProbs, Fidelity, Method, MethodState, ModelFacts, Point, Subscription, Tags
from mitigate.diagnostics.observe import predicting_rows


@dataclass(frozen=True, kw_only=True)
class AttentionWatch(Method):
    """Reports ``attention`` ``[B, K]`` of every step: the final weights, mean of heads and layers.

    It changes nothing; the mean is reported after the last layer.
    """

    name: ClassVar[str] = "attention"
    summary: ClassVar[str] = "reports the attention of the predicting row, mean of heads and layers"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS}))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Watch the predicting row in every layer."""
        return [predicting_rows(model)]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Add a layer's head mean; report the mean after the last layer."""
        if not state.tracing:
            return
        layers = event.request.facts.layers
        mean = event.probs[:, :, -1].detach().float().mean(1) / layers
        state.sum = mean if event.layer == 0 else state.sum + mean.to(state.sum.device)
        if event.layer == layers - 1:
            state.trace(event, attention=state.sum)
