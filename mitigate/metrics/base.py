"""What a metric is: columns of counts per image, and a vectorised function of their sums.

Everything a metric needs is summed per image first. A bootstrap resample of images is then a vector of weights times
the column matrix, and every metric, linear or not, is one array expression over all resamples at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from mitigate.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval.

    Parameters
    ----------
    value, low, high
        In the metric's own unit (rates in 0..1); NaN where the metric is undefined.
    undefined
        Share of the resamples in which the metric was undefined; ``low`` and ``high`` come from the others.
    """

    value: float
    low: float
    high: float
    undefined: float = 0.0

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; never so for an undefined one."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number computed from sums of per-image counts.

    Parameters
    ----------
    name
        Such as ``chair_i`` or ``pope/adversarial/f1``; unique within a benchmark.
    title
        Heading for people.
    columns
        Names of the count columns it needs.
    compute
        ``[..., len(columns)]`` sums -> ``[...]`` values; NaN where undefined, never a division by zero.
    higher_is_better
        ``None`` for numbers that are context (length, yes-rate).
    percent
        Whether people read it times 100.
    empty
        The value shown where the whole data leave it undefined; ``None`` shows that it is undefined.
    unit
        What it counts if it is no rate, such as ``words`` or ``points``.
    detail
        Whether it is for reports and files only: a terminal has no room for everything.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    compute: Callable[[Array], Array]
    higher_is_better: bool | None = None
    percent: bool = True
    empty: float | None = None
    unit: str = ""
    detail: bool = False

    def value(self, sums: Array) -> float:
        """Evaluate the metric on one row of sums, ``[len(columns)]``; `empty` where that is undefined."""
        found = float(self.compute(sums))
        return self.empty if np.isnan(found) and self.empty is not None else found


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Base class of every metric plugin: what an answer adds to count columns, and the metrics over their sums.

    A subclass is a frozen dataclass of plain parameters with defaults. Benchmarks choose theirs; any other is added to
    a run with ``benchmark.extra_metrics=[NAME]``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""

    def metrics(self) -> list[Metric]:
        """Return the metrics in the order of the table; names and columns begin with the plugin's own name."""
        raise NotImplementedError(f"{type(self).__name__} has no metrics: override metrics()")

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Return what one answered sample adds to the count columns; nothing for a sample it does not concern.

        Parameters
        ----------
        record
            The answer, with the sample's ground truth in ``record.meta``.
        benchmark
            Where the sample is from.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot score: override score()")

    def score_cluster(self, records: Sequence[SampleRecord], benchmark: Benchmark) -> Mapping[str, float]:
        """Return what the answers of one cluster add together; by default the sum of what each adds.

        Override it where answers count in pairs or groups.
        """
        total: dict[str, float] = {}
        for record in records:
            for column, amount in self.score(record, benchmark).items():
                total[column] = total.get(column, 0.0) + amount
        return total

    def score_all(
        self, records: Sequence[SampleRecord], benchmark: Benchmark
    ) -> Iterable[tuple[str, Mapping[str, float]]]:
        """Return what all answers add: rows ``(cluster, counts)``.

        Override it where an answer's score depends on the other samples' ground truth.
        """
        groups = by_cluster(records, benchmark).items()
        return [(cluster, self.score_cluster(members, benchmark)) for cluster, members in groups]

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Return sentences about the sums of all columns, such as that a number is not defined and shown as 0."""
        return []


def by_cluster(records: Iterable[SampleRecord], benchmark: Benchmark) -> dict[str, list[SampleRecord]]:
    """Group answers by what is resampled as a whole, in the order of the first answer of each."""
    groups: dict[str, list[SampleRecord]] = {}
    for record in records:
        groups.setdefault(benchmark.cluster(record), []).append(record)
    return groups


@dataclass(frozen=True)
class ImageCounts:
    """Counts per image: the unit of resampling is the image, because its samples are not independent.

    Parameters
    ----------
    images
        Ids of the images (or what else is a benchmark's cluster), sorted, without repetition.
    columns
        Column name -> ``[len(images)]`` float64.
    """

    images: tuple[str, ...]
    columns: Mapping[str, Array]

    @classmethod
    def accumulate(cls, rows: Iterable[tuple[str, Mapping[str, float]]], columns: Iterable[str]) -> ImageCounts:
        """Sum rows ``(image id, counts)`` per image; the order of the rows does not matter.

        Parameters
        ----------
        rows
            One per sample; a column that a sample does not mention counts 0 for it.
        columns
            All columns.

        Raises
        ------
        DataError
            If a row counts something that is not a column, or something that is not finite.
        """
        names = tuple(dict.fromkeys(columns))
        sums: dict[str, dict[str, float]] = {}
        for image, row in rows:
            total = sums.setdefault(image, dict.fromkeys(names, 0.0))
            for name, amount in row.items():
                if name not in total:
                    raise DataError(f"image {image!r} has counts for {name!r}, which no metric declares as a column")
                if not math.isfinite(amount):
                    raise DataError(f"image {image!r} counts {amount} for {name!r}; counts must be finite")
                total[name] += amount
        images = tuple(sorted(sums))
        return cls(images, {name: np.array([sums[i][name] for i in images], dtype=np.float64) for name in names})

    def matrix(self, metric: Metric) -> Array:
        """Return the metric's columns as ``[len(images), len(metric.columns)]``.

        Raises
        ------
        DataError
            If a column is missing.
        """
        return self.stack(metric.columns, f"metric {metric.name!r}")

    def stack(self, names: Sequence[str], user: str) -> Array:
        """Return columns side by side, ``[len(images), len(names)]``; ``user`` is who asks, for the error.

        Raises
        ------
        DataError
            If a column is missing or has another length than ``images``.
        """
        for name in names:
            if name not in self.columns:
                raise DataError(f"{user} needs the count column {name!r}; there are: {', '.join(self.columns)}")
            if self.columns[name].shape != (len(self.images),):
                raise DataError(
                    f"count column {name!r} has shape {self.columns[name].shape} for {len(self.images)} images"
                )
        if not names:
            return np.zeros((len(self.images), 0))
        return np.stack([self.columns[name] for name in names], axis=-1)


def divide(numerator: Array, denominator: Array) -> Array:
    """Divide elementwise; NaN where the denominator is zero."""
    top, bottom = np.broadcast_arrays(numerator, denominator)
    result: Array = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    return result


def ratio(
    name: str,
    title: str,
    numerator: str,
    denominator: str,
    *,
    higher_is_better: bool | None = None,
    percent: bool = True,
    empty: float | None = None,
    unit: str = "",
    detail: bool = False,
) -> Metric:
    """Build the metric sum(numerator) / sum(denominator); undefined where the denominator sums to zero."""
    return Metric(
        name=name,
        title=title,
        columns=(numerator, denominator),
        compute=lambda sums: divide(sums[..., 0], sums[..., 1]),
        higher_is_better=higher_is_better,
        percent=percent,
        empty=empty,
        unit=unit,
        detail=detail,
    )


def values(counts: ImageCounts, metrics: Iterable[Metric]) -> dict[str, float]:
    """Evaluate metrics over all images; where undefined, their `Metric.empty` or NaN."""
    return {metric.name: metric.value(counts.matrix(metric).sum(axis=0)) for metric in metrics}
