"""Negative control: random edits of attention, as large as LocoRE's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    Event,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Point,
    Rows,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.lazy import torch
from mitigate.ops.random import hashed_uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ControlRandom(Method):
    """Changes attention by as much as LocoRE (`post_raw`) would, in the same rows, heads and layers, but at random.

    Every weight is raised or lowered by the same share, the sign drawn per key, so that nothing is favoured. What this
    control achieves, any edit of that size achieves: it should change no metric beyond its interval.

    Parameters
    ----------
    beta, window
        As LocoRE's: per head the L1 of the edit is ``beta`` times the attention mass on the last ``window`` keys.
    layers
        Decoder layers.

    Examples
    --------
    >>> ControlRandom(beta=0.2).window
    5
    """

    name: ClassVar[str] = "control_random"
    summary: ClassVar[str] = "negative control: changes attention by as much as locore, at random"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.SAMPLE_BEGIN}), writes=frozenset({Point.ATTENTION_PROBS}), stochastic=True
    )

    beta: float = 0.15
    window: int = 5
    layers: str = "all"

    def __post_init__(self) -> None:
        self.require_finite("beta")
        self.require(0.0 <= self.beta <= 1.0, "beta", "be between 0 and 1 (no weight may become negative)")
        self.require(self.window >= 1, "window", "be at least 1")

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Act on the predicting rows of the configured layers."""
        layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
        return [
            Subscription(point=Point.SAMPLE_BEGIN, where="draws one seed per sample"),
            Subscription(
                point=Point.ATTENTION_PROBS,
                access=Access.WRITE,
                layers=layers,
                rows=Rows.PREDICTORS,
                where="every key, up or down at random",
                normalised=False,
            ),
        ]

    def on_sample_begin(self, event: Event, state: MethodState) -> None:
        """Draw one seed per sample."""
        seeds = [torch.randint(2**62, (), generator=generator) for generator in event.request.generators]
        state.seed = torch.stack(seeds).to(event.layout.roles.device)

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """A[q*, j] <- A[q*, j] (1 + beta m s_j), with m the mass on the window and s_j a random sign."""
        if self.beta == 0.0:
            return None
        probs, layout, device = event.probs, event.layout, event.probs.device
        keys = torch.arange(probs.shape[-1], device=device)
        distance = event.rows.to(device)[:, None] - keys
        recent = (distance >= 1) & (distance <= self.window) & (keys >= layout.after_image[:, None, None])
        mass = (probs * recent.unsqueeze(1)).sum(-1, keepdim=True)  # [B, H, R, 1]
        # columns are counted from the sample's own start, so that padding does not change its draws
        start = layout.valid.int().argmax(1)[:, None, None, None]
        heads = torch.arange(probs.shape[1], device=device)[:, None, None]
        seed = state.seed[:, None, None, None]
        draw = hashed_uniform(seed, event.layer, heads, event.rows[:, None] - start, keys - start)
        return probs * (1.0 + self.beta * mass * torch.where(draw < 0.5, -1.0, 1.0))

    @classmethod
    def identity(cls) -> Self:
        """No gain."""
        return cls(beta=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return two strengths."""
        return [{"beta": 0.5, "window": 3}, {"beta": 1.0, "window": 8, "layers": "0.5-1.0"}]
