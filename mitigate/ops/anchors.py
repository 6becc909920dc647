"""Anchors among image tokens: which of them gain attention from early to middle layers.

Shapes: B rows of the batch, H heads, G groups of image tokens, R query rows, W columns. Maps are ``[B, G, R, W]`` and
zero outside their group's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mitigate.lazy import torch
from mitigate.ops.similarity import bhattacharyya, head_weights, pooled, restricted, top

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import ImageSpan
    from mitigate.ops.depth import Windows
    from mitigate.ops.rows import OwnRows


@dataclass(frozen=True)
class Maps:
    """What lower layers say about the image tokens; every field ``[B, G, R, W]``.

    Parameters
    ----------
    columns
        bool, the image tokens of the group that the row can see.
    noise, middle
        Mean early and middle map.
    anchors, penalty
        Scores in [0, 1] of the tokens to favour and to weaken.
    """

    columns: Tensor
    noise: Tensor
    middle: Tensor
    anchors: Tensor
    penalty: Tensor

    def each(self, change: Callable[..., Tensor], *others: Maps) -> Maps:
        """Apply a function field by field."""
        names = [each.name for each in dataclasses.fields(self)]
        return Maps(*(change(*(getattr(maps, name) for maps in (self, *others))) for name in names))

    def to(self, device: torch.device) -> Maps:
        """Bring the maps to another device."""
        return self.each(lambda field: field.to(device))

    def within(self, own: OwnRows, unseen: Tensor | None) -> Maps:
        """Return the maps on the rows' device, without the tokens that they cannot see in a layer.

        Parameters
        ----------
        own
            The R rows.
        unseen
            ``[B, 1, R', K]`` bool, as the event of the layer has it.
        """
        here = self.to(own.asked.device)
        if unseen is None:
            return here
        seen = ~own.of(unseen)[..., : self.columns.shape[-1]]
        return here.each(lambda field: field * seen)


@dataclass(kw_only=True)
class Reading:
    """Collects the maps of one forward's early and middle layers.

    Parameters
    ----------
    columns
        As in `Maps`.
    windows
        Layers of each part.
    pool, top_heads
        As in `similarity.head_weights`.
    normalise
        Whether maps are normalised over the columns.
    head_share
        After the early window only this share of the heads counts, those least like the noise; ``None``: all.
    noise_from
        Makes the noise map from the mean early one (``early``), once, when the early window has passed.
    dtype
        Of the maps.

    Attributes
    ----------
    rise
        Mean increment so far between layers in which the row sees the group.
    noise
        What ``noise_from`` made.
    """

    columns: Tensor
    windows: Windows
    pool: str
    top_heads: float
    normalise: bool
    head_share: float | None
    noise_from: Callable[[Reading], Tensor]
    dtype: torch.dtype
    noise: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rise = self.previous = torch.zeros_like(self.columns, dtype=self.dtype)
        self._sums = [self.rise, self.rise]  # early, middle
        self._counts = [self.rise[..., :1], self.rise[..., :1]]

    @property
    def early(self) -> Tensor:
        """Mean of the early maps so far, over the layers in which the row sees the group."""
        return self._sums[0] / self._counts[0].clamp_min(1.0)

    @property
    def middle(self) -> Tensor:
        """Mean of the middle maps so far, likewise."""
        return self._sums[1] / self._counts[1].clamp_min(1.0)

    @property
    def known(self) -> Tensor:
        """Columns of groups that were seen both in early and in middle layers, ``[B, G, R, W]``."""
        return self.columns & (self._counts[0] > 0) & (self._counts[1] > 0)

    def add(self, layer: int, probs: Tensor) -> None:
        """Read the weights ``[B, H, R, K]`` of the next layer."""
        windows, columns = self.windows, self.columns.to(probs.device).unsqueeze(1)
        shares, mass = restricted(probs[..., : columns.shape[-1]].unsqueeze(2), columns)
        weights = head_weights(mass, self.pool, self.top_heads)
        if layer > windows.early[-1]:
            if not hasattr(self, "noise"):
                self.noise = self.noise_from(self)
            if self.head_share is not None:
                weights = weights * self._unlike_noise(shares, weights)
        maps = pooled(shares if self.normalise else shares * mass.unsqueeze(-1), weights).to(self.rise.device)
        seen = (mass.amax(1) > 0).unsqueeze(-1).to(self.rise.device)  # not so where a sliding window has let it go
        if layer > windows.early[-1]:
            step = (maps - self.previous).relu() / (windows.mid[-1] - windows.early[-1])
            self.rise = self.rise + torch.where(seen, step, 0.0)
        self.previous = torch.where(seen, maps, self.previous)
        for place, window in enumerate((windows.early, windows.mid)):
            if layer in window:
                self._sums[place] = self._sums[place] + maps
                self._counts[place] = self._counts[place] + seen

    def _unlike_noise(self, shares: Tensor, weights: Tensor) -> Tensor:
        """Mark the heads whose maps are least like the noise, ``[B, H, G, R]``."""
        noise = restricted(self.noise, self.columns)[0].to(shares.device)
        unlike = torch.where(weights > 0, 1.0 - bhattacharyya(shares, noise.unsqueeze(1)), -1.0).movedim(1, -1)
        count = max(1, round((self.head_share or 0.0) * unlike.shape[-1]))
        return top(unlike, count).movedim(-1, 1).to(weights.dtype)


def column_groups(images: Sequence[Sequence[ImageSpan]], width: int, unit: str, like: Tensor) -> Tensor | None:
    """Mark the patches of every group, ``[B, G, W]`` bool on the device of ``like``; ``None`` without any image.

    Parameters
    ----------
    images
        Per row of the batch its spans; patches are their ``positions``, not separators or class tokens.
    width
        Columns W; later positions are left out.
    unit
        ``pooled`` (one group), ``per_image`` or ``per_tile`` (every span).
    """
    groups: list[list[list[ImageSpan]]] = []
    for spans in images:
        found: dict[int, list[ImageSpan]] = {}
        for index, span in enumerate(spans):
            found.setdefault({"pooled": 0, "per_image": span.image}.get(unit, index), []).append(span)
        groups.append(list(found.values()))
    count = max(len(members) for members in groups)
    if not count:
        return None
    marks = torch.zeros(len(groups), count, width, dtype=torch.bool, device=like.device)
    for row, members in enumerate(groups):
        for index, group in enumerate(members):
            columns = torch.cat([span.positions for span in group]).to(like.device)
            marks[row, index, columns[columns < width]] = True
    return marks


def mean_over_images(maps: Tensor, columns: Tensor, images: Sequence[Sequence[ImageSpan]]) -> Tensor:
    """Replace every image's map by the mean over the sample's images; each image keeps the mass it had.

    Other images are brought to an image's grid by the nearest patch (by relative place; in raster order where one has
    no grid). Images without mass do not take part.

    Parameters
    ----------
    maps, columns
        ``[B, G, R, W]``, and their groups' columns as bool.
    images
        Per row of the batch its spans.
    """
    flat = maps.sum(1)
    mixed = flat.clone()
    for row, spans in enumerate(images):
        whole = [span for span in spans if int(span.positions.max()) < flat.shape[-1]]
        if len(whole) < 2:
            continue
        places = [span.positions.to(flat.device) for span in whole]
        own = [flat[row][:, place] for place in places]  # [R, N]
        masses = [part.sum(-1, keepdim=True) for part in own]
        for target, place, mass in zip(whole, places, masses, strict=True):
            total = torch.zeros_like(flat[row][:, place])
            for source, part, other in zip(whole, own, masses, strict=True):
                nearest = torch.tensor(nearest_patches(source, target), device=flat.device)
                total = total + torch.where(other > 0, part / other.clamp_min(_tiny(flat)), 0.0)[:, nearest]
            mixed[row, :, place] = mass * total / total.sum(-1, keepdim=True).clamp_min(_tiny(flat))
    return torch.where(columns, mixed.unsqueeze(1), 0.0)


def nearest_patches(source: ImageSpan, target: ImageSpan) -> list[int]:
    """Return for every patch of ``target`` the raster index of the patch of ``source`` at the same relative place."""
    wide = (1, len(source.positions)), (1, len(target.positions))
    (rows, columns), (high, broad) = (source.grid, target.grid) if source.grid and target.grid else wide
    down = [(2 * row + 1) * rows // (2 * high) for row in range(high)]
    right = [(2 * column + 1) * columns // (2 * broad) for column in range(broad)]
    return [row * columns + column for row in down for column in right]


def anchor_maps(
    noise: Tensor,
    middle: Tensor,
    rise: Tensor,
    columns: Tensor,
    *,
    mode: str,
    gamma: float,
    share: float | None,
    least: int,
    shared: str,
) -> Maps:
    """Turn the mean early map, the mean middle map and the mean rise into anchors and noise scores.

    Parameters
    ----------
    noise, middle, rise, columns
        ``[B, G, R, W]``.
    mode, gamma
        See `anchor_scores`.
    share, least
        See `keep_anchors`.
    shared
        See `noise_penalty`.
    """
    anchors = keep_anchors(anchor_scores(noise, middle, rise, mode, gamma), columns, share, least)
    penalty = torch.where(columns, noise_penalty(noise, middle, anchors, shared), 0.0)
    return Maps(columns, noise, middle, anchors, penalty)


def anchor_scores(noise: Tensor, middle: Tensor, rise: Tensor, mode: str, gamma: float) -> Tensor:
    """Score tokens before the cut: relu(m - gamma n), the mean rise d, or their product."""
    if mode == "dynamics":
        return rise
    contrast = (middle - gamma * noise).relu()
    return contrast * rise if mode == "product" else contrast


def keep_anchors(scores: Tensor, columns: Tensor, share: float | None, least: int) -> Tensor:
    """Keep the best tokens of each map and divide by the maximum.

    Parameters
    ----------
    scores
        ``[..., W]``, not negative.
    columns
        ``[..., W]`` bool, the map's tokens.
    share, least
        ``round(share * N)`` tokens stay, at least ``least``, and only those that score; ``None`` keeps all.
    """
    if share is not None:
        count = (columns.sum(-1).double() * share).round().long().clamp_min(least)
        scores = torch.where(top(scores, count), scores, 0.0)
    return _to_one(torch.where(columns, scores, 0.0))


def noise_penalty(noise: Tensor, middle: Tensor, anchors: Tensor, shared: str) -> Tensor:
    """relu(n - m) divided by its maximum; zero on anchors unless ``shared`` is ``suppress``."""
    penalty = _to_one((noise - middle).relu())
    return penalty if shared == "suppress" else torch.where(anchors > 0, 0.0, penalty)


def _to_one(values: Tensor) -> Tensor:
    """Divide by the maximum along the last axis; zeros stay."""
    return values / values.amax(-1, keepdim=True).clamp_min(_tiny(values))


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
