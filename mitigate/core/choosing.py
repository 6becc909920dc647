"""The end of a step: who chooses the next token, and who watches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from mitigate.core.events import Selection, SelectToken, TokenChosen
from mitigate.core.points import DIFFERENTIATES, Point

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.bus import HookBus
    from mitigate.core.frame import Frame
    from mitigate.core.plan import BoundSubscription
    from mitigate.core.request import Request


def select_token(bus: HookBus, logits: Tensor, scores: Tensor) -> Selection | None:
    """Ask the stack's token-selecting method, if any, for the next token of every row.

    Counts ``tokens_changed``: choices that greedy decoding of the same logits would not have made.

    Parameters
    ----------
    logits, scores
        ``[B, V]`` float32, before and after the caller's logits processors.
    """
    request = bus.running()
    active = ~request.finished
    for item in bus.subscriptions(Point.SELECT_TOKEN):
        event = SelectToken(**_step(bus, item, request), logits=logits, scores=scores, active=active)
        selection = cast("Selection | None", bus.call(item, event))
        if selection is not None:
            changed = selection.chosen & (selection.token != scores.argmax(-1)) & active
            request.state(item.key).count("tokens_changed", changed)
        return selection
    return None


def tell_chosen(bus: HookBus, logits: Tensor, scores: Tensor, tokens: Tensor) -> None:
    """Tell the methods that watch with which token ``[B]`` every row goes on."""
    request = bus.running()
    active = ~request.finished
    for item in bus.subscriptions(Point.TOKEN_CHOSEN):
        step = _step(bus, item, request)
        bus.call(item, TokenChosen(**step, logits=logits, scores=scores, active=active, tokens=tokens))


def _step(bus: HookBus, item: BoundSubscription, request: Request) -> dict[str, Any]:
    """Return what both events say besides their tensors, with the layers this method differentiates."""
    asked = {
        layer: other.subscription.access
        for other in bus.bound
        if other.key == item.key and other.subscription.access in DIFFERENTIATES
        for layer in other.subscription.layers
    }
    return {**cast("Frame", request.frame).event(request), "asker": item.key, "differentiates": asked}
