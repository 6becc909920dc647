"""SCR by brute force: compare every pair of patches, and edit block outputs in every full-sequence forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from .tiny import Edit, full_forward, image_spans, strip

Roles = tuple[list[int], dict[int, int]]
#: Standard normal numbers ``[n, D]`` for a layer, one row for each owned neighbour from left to right.
Noise = Callable[[int, int, int], torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """A raster of patches: ``first`` is the offset of its first patch among the image's tokens."""

    first: int
    rows: int
    columns: int
    place: tuple[int, int] | None = None
    thumbnail: bool = False


@dataclass(frozen=True)
class Spot:
    """Where a patch lies: row and column in one raster of ``height`` by ``width``; groups are ranked separately."""

    group: Any
    raster: Any
    row: int
    column: int
    height: int
    width: int


def touch(one: Spot, other: Spot, neighbourhood: str) -> bool:
    """Whether two different patches of one raster are neighbours."""
    down, right = abs(one.row - other.row), abs(one.column - other.column)
    if one.raster != other.raster or down == right == 0:
        return False
    return {"8": max(down, right) == 1, "4": down + right == 1, "radius2": max(down, right) <= 2}[neighbourhood]


def choose_among(
    spots: Mapping[int, Spot],
    score: Mapping[int, float],
    k_src: int,
    ownership: str = "topk_then_exclude",
    neighbourhood: str = "8",
    exclude_border: bool = True,
) -> Roles:
    """Sources and owned neighbours of one group of patches, from the definition.

    Equal scores go to the lower number. Border patches are never sources unless allowed. A raster with fewer than three
    rows or columns has neither sources nor neighbours.
    """

    def candidate(spot: Spot) -> bool:
        border = spot.row in (0, spot.height - 1) or spot.column in (0, spot.width - 1)
        return min(spot.height, spot.width) >= 3 and not (border and exclude_border)

    def strength(patch: int) -> tuple[float, int]:
        return score[patch], -patch

    left = {patch for patch, spot in spots.items() if candidate(spot)}
    sources: list[int] = []
    owners: dict[int, int] = {}
    if ownership == "topk_then_exclude":
        sources = sorted(left, key=strength, reverse=True)[:k_src]
        for patch, spot in spots.items():
            adjacent = [source for source in sources if touch(spots[source], spot, neighbourhood)]
            if adjacent and patch not in sources:
                owners[patch] = max(adjacent, key=strength)
    elif ownership == "greedy_nms":
        while left and len(sources) < k_src:
            source = max(left, key=strength)
            sources.append(source)
            claimed = {p for p, s in spots.items() if touch(spots[source], s, neighbourhood)} - owners.keys()
            owners |= dict.fromkeys(claimed - set(sources), source)
            left -= claimed | {source}
    else:
        raise ValueError(f"unknown ownership {ownership!r}")
    return sources, owners


def choose(a_grid: torch.Tensor, k_src: int, ownership: str = "topk_then_exclude", neighbourhood: str = "8") -> Roles:
    """Sources and owned neighbours of one image as raster indices, for a score map ``[Hg, Wg]``."""
    height, width = a_grid.shape
    spots = {r * width + c: Spot(0, 0, r, c, height, width) for r in range(height) for c in range(width)}
    score = dict(enumerate(a_grid.flatten().tolist()))
    return choose_among(spots, score, k_src, ownership, neighbourhood)


def spots_of(tokens: Sequence[int], tiles: Sequence[Tile], tile_mode: str, image: int) -> dict[int, Spot]:
    """Where every patch of one image lies, by position; tiles that are left out have no spots."""
    out: dict[int, Spot] = {}
    for number, tile in enumerate(tiles):
        if tile_mode == "thumbnail_only" and len(tiles) > 1 and not tile.thumbnail:
            continue
        joined = tile_mode == "stitched" and len(tiles) > 1 and not tile.thumbnail
        above = left = 0
        height, width = tile.rows, tile.columns
        if joined:
            assert tile.place is not None
            parts = [other for other in tiles if not other.thumbnail and other.place is not None]
            column = [other for other in parts if other.place[1] == tile.place[1]]  # type: ignore[index]
            band = [other for other in parts if other.place[0] == tile.place[0]]  # type: ignore[index]
            above = sum(other.rows for other in column if other.place[0] < tile.place[0])  # type: ignore[index]
            left = sum(other.columns for other in band if other.place[1] < tile.place[1])  # type: ignore[index]
            height, width = sum(other.rows for other in column), sum(other.columns for other in band)
        group = (image, number) if tile_mode == "per_tile_k" else image
        raster = (image, "joined") if joined else (image, number)
        for r in range(tile.rows):
            for c in range(tile.columns):
                position = tokens[tile.first + r * tile.columns + c]
                out[position] = Spot(group, raster, above + r, left + c, height, width)
    return out


def geometry_of(model: LlavaForConditionalGeneration, n_images: int) -> list[list[Tile]]:
    """One square raster per image."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return [[Tile(0, side, side)] for _ in range(n_images)]


def patch_scores(
    model: LlavaForConditionalGeneration,
    ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    *,
    diag_layers: Sequence[int],
    text_queries: str = "after_image",
    question: Collection[int] = (),
    head_fraction: float = 1.0,
    geometry: Sequence[Sequence[Tile]] | None = None,
) -> list[dict[int, float] | None]:
    """A per image (pass 1): mean attention of text queries to each patch, over layers and heads, by position.

    Queries are non-image prompt positions after the image's last token; an image without any has no map (``None``).
    With a head fraction, each layer averages only the heads whose queries give the image most.
    """
    spans = image_spans(model, ids, 0 if pixel_values is None else len(pixel_values))
    geometry = geometry_of(model, len(spans)) if geometry is None else geometry
    probs = full_forward(model, ids, pixel_values, collect=True).probs
    visual = {position for span in spans for position in span}
    maps: list[dict[int, float] | None] = []
    for span, tiles in zip(spans, geometry, strict=True):
        queries = [t for t in range(span[-1] + 1, ids.shape[1]) if t not in visual]
        if text_queries == "question_only":
            queries = [t for t in queries if t in question]
        elif text_queries == "last":
            queries = queries[-1:]
        patches = [span[tile.first + i] for tile in tiles for i in range(tile.rows * tile.columns)]
        if not queries:
            maps.append(None)
            continue
        total = torch.zeros(len(patches), dtype=torch.float64)
        for layer in diag_layers:
            heads = [probs[layer][head][queries][:, patches].double().mean(0) for head in range(len(probs[layer]))]
            heads.sort(key=lambda head: -float(head.sum()))
            kept = heads[: math.ceil(head_fraction * len(heads))]
            total += sum(kept) / len(kept)
        maps.append(dict(zip(patches, (total / len(diag_layers)).tolist(), strict=True)))
    return maps


def attention_map(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    diag_layers: Sequence[int],
) -> list[torch.Tensor | None]:
    """Score map ``[side, side]`` per image, for square images."""
    maps = patch_scores(model, strip(input_ids, attention_mask), pixel_values, diag_layers=diag_layers)
    side = math.isqrt(model.config.image_seq_length)
    return [None if scores is None else torch.tensor(list(scores.values())).view(side, side) for scores in maps]


def entropy(weights: Collection[float]) -> float:
    """Entropy in nats of weights renormalised to sum 1."""
    total = math.fsum(weights)
    return -math.fsum(w / total * math.log(w / total) for w in weights if w > 0)


def roles(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    k_src: int,
    diag_layers: Sequence[int] = (),
    ownership: str = "topk_then_exclude",
    neighbourhood: str = "8",
    exclude_border: bool = True,
    tile_mode: str = "pooled",
    multi_image: str = "independent",
    geometry: Sequence[Sequence[Tile]] | None = None,
    ranks: Sequence[Sequence[float]] | None = None,
    **ranking: Any,
) -> list[Roles]:
    """Sources and owners of every group (image, or tile) as positions in the unpadded sequence.

    ``ranks`` replaces the attention by given numbers, one per patch of each image. An image without a map has none.
    """
    ids = strip(input_ids, attention_mask)
    spans = image_spans(model, ids, 0 if pixel_values is None else len(pixel_values))
    geometry = geometry_of(model, len(spans)) if geometry is None else geometry
    spots: dict[int, Spot] = {}
    score: dict[int, float] = {}
    maps: list[dict[int, float] | None]
    if ranks is None:
        maps = patch_scores(model, ids, pixel_values, diag_layers=diag_layers, geometry=geometry, **ranking)
    else:
        maps = []
        for span, tiles, values in zip(spans, geometry, ranks, strict=True):
            patches = [span[tile.first + i] for tile in tiles for i in range(tile.rows * tile.columns)]
            maps.append(dict(zip(patches, values, strict=True)))
    for image, (span, tiles, scores) in enumerate(zip(spans, geometry, maps, strict=True)):
        if scores is not None:
            spots |= spots_of(span, tiles, tile_mode, image)
            score |= scores
    groups = [*range(len(spans))] if tile_mode != "per_tile_k" else sorted({spot.group for spot in spots.values()})
    out: list[Roles] = []
    for group in ["all"] if multi_image == "pooled" and tile_mode != "per_tile_k" else groups:
        members = {p: spot for p, spot in spots.items() if group in ("all", spot.group)}
        out.append(choose_among(members, score, k_src, ownership, neighbourhood, exclude_border))
    return out


def redistribute(
    x: torch.Tensor, chosen: Sequence[Roles], lam: float, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 1 once on ``[T, D]``: add (lam - 1) x_s to the neighbours of s, then divide x_s by lam.

    With noise ``[n, D]``, neighbours from left to right get its rows, scaled to the norm of (lam - 1) x_s.
    """
    out = x.clone()
    everyone = {neighbour: source for _, owners in chosen for neighbour, source in owners.items()}
    for index, neighbour in enumerate(sorted(everyone)):
        given = (lam - 1) * x[everyone[neighbour]]
        if noise is not None:
            given = noise[index] / noise[index].norm() * given.norm()
        out[neighbour] = x[neighbour] + given
    for sources, _ in chosen:
        for source in sources:
            out[source] = x[source] / lam
    return out


def edit(chosen: Sequence[Roles], lam: float, early_layers: Collection[int], noise: Noise | None = None) -> Edit:
    """``hidden_edit`` callback: Eq. 1 on the output of every early block."""
    owned = sum(len(owners) for _, owners in chosen)

    def apply(layer: int, x: torch.Tensor) -> torch.Tensor:
        if layer not in early_layers:
            return x
        return redistribute(x, chosen, lam, None if noise is None else noise(layer, owned, x.shape[1]))

    return apply


def growth(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    chosen: Sequence[Roles],
    lam: float,
    early_layers: Collection[int],
    patches: Sequence[int],
) -> tuple[float, float]:
    """Ratio of summed norms after / before the edit, multiplied over layers: on what is touched, and on all patches."""
    touched = [p for sources, owners in chosen for p in (*sources, *owners)]
    factors = [1.0, 1.0]

    def watch(layer: int, x: torch.Tensor) -> torch.Tensor:
        after = edit(chosen, lam, early_layers)(layer, x)
        for index, places in enumerate((touched, list(patches))):
            factors[index] *= float(after[places].norm(dim=-1).sum() / x[places].norm(dim=-1).sum())
        return after

    full_forward(model, strip(input_ids, attention_mask), pixel_values, hidden_edit=watch)
    return factors[0], factors[1]


def generate(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    lam: float,
    early_layers: Collection[int],
    max_new_tokens: int,
    eos: Collection[int] = (),
    forced: Sequence[int] | None = None,
    noise: Noise | None = None,
    **choosing: Any,
) -> tuple[list[int], torch.Tensor]:
    """Both passes and greedy decoding; returns the new tokens and the raw logits ``[T_new, V]`` that chose them.

    Sources are chosen once from the prompt (``choosing``: see `roles`); the edit is repeated in every recomputation of
    the whole sequence.
    """
    ids = strip(input_ids, attention_mask)
    chosen = roles(model, ids, pixel_values, **choosing)
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        out = full_forward(model, ids, pixel_values, hidden_edit=edit(chosen, lam, early_layers, noise))
        steps.append(out.logits[-1])
        token = int(out.logits[-1].argmax()) if forced is None else forced[step]
        tokens.append(token)
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, torch.stack(steps)
