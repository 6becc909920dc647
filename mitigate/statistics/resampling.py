"""Random draws over images, shared by all runs of a comparison, and the column sums they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mitigate.errors import DataError
from mitigate.metrics.base import Array, ImageCounts, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

RESAMPLES = 10_000
# 8 MB of weights at a time: bounded memory, and large enough for a fast matrix product.
_CELLS_PER_CHUNK = 1_000_000


def weights(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield multinomial weights ``[chunk, images]``: how often each image was drawn in each resample."""
    rng = np.random.default_rng(seed)
    for count in _chunks(images, resamples):
        drawn = rng.integers(max(images, 1), size=(count, images))
        chunk = np.empty((count, images))
        for row in range(count):
            chunk[row] = np.bincount(drawn[row], minlength=images)
        yield chunk


def swaps(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield 0 or 1 with even odds, ``[chunk, images]``: whether an image's two runs change places."""
    rng = np.random.default_rng([seed, 1])  # another stream than the weights'
    words = -(-images // 64)
    for count in _chunks(images, resamples):
        drawn = rng.integers(2**64, size=(count, words), dtype=np.uint64).astype("<u8", copy=False)
        yield np.unpackbits(drawn.view(np.uint8), axis=1, count=images).astype(np.float64)


def _chunks(images: int, resamples: int) -> Iterator[int]:
    chunk = max(1, _CELLS_PER_CHUNK // max(images, 1))
    for start in range(0, resamples, chunk):
        yield min(chunk, resamples - start)


def sums(draws: Iterable[Array], tables: Sequence[Array]) -> list[Array]:
    """Return ``draws @ table`` for every table, ``[resamples, columns]``, without holding all draws at once.

    Columns of zeros cost nothing: most stacks leave most counts alone.
    """
    if not tables:
        return []
    used = [np.flatnonzero(table.any(axis=0)) for table in tables]
    joined = np.concatenate([table[:, columns] for table, columns in zip(tables, used, strict=True)], axis=1)
    total = np.concatenate([chunk @ joined for chunk in draws])
    result, start = [], 0
    for table, columns in zip(tables, used, strict=True):
        part = np.zeros((len(total), table.shape[1]))
        part[:, columns] = total[:, start : start + len(columns)]
        result.append(part)
        start += len(columns)
    return result


@dataclass(frozen=True)
class Tables:
    """Counts of runs over the same images, side by side.

    Parameters
    ----------
    first
        ``[images, columns]`` of the first run, images in the order of their names.
    changes
        What is added to ``first`` to get each other run. Where a run counts the same, the change is exactly zero in
        every resample, whatever rounding does to the sums.
    where
        Metric name -> its columns.
    """

    first: Array
    changes: list[Array]
    where: Mapping[str, list[int]]

    def images(self, metric: Metric, run: int | None = None) -> tuple[int, int]:
        """Return how many images count for a metric (in the first run or the other), and how many differ."""
        columns = self.where[metric.name]
        counted, change = self.first[:, columns] != 0, np.zeros_like(self.first[:, columns])
        if run is not None:
            change = self.changes[run][:, columns]
            counted |= change != 0
        return int(counted.any(axis=1).sum()), int(change.any(axis=1).sum())


def tables(first: ImageCounts, others: Sequence[ImageCounts], metrics: Sequence[Metric]) -> Tables:
    """Put runs side by side.

    Raises
    ------
    DataError
        If an image occurs in one run only, or a metric's column is missing.
    """
    names = list(dict.fromkeys(column for metric in metrics for column in metric.columns))
    users = {column: f"metric {metric.name!r}" for metric in reversed(metrics) for column in metric.columns}
    for run in (first, *others):
        for column in names:
            run.stack([column], users[column])
    base = _rows(first, names)
    changes = []
    for other in others:
        require_same(first.images, dict.fromkeys(other.images), "image")
        changes.append(_rows(other, names) - base)
    return Tables(base, changes, {m.name: [names.index(column) for column in m.columns] for m in metrics})


def _rows(run: ImageCounts, names: Sequence[str]) -> Array:
    return run.stack(names, "the bootstrap")[by_name(run)]


def by_name(run: ImageCounts) -> NDArray[np.intp]:
    """Return the rows of the images in the order of their names, so that draws do not depend on the run's order."""
    return np.argsort(np.array(run.images, dtype=str), kind="stable")


def require_same(first: Sequence[str], second: Mapping[str, object], what: str) -> None:
    """Refuse two runs of which one lacks something the other has.

    Raises
    ------
    DataError
        Naming the first thing missing.
    """
    known = set(first)
    for missing, side in (
        (next((key for key in first if key not in second), None), "second"),
        (next((key for key in second if key not in known), None), "first"),
    ):
        if missing is not None:
            raise DataError(
                f"the two runs cannot be paired: {what} {missing!r} is missing in the {side} one; "
                "finish both on the same benchmark"
            )
