"""Two methods that do nothing, for tests of everything that must work with any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mitigate.core import Access, Fidelity, Method, ModelFacts, Point, Rows, Subscription, Tags


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Reads attention.

    Parameters
    ----------
    beta
        Gain of the toy,
        on two lines.
    window
        Keys.
    layers
        Range.
    """

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "does nothing to attention"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS}), forwards_per_sample=1)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "lineage": {"beta": 0.7, "layers": "1-2"}}

    beta: float = 0.15
    window: int = 5
    layers: str = "all"
    picks: tuple[int, ...] = (1, 2)
    ceiling: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        self.require(self.window > 0, "window", "be positive")

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        return [
            Subscription(point=Point.ATTENTION_PROBS, access=Access.WRITE, layers=(0,), rows=Rows.LAST, where="row")
        ]

    def on_attention_probs(self, event: Any, state: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Chooser(Method):
    """Chooses tokens."""

    name: ClassVar[str] = "chooser"
    summary: ClassVar[str] = "chooses what plain decoding would"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.SELECT_TOKEN}), selects_token=True)

    alpha: float = 0.6

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        return [Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE)]

    def on_select_token(self, event: Any, state: Any) -> None:
        return None
