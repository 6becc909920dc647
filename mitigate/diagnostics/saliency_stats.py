"""Statistics of the saliency diagnostic that others do not need: ranks, precision-recall, controlled effects."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mitigate.diagnostics.base import Estimate
from mitigate.diagnostics.stats import RESAMPLES, clusters, difference
from mitigate.metrics.base import Array, divide
from mitigate.statistics import bootstrap

_STEPS = 25


def ranks(values: ArrayLike) -> Array:
    """Return ranks from 1, ties sharing their mean."""
    numbers = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation; NaN where one side does not vary."""
    one, two = ranks(x), ranks(y)
    if len(one) < 2 or one.std() == 0 or two.std() == 0:
        return math.nan
    return float(np.corrcoef(one, two)[0, 1])


def mann_whitney(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Return U of the first sample and its two-sided p-value (normal approximation, corrected for ties and steps)."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    n, m = len(one), len(two)
    if not n or not m:
        return math.nan, math.nan
    joined = np.concatenate([one, two])
    u = float(ranks(joined)[:n].sum() - n * (n + 1) / 2)
    _, counts = np.unique(joined, return_counts=True)
    total = n + m
    ties = float((counts**3 - counts).sum()) / (total * (total - 1)) if total > 1 else 0.0
    spread = math.sqrt(n * m / 12 * (total + 1 - ties)) if total + 1 > ties else 0.0
    if spread == 0.0:
        return u, math.nan
    z = (abs(u - n * m / 2) - 0.5) / spread
    return u, min(1.0, math.erfc(z / math.sqrt(2)))


def cohens_d(first: ArrayLike, second: ArrayLike) -> float:
    """Return (mean of second - mean of first) in pooled standard deviations."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(one) < 2 or len(two) < 2:
        return math.nan
    pooled = ((len(one) - 1) * one.var(ddof=1) + (len(two) - 1) * two.var(ddof=1)) / (len(one) + len(two) - 2)
    return float((two.mean() - one.mean()) / math.sqrt(pooled)) if pooled > 0 else math.nan


def auprc(
    scores: ArrayLike, positive: ArrayLike, images: Sequence[str], *, n: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return average precision (area under the precision-recall curve) with an interval clustered by image."""
    numbers, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.float64)
    known = ~np.isnan(numbers)
    numbers, wanted = numbers[known], wanted[known]
    names, index = clusters(np.asarray(images, dtype=str)[known].tolist())
    order = np.argsort(-numbers, kind="stable")
    last = np.append(numbers[order][1:] != numbers[order][:-1], True) if len(order) else np.zeros(0, bool)

    def precision(weights: Array) -> Array:
        drawn = weights[:, index[order]]
        hits = np.cumsum(drawn * wanted[order], 1)[:, last]
        total = np.cumsum(drawn, 1)[:, last]
        gained = np.diff(hits, axis=1, prepend=0.0)
        part = np.where(gained > 0, gained * divide(hits, total), 0.0)
        return divide(part.sum(1), (drawn * wanted[order]).sum(1))

    found = bootstrap(names, precision, n, seed)
    return Estimate(found.value, found.low, found.high, len(numbers))


def logistic(x: Array, y: Array, weights: Array) -> Array:
    """Fit weighted logistic regressions by Newton steps.

    Parameters
    ----------
    x
        ``[n, c]`` columns, the constant among them.
    y
        ``[n]`` 0 or 1.
    weights
        ``[m, n]`` one fit per row.

    Returns
    -------
    Array
        ``[m, c]`` coefficients; NaN where a fit has one outcome only or does not settle (separated data).
    """
    columns = x.shape[1]
    products = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    found: Array = np.zeros((len(weights), columns))
    step: Array = np.full_like(found, np.inf)
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(found @ x.T, -30.0, 30.0)))
        slope = (weights * (y - p)) @ x
        curve = ((weights * p * (1.0 - p)) @ products).reshape(-1, columns, columns)
        step = np.asarray(np.linalg.solve(curve + 1e-9 * np.eye(columns), slope[..., None])[..., 0], np.float64)
        found += np.clip(step, -5.0, 5.0)
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    outcomes = weights @ np.stack([y, 1.0 - y], 1)
    found[(np.abs(step).max(1, initial=0.0) > 1e-6) | (outcomes <= 0).any(1)] = np.nan
    return found


def controlled(
    score: ArrayLike,
    positive: ArrayLike,
    controls: Sequence[ArrayLike],
    images: Sequence[str],
    *,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the log odds of a positive per standard deviation of the score, others held fixed; tested against 0."""
    y = np.asarray(positive, dtype=np.float64)
    parts = [np.asarray(part, dtype=np.float64) for part in (score, *controls)]
    varied = [parts[0], *(part for part in parts[1:] if part.std() > 0)]
    names, index = clusters(images)
    if not len(y) or parts[0].std() == 0 or y.min() == y.max():
        return Estimate(math.nan, math.nan, math.nan, len(y))
    x = np.stack([np.ones_like(y), *((part - part.mean()) / part.std() for part in varied)], 1)
    found = bootstrap(names, lambda weights: logistic(x, y, weights[:, index])[:, 1], n, seed)
    return Estimate(found.value, found.low, found.high, len(y), found.p)


def matched_pairs(
    score: ArrayLike,
    positive: ArrayLike,
    position: ArrayLike,
    images: Sequence[str],
    *,
    reach: int = 2,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the mean score of positives minus that of negatives at the same place in their replies.

    Every positive is paired with the unused negative nearest in position, at most ``reach`` away, the earliest first;
    positives without such a partner are left out. Both of a pair are resampled with the images they belong to.
    """
    numbers, places = np.asarray(score, dtype=np.float64), np.asarray(position, dtype=np.float64)
    wanted = np.asarray(positive, dtype=bool)
    free = np.flatnonzero(~wanted)
    left, right = [], []
    for index in sorted(np.flatnonzero(wanted), key=lambda item: (places[item], item)):
        if not free.size:
            break
        nearest = int(np.abs(places[free] - places[index]).argmin())
        if abs(places[free[nearest]] - places[index]) <= reach:
            left.append(int(free[nearest]))
            right.append(int(index))
            free = np.delete(free, nearest)
    names = np.asarray(images, dtype=str)
    return difference(numbers[left], names[left].tolist(), numbers[right], names[right].tolist(), n=n, seed=seed)
