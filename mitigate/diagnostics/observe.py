"""What observers share: reading a layer's final attention to the picture, and keeping values per step and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mitigate.core import Access, AttentionProbs, MethodState, ModelFacts, Point, Rows, Subscription
from mitigate.lazy import torch
from mitigate.ops.sweep import picture_groups

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout


def predicting_rows(model: ModelFacts) -> Subscription:
    """Ask for the final attention weights of the row that predicts the next token, in every layer."""
    return Subscription(
        point=Point.ATTENTION_PROBS,
        access=Access.OBSERVE,
        layers=tuple(range(model.layers)),
        rows=Rows.LAST,
        where="predicting row",
    )


def patches(layout: TokenLayout, state: MethodState) -> Tensor:
    """Mark the picture's patches in the prompt, ``[B, P]``: line breaks and class tokens are none."""
    marks: Tensor = state.once("patches", layout.images, lambda: picture_groups(layout) >= 0)
    return marks


def seen_patches(event: AttentionProbs, state: MethodState) -> Tensor:
    """Mark the patches that the last row can see in the event's layer, ``[B, P]``: a sliding window lets some go."""
    keys = patches(event.layout, state).to(event.probs.device)[:, : event.probs.shape[-1]]
    return keys if event.unseen is None else keys & ~event.unseen[:, 0, -1, : keys.shape[1]]


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
