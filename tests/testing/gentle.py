"""A method that keeps every rule: what the broken ones differ from, each in one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from mitigate.core import (
    Access,
    Fidelity,
    HiddenStates,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Point,
    Subscription,
    Tags,
)
from mitigate.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Gentle(Method):
    """Adds a constant to one half of the output of the last block.

    Paper: arXiv 0000.00000, which is made up.

    Parameters
    ----------
    gain
        One more than the constant; 1 changes nothing.
    offset
        Layers before the last one.
    side
        Which half.
    note
        Any words.
    weights
        One per part.
    limit
        Largest gain, if any.

    Examples
    --------
    >>> Gentle(gain=2.0).gain
    2.0
    """

    name: ClassVar[str] = "gentle"
    summary: ClassVar[str] = "adds a constant to the output of the last block"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    paper: ClassVar[Paper | None] = Paper(title="A gain", arxiv="0000.00000", where="Eq. 1")
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.HIDDEN_STATES}))
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "loud": {"gain": 4.0}}
    preset_fidelity: ClassVar[dict[str, Fidelity]] = {"loud": Fidelity.RECONSTRUCTED}

    gain: float = 1.5
    offset: int = 0
    side: Literal["left", "right"] = "left"
    note: Annotated[str, "free text"] = ""
    weights: tuple[float, ...] = (1.0, 2.0)
    limit: float | None = None

    def __post_init__(self) -> None:
        self.require_finite("gain")
        self.require(0 <= self.offset < 4, "offset", "be 0 to 3")
        self.require_option("side", ("left", "right"))
        self.require(all(0.0 <= weight < 1e6 for weight in self.weights), "weights", "be finite and not negative")
        self.require(self.limit is None or 0.0 < self.limit < 1e6, "limit", "be above 0, or null")

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        layer = model.layers - 1 - self.offset
        return [Subscription(point=Point.HIDDEN_STATES, access=Access.WRITE, layers=(layer,))]

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> Any:
        if self.gain == 1.0:
            return None
        shift = (min(self.gain, self.limit or self.gain) - 1.0) * sum(self.weights)
        left, right = event.hidden.chunk(2, -1)
        return torch.cat([left + shift, right] if self.side == "left" else [left, right + shift], -1)

    @classmethod
    def identity(cls) -> Self:
        return cls(gain=1.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [
            {"gain": 2.0, "offset": 1, "note": "1e3", "limit": 1.5},
            {"gain": 0.5, "side": "right", "weights": (0.5,)},
        ]
