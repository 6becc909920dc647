"""Several seeds of one stack."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mitigate.errors import DataError
from mitigate.metrics.base import ImageCounts, Metric, values
from mitigate.statistics.resampling import by_name, require_same

if TYPE_CHECKING:
    from collections.abc import Sequence


def pool(runs: Sequence[ImageCounts]) -> ImageCounts:
    """Average the counts of several seeds per image.

    Images stay the clusters. An interval of pooled counts says how the *average over these seeds* would vary with other
    images; what another seed would change is not in it and stands in `seed_spread`.

    Raises
    ------
    DataError
        If there is no run, an image occurs in some runs only (the message names the first one), or columns differ.
    """
    if not runs:
        raise DataError("there is no run to pool")
    first = runs[0]
    for run in runs[1:]:
        require_same(first.images, dict.fromkeys(run.images), "image")
        if different := sorted(set(first.columns) ^ set(run.columns)):
            raise DataError(f"runs cannot be pooled: count column {different[0]!r} is missing in one of them")
    names = tuple(sorted(first.images))
    rows = [by_name(run) for run in runs]
    return ImageCounts(
        names,
        {
            column: np.mean([run.columns[column][order] for run, order in zip(runs, rows, strict=True)], axis=0)
            for column in first.columns
        },
    )


def seed_spread(runs: Sequence[ImageCounts], metrics: Sequence[Metric]) -> dict[str, float]:
    """Return every metric's standard deviation over seeds; NaN for fewer than two runs.

    Raises
    ------
    DataError
        If a metric's column is missing.
    """
    found = [values(run, metrics) for run in runs]
    return {
        metric.name: float(np.std([each[metric.name] for each in found], ddof=1)) if len(found) > 1 else math.nan
        for metric in metrics
    }
