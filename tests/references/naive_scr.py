"""SCR by brute force: choose sources on a grid with loops, edit block outputs in every full-sequence forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import LlavaForConditionalGeneration

from .tiny import Edit, full_forward, image_spans, strip

NEIGHBOURHOODS: dict[str, list[tuple[int, int]]] = {
    "8": [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)],
    "4": [(-1, 0), (0, -1), (0, 1), (1, 0)],
    "radius2": [(r, c) for r in range(-2, 3) for c in range(-2, 3) if (r, c) != (0, 0)],
}
Roles = tuple[list[int], dict[int, int]]


def choose(a_grid: torch.Tensor, k_src: int, ownership: str = "topk_then_exclude", neighbourhood: str = "8") -> Roles:
    """Sources and owned neighbours of one image (the selection rule before Eq. 1).

    ``a_grid`` is the score map ``[Hg, Wg]``. Returns raster indices: the sources in descending order of score, and a
    map neighbour -> its only source. Equal scores go to the lower raster index. Border patches are never sources.
    A grid with fewer than three rows or columns has neither.
    """
    height, width = a_grid.shape
    if height < 3 or width < 3:
        return [], {}
    score = {r * width + c: float(a_grid[r, c]) for r in range(height) for c in range(width)}
    interior = [i for i in score if 0 < i // width < height - 1 and 0 < i % width < width - 1]
    ranked = sorted(interior, key=lambda i: (-score[i], i))

    def around(index: int) -> list[int]:
        places = [(index // width + r, index % width + c) for r, c in NEIGHBOURHOODS[neighbourhood]]
        return [r * width + c for r, c in places if 0 <= r < height and 0 <= c < width]

    owners: dict[int, int] = {}
    sources: list[int] = []
    if ownership == "topk_then_exclude":
        sources = ranked[:k_src]
        for source in sources:
            for patch in around(source):
                if patch not in sources and patch not in owners:
                    owners[patch] = source
    elif ownership == "greedy_nms":
        for candidate in ranked:
            if len(sources) == k_src:
                break
            if candidate in owners:
                continue
            sources.append(candidate)
            for patch in around(candidate):
                if patch not in sources and patch not in owners:
                    owners[patch] = candidate
    else:
        raise ValueError(f"unknown ownership {ownership!r}")
    return sources, owners


def attention_map(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    diag_layers: Sequence[int],
) -> list[torch.Tensor | None]:
    """Score map per image (pass 1): mean attention of text queries to each visual key, over layers and heads.

    Queries are the non-image prompt positions after the image's last token, averaged over all keys' softmax. An image
    without any such query has no map (``None``).
    """
    ids = strip(input_ids, attention_mask)
    spans = image_spans(model, ids, 0 if pixel_values is None else len(pixel_values))
    probs = full_forward(model, ids, pixel_values, collect=True).probs
    visual = {position for span in spans for position in span}
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    maps: list[torch.Tensor | None] = []
    for span in spans:
        queries = [t for t in range(span[-1] + 1, ids.shape[1]) if t not in visual]
        if not queries:
            maps.append(None)
            continue
        layers = [layer for layer in diag_layers if layer < len(probs)]
        total = sum(probs[layer][:, queries][:, :, span].float().mean(dim=(0, 1)) for layer in layers)
        maps.append((torch.as_tensor(total) / len(layers)).reshape(side, side))
    return maps


def roles(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    k_src: int,
    diag_layers: Sequence[int],
    ownership: str = "topk_then_exclude",
    neighbourhood: str = "8",
) -> list[Roles]:
    """Sources and owners of every image as positions in the unpadded sequence; an image without a map has none."""
    ids = strip(input_ids, attention_mask)
    maps = attention_map(model, ids, pixel_values, diag_layers=diag_layers)
    spans = image_spans(model, ids, len(maps))
    out: list[Roles] = []
    for span, a_grid in zip(spans, maps, strict=True):
        sources, owners = ([], {}) if a_grid is None else choose(a_grid, k_src, ownership, neighbourhood)
        out.append(([span[s] for s in sources], {span[n]: span[s] for n, s in owners.items()}))
    return out


def redistribute(x: torch.Tensor, chosen: Sequence[Roles], lam: float) -> torch.Tensor:
    """Eq. 1 once on ``[T, D]``: add (lam - 1) x_s to the neighbours of s, then divide x_s by lam."""
    out = x.clone()
    for sources, owners in chosen:
        for neighbour, source in owners.items():
            out[neighbour] = x[neighbour] + (lam - 1) * x[source]
        for source in sources:
            out[source] = x[source] / lam
    return out


def edit(chosen: Sequence[Roles], lam: float, early_layers: Collection[int]) -> Edit:
    """``hidden_edit`` callback: Eq. 1 on the output of every early block."""
    return lambda layer, x: redistribute(x, chosen, lam) if layer in early_layers else x


def generate(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    lam: float,
    k_src: int,
    early_layers: Collection[int],
    diag_layers: Sequence[int],
    max_new_tokens: int,
    ownership: str = "topk_then_exclude",
    neighbourhood: str = "8",
    eos: Collection[int] = (),
    forced: Sequence[int] | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Both passes and greedy decoding; returns the new tokens and the raw logits ``[T_new, V]`` that chose them.

    Sources are chosen once from the prompt; the edit is repeated in every recomputation of the whole sequence.
    """
    ids = strip(input_ids, attention_mask)
    chosen = roles(
        model,
        ids,
        pixel_values,
        k_src=k_src,
        diag_layers=diag_layers,
        ownership=ownership,
        neighbourhood=neighbourhood,
    )
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        out = full_forward(model, ids, pixel_values, hidden_edit=edit(chosen, lam, early_layers))
        steps.append(out.logits[-1])
        token = int(out.logits[-1].argmax()) if forced is None else forced[step]
        tokens.append(token)
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, torch.stack(steps)
