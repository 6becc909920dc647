"""Where the patches of a picture really arrive in the decoder's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def embeddings(model: Any, inputs: Any) -> Tensor:
    """Return text and image embeddings ``[B, P, D]`` as the decoder receives them."""
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    return seen[0]


def apart(tower: Any) -> None:
    """Let a vision tower look at every patch alone: what is painted into one changes nothing elsewhere."""
    tower.encoder.layers = nn.ModuleList()


def changed(before: Tensor, after: Tensor) -> list[tuple[int, int]]:
    """Return ``(row, column)`` of the embeddings that differ."""
    return [(row, column) for row, column in (before != after).any(-1).nonzero().tolist()]
