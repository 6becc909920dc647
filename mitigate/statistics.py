"""How sure a number is: paired bootstrap over images, exact McNemar, Holm.

Samples of one image are not independent, so images are resampled, not samples; a comparison of two stacks resamples
the same images for both. All draws come from one seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mitigate.errors import DataError
from mitigate.metrics.base import Array, ImageCounts, Interval, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

RESAMPLES = 10_000
_CELLS_PER_CHUNK = 2_000_000


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference (second minus first) with its interval and two-sided bootstrap p-value.

    Parameters
    ----------
    p
        Twice the smaller share of resamples on either side of zero (ties count for both), 1 if nothing differs.
    """

    p: float = float("nan")


@dataclass(frozen=True)
class McNemar:
    """Discordant pairs of two runs over the same yes/no outcomes, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def _weights(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield multinomial weights ``[chunk, images]``: how often each image was drawn in each resample."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS_PER_CHUNK // max(images, 1))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = rng.integers(max(images, 1), size=(count, images)) + np.arange(count)[:, None] * images
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def _resample(runs: Sequence[ImageCounts], metrics: Sequence[Metric], n: int, seed: int) -> list[dict[str, Array]]:
    """Evaluate the metrics in ``n`` resamples shared by all runs: metric name -> ``[n]`` for each run."""
    names = list(dict.fromkeys(column for metric in metrics for column in metric.columns))
    where = {metric.name: [names.index(column) for column in metric.columns] for metric in metrics}
    users = {column: f"metric {metric.name!r}" for metric in reversed(metrics) for column in metric.columns}
    for column in names:
        for run in runs:
            run.stack([column], users[column])
    tables = [run.stack(names, "the bootstrap") for run in runs]
    sums: list[list[Array]] = [[] for _ in runs]
    for weights in _weights(len(runs[0].images), n, seed):
        for table, parts in zip(tables, sums, strict=True):
            parts.append(weights @ table)
    joined = [np.concatenate(parts) for parts in sums]
    return [{metric.name: metric.compute(total[:, where[metric.name]]) for metric in metrics} for total in joined]


def _percentiles(draws: Array, level: float) -> tuple[float, float, float]:
    """Return low, high and the share of undefined draws."""
    defined = draws[~np.isnan(draws)]
    if not defined.size:
        return float("nan"), float("nan"), 1.0
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), 1.0 - defined.size / draws.size


def _check(n: int, level: float) -> None:
    if n < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"a bootstrap needs n >= 1 and 0 < level < 1, but got n={n}, level={level}")


def intervals(
    counts: ImageCounts, metrics: Sequence[Metric], n: int = RESAMPLES, seed: int = 0, *, level: float = 0.95
) -> dict[str, Interval]:
    """Return every metric's value and percentile interval.

    Parameters
    ----------
    counts
        Per-image counts of one run.
    metrics
        What to compute.
    n
        Number of resamples of the images.
    seed
        Seed of the resampling.
    level
        Coverage of the interval, in 0..1.

    Raises
    ------
    DataError
        If a metric's column is missing.
    """
    _check(n, level)
    (draws,) = _resample([counts], metrics, n, seed)
    result = {}
    for metric in metrics:
        value = float(metric.compute(counts.matrix(metric).sum(axis=0)))
        low, high, undefined = _percentiles(draws[metric.name], level)
        result[metric.name] = Interval(value, low, high, undefined)
    return result


def bootstrap(
    images: Sequence[str],
    statistic: Callable[[Array], Array],
    n: int = RESAMPLES,
    seed: int = 0,
    *,
    null: float = 0.0,
    level: float = 0.95,
) -> Difference:
    """Return any statistic with its percentile interval and its two-sided p-value against ``null``.

    Parameters
    ----------
    images
        The clusters, one name each.
    statistic
        ``[m, len(images)]`` weights (how often each image was drawn) -> ``[m]`` values; NaN where undefined. It is
        called with all weights 1 for the value itself.
    n, seed, level
        As for `intervals`.
    null
        The value if there were nothing to find, such as 0.5 for the area under an ROC curve.
    """
    _check(n, level)
    value = float(statistic(np.ones((1, len(images))))[0]) if images else float("nan")
    if not images:
        return Difference(value, float("nan"), float("nan"), 1.0)
    draws = np.concatenate([statistic(weights) for weights in _weights(len(images), n, seed)])
    low, high, undefined = _percentiles(draws, level)
    return Difference(value, low, high, undefined, _two_sided(draws - null))


def paired_differences(
    first: ImageCounts,
    second: ImageCounts,
    metrics: Sequence[Metric],
    n: int = RESAMPLES,
    seed: int = 0,
    *,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Return second minus first for every metric, with the same resampled images on both sides.

    Parameters
    ----------
    first, second
        Counts of two runs over the same images, such as a baseline and a stack.
    metrics, n, seed, level
        As for `intervals`.

    Raises
    ------
    DataError
        If an image occurs in one run only (the message names the first one), or a metric's column is missing.
    """
    _check(n, level)
    second = _aligned(first, second)
    before, after = _resample([first, second], metrics, n, seed)
    result = {}
    for metric in metrics:
        draws = after[metric.name] - before[metric.name]
        ends = [metric.compute(run.matrix(metric).sum(axis=0)) for run in (first, second)]
        low, high, undefined = _percentiles(draws, level)
        result[metric.name] = Difference(float(ends[1] - ends[0]), low, high, undefined, _two_sided(draws))
    return result


def pool(runs: Sequence[ImageCounts]) -> ImageCounts:
    """Sum the counts of several runs over the same images, such as one stack with several seeds.

    Raises
    ------
    DataError
        If an image occurs in one run only.
    """
    first = runs[0]
    others = [_aligned(first, run) for run in runs[1:]]
    columns = {
        name: np.sum([column, *(run.columns[name] for run in others)], axis=0) for name, column in first.columns.items()
    }
    return ImageCounts(first.images, columns)


def _two_sided(draws: Array) -> float:
    defined = draws[~np.isnan(draws)]
    if not defined.size:
        return float("nan")
    # The observed data counts as one more resample, so that no finite number of draws claims p = 0.
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (defined.size + 1))


def _aligned(first: ImageCounts, second: ImageCounts) -> ImageCounts:
    """Return ``second`` with its images in the order of ``first``."""
    if first.images == second.images:
        return second
    position = {image: index for index, image in enumerate(second.images)}
    _require_same(first.images, position, "image")
    order = [position[image] for image in first.images]
    return ImageCounts(first.images, {name: column[order] for name, column in second.columns.items()})


def _require_same(first: Sequence[str], second: Mapping[str, object], what: str) -> None:
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


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> McNemar:
    """Compare right/wrong outcomes of two runs by sample id, exactly (two-sided binomial over discordant pairs).

    The test takes samples as independent, which several questions about one image are not: read it beside the
    clustered bootstrap, not instead of it.

    Raises
    ------
    DataError
        If a sample occurs in one run only.
    """
    _require_same(list(first), second, "sample")
    only_first = sum(first[key] and not second[key] for key in first)
    only_second = sum(second[key] and not first[key] for key in first)
    return McNemar(only_first, only_second, mcnemar_p(only_first, only_second))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test; 1 without discordant pairs."""
    total = only_first + only_second
    # Integers throughout: exact for any number of pairs, only the last division rounds. Twice the tail exceeds 1 when
    # both sides are equal, because the middle term then counts twice.
    term, tail = 1, 0
    for count in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (total - count) // (count + 1)
    share: float = 2 * tail / 2**total
    return min(1.0, share)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing several hypotheses at once (Holm's step-down), in the order given.

    An undefined (NaN) p-value stays undefined and does not count as a test.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    adjusted = [float("nan")] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[index] = running
    return adjusted
