"""Where objects are among the image tokens: boxes against the raster of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mitigate.metrics.base import Array

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.benchmarks.base import Box
    from mitigate.core.layout import ImageSpan


def whole_raster(spans: Sequence[ImageSpan], pictures: Sequence[Image]) -> ImageSpan | None:
    """Return the raster that shows a sample's picture as a whole, or ``None``.

    Only one square picture in one raster will do: processors may crop others, and boxes would be in the wrong place.
    """
    if len(spans) != 1 or len(pictures) != 1 or spans[0].grid is None:
        return None
    return spans[0] if pictures[0].width == pictures[0].height else None


def coverage(boxes: Sequence[Box], grid: tuple[int, int]) -> Array:
    """Return the share of each patch that lies in a box, ``[rows * columns]``; of overlapping boxes the largest."""
    rows, columns = grid
    covered = np.zeros((rows, columns))
    for left, top, right, bottom in boxes:
        down, across = _overlap(top, bottom, rows), _overlap(left, right, columns)
        covered = np.maximum(covered, down[:, None] * across[None, :])
    flat: Array = covered.ravel()
    return flat


def _overlap(start: float, stop: float, cells: int) -> Array:
    """Return the share of each of ``cells`` equal parts of 0..1 that lies in ``start..stop``."""
    edges = np.arange(cells + 1) / cells
    shared: Array = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0.0, None) * cells
    return shared
