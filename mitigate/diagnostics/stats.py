"""Estimates over tokens that come in clusters: every interval resamples images, since tokens of one are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mitigate.diagnostics.base import Estimate
from mitigate.metrics.base import Array, divide
from mitigate.statistics import bootstrap

RESAMPLES = 2000
_Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def clusters(images: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the images' names, sorted, and the index of each observation's image."""
    names, index = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    return names.tolist(), index.astype(np.int64)


def mean(values: ArrayLike, images: Sequence[str], *, n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return the mean of the defined values."""
    numbers, images = _defined(values, images)
    names, index = clusters(images)
    table = _sums(index, len(names), [np.ones_like(numbers), numbers])
    found = bootstrap(names, lambda weights: _ratio(weights @ table), n, seed)
    return Estimate(found.value, found.low, found.high, len(numbers))


def difference(
    first: ArrayLike,
    first_images: Sequence[str],
    second: ArrayLike,
    second_images: Sequence[str],
    *,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return mean(second) - mean(first) with p-value; both sides resample the same images."""
    (one, one_images), (two, two_images) = _defined(first, first_images), _defined(second, second_images)
    names, index = clusters([*one_images, *two_images])
    left = _sums(index[: len(one)], len(names), [np.ones_like(one), one])
    right = _sums(index[len(one) :], len(names), [np.ones_like(two), two])
    found = bootstrap(names, lambda weights: _ratio(weights @ right) - _ratio(weights @ left), n, seed)
    return Estimate(found.value, found.low, found.high, len(one) + len(two), found.p)


def pearson(x: ArrayLike, y: ArrayLike, images: Sequence[str], *, n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return Pearson's r with a clustered interval and p-value; with a binary ``y`` it is the point-biserial r."""
    one, two = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = ~(np.isnan(one) | np.isnan(two))
    one, two, images = one[known], two[known], np.asarray(images, dtype=str)[known].tolist()
    names, index = clusters(images)
    if one.size:  # centred and scaled: the sums of squares must not drown the differences
        one, two = (part - part.mean() for part in (one, two))
        one, two = (part / (part.std() or 1.0) for part in (one, two))
    parts = [np.ones_like(one), one, two, one * one, two * two, one * two]
    table = _sums(index, len(names), parts)
    found = bootstrap(names, lambda weights: _correlation(weights @ table), n, seed)
    return Estimate(found.value, found.low, found.high, len(one), found.p)


def auroc(
    scores: ArrayLike, positive: ArrayLike, images: Sequence[str], *, n: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return the probability that a positive scores higher than a negative (ties count half); tested against 0.5."""
    numbers, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    known = ~np.isnan(numbers)
    numbers, wanted = numbers[known], wanted[known]
    names, index = clusters(np.asarray(images, dtype=str)[known].tolist())
    wins = np.zeros((len(names), len(names)))
    for image in range(len(names)):
        rivals = np.sort(numbers[~wanted & (index == image)])
        if rivals.size:
            below = np.searchsorted(rivals, numbers[wanted], "left") + np.searchsorted(rivals, numbers[wanted], "right")
            wins[:, image] = np.bincount(index[wanted], weights=below / 2, minlength=len(names))
    sides = _sums(index, len(names), [wanted.astype(float), (~wanted).astype(float)])

    def area(weights: Array) -> Array:
        pairs = weights @ sides
        return divide(((weights @ wins) * weights).sum(1), pairs[:, 0] * pairs[:, 1])

    found = bootstrap(names, area, n, seed, null=0.5)
    return Estimate(found.value, found.low, found.high, len(numbers), found.p)


def wilson(successes: int, n: int) -> Estimate:
    """Return a proportion with Wilson's 95 % interval; it takes observations as independent."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def equal_bins(x: ArrayLike, bins: int) -> list[NDArray[np.int64]]:
    """Cut observations, sorted by x, into bins of equal count (or one more): their indices."""
    order = np.argsort(np.asarray(x, dtype=np.float64), kind="stable")
    return [part for part in np.array_split(order, max(1, min(bins, len(order)))) if part.size]


def correlation_p(r: float, n: int) -> float:
    """Return the two-sided p-value of Pearson's r over n independent pairs (Student's t with n - 2 degrees)."""
    if n < 3 or math.isnan(r):
        return math.nan
    if abs(r) >= 1.0:
        return 0.0
    freedom = n - 2
    return _incomplete_beta(freedom / 2, 0.5, 1.0 - r * r)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * value


def matrix(rows: Sequence[Any], name: str) -> Array:
    """Return a per-layer measure of token rows, ``[rows, layers]``; undefined numbers are NaN."""
    return np.array([[np.nan if v is None else v for v in row.measures[name]] for row in rows], dtype=np.float64)


def seeing(rows: Sequence[Any], *names: str) -> tuple[list[Any], list[str]]:
    """Return the token rows whose per-layer measures are all known, and a sentence about the others where there are."""
    known = [row for row in rows if not any(np.isnan(matrix([row], name)).any() for name in names)]
    lost = len(rows) - len(known)
    why = f"{lost} words do not count: in some layers they see nothing of a picture (a sliding window, or none came)."
    return known, [why] if lost else []


def _defined(values: ArrayLike, images: Sequence[str]) -> tuple[Array, list[str]]:
    numbers = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(numbers)
    return numbers[known], np.asarray(images, dtype=str)[known].tolist()


def _sums(index: NDArray[np.int64], images: int, columns: Sequence[Array]) -> Array:
    """Sum columns per image, ``[images, columns]``."""
    return np.stack([np.bincount(index, weights=column, minlength=images) for column in columns], axis=-1)


def _ratio(sums: Array) -> Array:
    return divide(sums[:, 1], sums[:, 0])


def _correlation(sums: Array) -> Array:
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.clip(count * xx - x * x, 0.0, None) * np.clip(count * yy - y * y, 0.0, None)
    return divide(count * xy - x * y, np.where(spread > 1e-18 * count**4, np.sqrt(spread), 0.0))
