"""What observers share: reading a layer's final attention to the picture, and keeping values per step and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mitigate.core import Access, AttentionProbs, Event, MethodState, ModelFacts, Point, Rows, Subscription
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def predicting_rows(model: ModelFacts) -> Subscription:
    """Ask for the final attention weights of the row that predicts the next token, in every layer."""
    return Subscription(
        point=Point.ATTENTION_PROBS,
        access=Access.OBSERVE,
        layers=tuple(range(model.layers)),
        rows=Rows.LAST,
        where="predicting row",
    )


def image_tokens(event: Event) -> Tensor:
    """Return the number of image tokens per request row, ``[B]``."""
    return event.layout.image_mask.sum(1)


def note(state: MethodState, event: AttentionProbs, **values: Tensor) -> None:
    """Keep values of one layer and step, each ``[B, ...]``; a step that is run again replaces what was kept."""
    kept = state.get("kept")
    if kept is None:
        kept = state.kept = {}
        state.joined = {}
    for name, value in values.items():
        kept.setdefault(name, {}).setdefault(event.step, {})[event.layer] = value


def noted(state: MethodState, name: str) -> Tensor:
    """Return what was kept under a name, on the CPU: ``[steps, B, layers, ...]``."""
    if name not in state.joined:
        steps = state.kept.pop(name)
        layers = [torch.stack([steps[step][layer] for layer in sorted(steps[step])], 1) for step in sorted(steps)]
        state.joined[name] = torch.stack(layers).cpu()
    joined: Tensor = state.joined[name]
    return joined


def per_step(state: MethodState, row: int, *names: str) -> list[dict[str, Any]]:
    """Return one request row's values, a dictionary per step with a list over layers under each name."""
    lists = {name: noted(state, name)[:, row].tolist() for name in names}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
