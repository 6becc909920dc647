"""A comparison category by category: how many answers are wrong, and the headline metrics where they are defined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mitigate.metrics.base import ImageCounts, ratio
from mitigate.statistics import compare_all, pool

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.metrics.base import Metric
    from mitigate.records import SampleRecord
    from mitigate.runner.results import Answered

#: Categories are many and small, and their intervals are no tests: fewer resamples are enough.
RESAMPLES: Final = 2_000
#: Of a breakdown with more categories the most frequent ones are shown.
MOST_CATEGORIES: Final = 40
#: Defined in every category of every benchmark that can tell right from wrong.
WRONG: Final = ratio("wrong", "Wrong answers", "wrong/wrong", "wrong/judged", higher_is_better=False)

Members = Mapping[str, Mapping[str, Mapping[int, Sequence["SampleRecord"]]]]
"""Breakdown -> category -> seed -> answers."""


def break_down(
    groups: Mapping[str, Answered], baseline: Answered | None, metrics: Sequence[Metric], seed: int
) -> dict[str, Any]:
    """Evaluate `WRONG` and the headline metrics in every category of the benchmark's breakdowns.

    Parameters
    ----------
    groups
        The stacks' answers.
    baseline
        What the others are compared to.
    metrics
        All metrics of the benchmark.
    seed
        Of the resampling.

    Returns
    -------
    dict
        Breakdown -> category -> ``n`` (samples), ``images`` and ``stacks``: stack -> metric -> ``value`` and, but for
        the baseline, ``difference`` with its interval. A metric that a category leaves undefined is not in it.
    """
    first = next(iter(groups.values()))
    members = {stack: _members(group) for stack, group in groups.items()}
    headline = [metric for metric in metrics if metric.name in first.benchmark.headline]
    found: dict[str, Any] = {}
    for name, categories in members[first.stack].items():
        sizes = {category: max(map(len, seeds.values())) for category, seeds in categories.items()}
        largest = sorted(sizes, key=lambda each: (-sizes[each], each))[:MOST_CATEGORIES]
        found[name] = {}
        for category in sorted(largest):
            counts = {stack: _counts(first.benchmark, own[name][category]) for stack, own in members.items()}
            found[name][category] = {
                "n": sizes[category],
                "images": len({record.image_id for records in categories[category].values() for record in records}),
                "stacks": _numbers(counts, None if baseline is None else baseline.stack, [WRONG, *headline], seed),
            }
    return found


def _members(group: Answered) -> Members:
    members: dict[str, dict[str, dict[int, list[SampleRecord]]]] = {}
    for (seed, _), record in group.answers.items():
        for name, category in group.benchmark.breakdowns(record).items():
            members.setdefault(name, {}).setdefault(category, {}).setdefault(seed, []).append(record)
    return members


def _counts(benchmark: Benchmark, seeds: Mapping[int, Sequence[SampleRecord]]) -> ImageCounts:
    """Count the answers of one category, the wrong ones too."""
    return pool([_with_wrong(benchmark, records) for records in seeds.values()])


def _with_wrong(benchmark: Benchmark, records: Sequence[SampleRecord]) -> ImageCounts:
    counted = benchmark.counts(records)
    judged = [(record, benchmark.errors(record)) for record in records]
    rows: list[tuple[str, dict[str, float]]] = [(benchmark.cluster(record), {}) for record in records]
    rows += [
        (benchmark.cluster(record), {"wrong/judged": 1.0, "wrong/wrong": float(wrong > 0)})
        for record, wrong in judged
        if wrong is not None
    ]
    extra = ImageCounts.accumulate(rows, WRONG.columns)
    return ImageCounts(counted.images, {**counted.columns, **extra.columns})


def _numbers(
    counts: Mapping[str, ImageCounts], baseline: str | None, metrics: Sequence[Metric], seed: int
) -> dict[str, Any]:
    stacks: dict[str, Any] = {}
    for stack, own in counts.items():
        values = {metric.name: float(metric.compute(own.matrix(metric).sum(axis=0))) for metric in metrics}
        stacks[stack] = {key: {"value": value} for key, value in values.items() if not np.isnan(value)}
    if baseline is None:
        return stacks
    others = {stack: own for stack, own in counts.items() if stack != baseline}
    for stack, differences in compare_all(counts[baseline], others, metrics, RESAMPLES, seed).items():
        for key in stacks[stack]:
            found = differences[key]
            stacks[stack][key]["difference"] = {end: getattr(found, end) for end in ("value", "low", "high")}
    return stacks
