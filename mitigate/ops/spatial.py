"""Neighbourhoods on rasters of image patches: which patches lead, and who belongs to whom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mitigate.errors import UnsupportedModel
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import ImageSpan, TokenLayout

#: Leading patches, strongest first, and owned neighbour -> the leading patch it belongs to.
Roles: TypeAlias = tuple[list[int], dict[int, int]]

_SQUARE_3 = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0))
_SQUARE_5 = tuple((row, column) for row in range(-2, 3) for column in range(-2, 3) if (row, column) != (0, 0))

#: Name -> offsets ``(row, column)``: 8-connected, 4-connected, and all patches within two steps.
NEIGHBOURHOODS = {"8": _SQUARE_3, "4": ((-1, 0), (0, -1), (0, 1), (1, 0)), "radius2": _SQUARE_5}
#: How the tiles of one picture are ranked together; see `arrange`.
TILE_MODES = ("pooled", "per_tile_k", "stitched", "thumbnail_only")
#: What a patch is that is both strong and next to a stronger one; see `choose`.
OWNERSHIPS = ("topk_then_exclude", "greedy_nms")


def neighbours(place: int, grid: tuple[int, int], kind: str) -> list[int]:
    """Return the raster indices of a place's neighbours inside the grid, ascending.

    Parameters
    ----------
    place
        Raster index (row times columns plus column).
    grid
        ``(rows, columns)``.
    kind
        Key of `NEIGHBOURHOODS`.
    """
    rows, columns = grid
    row, column = divmod(place, columns)
    places = ((row + down, column + right) for down, right in NEIGHBOURHOODS[kind])
    return sorted(r * columns + c for r, c in places if 0 <= r < rows and 0 <= c < columns)


def interior(grid: tuple[int, int]) -> list[int]:
    """Return the raster indices of the places that do not lie on the border; empty when a side is below 3."""
    rows, columns = grid
    return [row * columns + column for row in range(1, rows - 1) for column in range(1, columns - 1)]


@dataclass(frozen=True)
class Raster:
    """Patches that lie side by side.

    Parameters
    ----------
    patches
        A number for each patch, row by row; two rasters share none. Any numbering does, such as columns of a sequence.
    grid
        ``(rows, columns)`` with as many places as patches.
    """

    patches: tuple[int, ...]
    grid: tuple[int, int]

    @property
    def degenerate(self) -> bool:
        """Whether a side is below 3, so that every patch lies on the border."""
        return min(self.grid) < 3


@dataclass(frozen=True)
class Tile:
    """A part of a picture that the vision tower encodes on its own.

    Parameters
    ----------
    raster
        Its patches.
    place
        ``(row, column)`` in the picture's raster of tiles, or ``None`` when it is not known.
    thumbnail
        Whether it shows the whole picture, small.
    """

    raster: Raster
    place: tuple[int, int] | None = None
    thumbnail: bool = False


def arrange(tiles: Sequence[Tile], mode: str) -> list[list[Raster]]:
    """Sort the tiles of a picture into groups of rasters; each group is ranked as one.

    Parameters
    ----------
    tiles
        All tiles of one picture; a picture that is not cut up is a single tile.
    mode
        ``pooled``: one group, every tile a raster of its own; ``per_tile_k``: every tile is a group; ``stitched``: one
        group, tiles joined to a single raster as they lie in the picture, the thumbnail apart; ``thumbnail_only``: the
        thumbnail alone.

    Raises
    ------
    UnsupportedModel
        If the tiles' places are needed and unknown or leave gaps, or there is no thumbnail.
    """
    if mode == "per_tile_k":
        return [[tile.raster] for tile in tiles]
    if mode == "pooled" or len(tiles) == 1:
        return [[tile.raster for tile in tiles]]
    thumbnails = [tile.raster for tile in tiles if tile.thumbnail]
    if mode == "stitched":
        return [[stitch([tile for tile in tiles if not tile.thumbnail]), *thumbnails]]
    if not thumbnails:
        raise UnsupportedModel("a picture has several tiles but no thumbnail; choose tile_mode=pooled")
    return [thumbnails]


def stitch(tiles: Sequence[Tile]) -> Raster:
    """Join tiles to one raster as they lie in the picture; a single one is that raster, wherever it lies.

    Raises
    ------
    UnsupportedModel
        If a tile's place is unknown, or the tiles do not fill a rectangle.
    """
    if len(tiles) == 1:
        return tiles[0].raster
    at = {tile.place: tile.raster for tile in tiles if tile.place is not None}
    downs, rights = sorted({place[0] for place in at}), sorted({place[1] for place in at})
    heights = {down: {raster.grid[0] for place, raster in at.items() if place[0] == down} for down in downs}
    widths = {right: {raster.grid[1] for place, raster in at.items() if place[1] == right} for right in rights}
    fits = all(len(sizes) == 1 for sizes in (*heights.values(), *widths.values()))
    if not fits or not len(tiles) == len(at) == len(downs) * len(rights):
        raise UnsupportedModel(
            "tiles of a picture cannot be stitched (their places are unknown or leave gaps); choose tile_mode=pooled"
        )
    patches: list[int] = []
    for down in downs:
        band = [at[down, right] for right in rights]
        for row in range(band[0].grid[0]):
            for raster in band:
                width = raster.grid[1]
                patches += raster.patches[row * width : (row + 1) * width]
    rows, columns = sum(min(sizes) for sizes in heights.values()), sum(min(sizes) for sizes in widths.values())
    return Raster(tuple(patches), (rows, columns))


def choose(
    rank: Mapping[int, float],
    rasters: Iterable[Raster],
    k: int,
    ownership: str = "topk_then_exclude",
    neighbourhood: str = "8",
    *,
    exclude_border: bool = True,
) -> Roles:
    """Choose the leading patches of a group of rasters, and which neighbours each of them owns.

    A neighbour next to several leading patches belongs to the strongest one. Rasters with a side below 3 are left out.

    Parameters
    ----------
    rank
        Strength of every patch; ties go to the lower number, and a patch that is not a number comes last.
    k
        Most leading patches; all candidates where there are fewer.
    ownership
        ``topk_then_exclude``: the ``k`` strongest lead, and none of them is owned; ``greedy_nms``: from the strongest
        down, a patch already owned can no longer lead.
    neighbourhood
        Key of `NEIGHBOURHOODS`.
    exclude_border
        Whether patches on the border may not lead; owned they may be.

    Returns
    -------
    Roles
        Leading patches, strongest first, and owned neighbour -> the patch it belongs to.
    """
    where: dict[int, tuple[Raster, int]] = {}
    for raster in rasters:
        if not raster.degenerate:
            places = interior(raster.grid) if exclude_border else range(len(raster.patches))
            where.update((raster.patches[place], (raster, place)) for place in places)
    order = sorted(where, key=lambda patch: (-rank[patch] if not math.isnan(rank[patch]) else math.inf, patch))
    leading = dict.fromkeys(order[:k]) if ownership == "topk_then_exclude" else {}
    owners: dict[int, int] = {}
    chosen: list[int] = []
    for patch in order:
        if len(chosen) == k:
            break
        if patch in owners:
            continue
        chosen.append(patch)
        leading[patch] = None
        raster, place = where[patch]
        for near in neighbours(place, raster.grid, neighbourhood):
            if raster.patches[near] not in leading:
                owners.setdefault(raster.patches[near], patch)
    return chosen, owners


@dataclass
class Picture:
    """One image of a sample, and what is known about its N patches.

    Parameters
    ----------
    place
        Request row and index of the image in the batch; of several copies of a sample (beams) the first stands for all.
    spans
        Its tiles; a single one where images are not cut up.
    columns
        ``[N]`` columns of the patches.
    rank
        ``[N]`` strength of the patches, on the CPU; ``None`` when it is not known.
    norms
        ``[N]`` norms of their hidden states, where asked for.
    """

    place: tuple[int, int]
    spans: list[ImageSpan]
    columns: Tensor
    rank: Tensor | None = None
    norms: Tensor | None = None

    @classmethod
    def all_of(cls, layout: TokenLayout, row: int) -> list[Picture]:
        """Collect a row's tiles by image."""
        spans: dict[int, list[ImageSpan]] = {}
        for span in layout.images[row]:
            spans.setdefault(span.image, []).append(span)
        return [cls((row, image), own, torch.cat([span.positions for span in own])) for image, own in spans.items()]

    def arranged(self, mode: str) -> list[list[Raster]]:
        """Return its rasters in groups that are ranked together, patches numbered by column."""
        tiles = []
        for span in self.spans:
            if span.grid is None:
                raise UnsupportedModel("image tokens that form no grid have no neighbours")
            raster = Raster(tuple(span.positions.tolist()), span.grid)
            tiles.append(Tile(raster, span.tile, span.thumbnail))
        return arrange(tiles, mode)


def patch_places(layout: TokenLayout, start: int, stop: int) -> Tensor:
    """Request row and column of every patch in columns ``start..stop-1``, ``[V, 2]``."""
    spans = [(row, span.positions) for row, own in enumerate(layout.images) for span in own]
    places = torch.cat([torch.stack((torch.full_like(columns, row), columns), 1) for row, columns in spans])
    return places[(places[:, 1] >= start) & (places[:, 1] < stop)]


@dataclass(frozen=True)
class Transfer:
    """Places of a batch that hand something to others; a place is a request row and a column.

    Parameters
    ----------
    givers
        ``[S, 2]`` places that give.
    takers
        ``[N, 2]`` places that receive, by row and column; none occurs twice, and none gives.
    giver
        ``[N]`` index into `givers`: from whom each receives.
    span
        First and last column touched.
    """

    givers: Tensor
    takers: Tensor
    giver: Tensor
    span: tuple[int, int]

    @classmethod
    def of(cls, roles: Sequence[Roles], device: torch.device) -> Transfer | None:
        """Collect what `choose` returned for every row, patches numbered by column; ``None`` if nobody gives."""
        givers = [(row, column) for row, (chosen, _) in enumerate(roles) for column in chosen]
        takers = [(row, column) for row, (_, owners) in enumerate(roles) for column in sorted(owners)]
        place = {giver: index for index, giver in enumerate(givers)}
        giver = [place[row, roles[row][1][column]] for row, column in takers]
        if not givers:
            return None
        touched = [column for _, column in givers + takers]
        return cls(
            torch.tensor(givers, device=device),
            torch.tensor(takers, device=device, dtype=torch.long).view(-1, 2),
            torch.tensor(giver, device=device, dtype=torch.long),
            (min(touched), max(touched)),
        )

    def to(self, device: torch.device) -> Transfer:
        """Return the places on the device of the states they are meant for."""
        if self.givers.device == device:
            return self
        return Transfer(self.givers.to(device), self.takers.to(device), self.giver.to(device), self.span)


def norms(states: Tensor) -> Tensor:
    """L2 norms, ``[..., D]`` -> ``[...]``, float32 at least."""
    found: Tensor = torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))
    return found


def norm_sums(states: Tensor, places: Tensor, start: int = 0) -> Tensor:
    """Sum the norms at places ``[n, 2]`` of ``[B, Q, D]`` by row, ``[B]`` on the device of the places.

    The first of the Q columns is ``start``.
    """
    row, column = places[:, 0].to(states.device), places[:, 1].to(states.device) - start
    each = norms(states[row, column]).to(places.device)
    return each.new_zeros(states.shape[0]).index_add(0, places[:, 0], each)


def noise_like(given: Tensor, draws: Sequence[tuple[int, int]], layer: int) -> Tensor:
    """Noise with the norms of what neighbours would receive, ``[N, D]``; ``draws``: every row's seed and neighbours.

    Drawn on the CPU from seed plus layer: the same in every forward that computes the image.
    """
    noise = torch.cat(
        [
            torch.randn(count, given.shape[1], generator=torch.Generator().manual_seed(seed + layer))
            for seed, count in draws
        ]
    ).to(given.device)
    scaled: Tensor = noise * (norms(given) / norms(noise))[:, None]
    return scaled.to(given.dtype)
