"""From finished runs to ``comparison.json``: metrics, paired differences, effects, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mitigate.effects import effects, stack_effect, totals
from mitigate.errors import DataError
from mitigate.jsonfiles import to_json
from mitigate.runner.breakdowns import break_down
from mitigate.runner.stored import unit, units_that_failed
from mitigate.statistics import compare_all, holm, intervals, mcnemar, pool, seed_spread

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.metrics.base import ImageCounts, Metric
    from mitigate.records import SampleRecord
    from mitigate.runner.stored import StoredRun
    from mitigate.statistics import Difference

FORMAT = 2


@dataclass(frozen=True)
class Answered:
    """The runs of one stack, one per seed, without what is left out everywhere.

    Parameters
    ----------
    runs
        At least one; they differ in nothing but the seed.
    left_out
        What failed with any stack (`units_that_failed`).
    """

    runs: tuple[StoredRun, ...]
    left_out: frozenset[str]

    @property
    def stack(self) -> str:
        """Return the stack's name."""
        return self.runs[0].stack

    @property
    def benchmark(self) -> Benchmark:
        """Return what was asked."""
        return self.runs[0].benchmark

    @cached_property
    def answers(self) -> dict[tuple[int, str], SampleRecord]:
        """Return the answers that count, by seed and sample id."""
        return {
            (run.seed, key): record
            for run in self.runs
            for key, record in run.answers.items()
            if unit(self.benchmark, record) not in self.left_out
        }

    @cached_property
    def counts_by_seed(self) -> list[ImageCounts]:
        """Return the counts per cluster of every run."""
        per_seed: dict[int, list[SampleRecord]] = {run.seed: [] for run in self.runs}
        for (seed, _), record in self.answers.items():
            per_seed[seed].append(record)
        return [self.benchmark.counts(records) for records in per_seed.values()]

    @cached_property
    def counts(self) -> ImageCounts:
        """Return the counts per cluster, averaged over the seeds."""
        return pool(self.counts_by_seed)

    def counterpart(self, key: tuple[int, str]) -> SampleRecord | None:
        """Return the answer to the same sample with the same seed, or with the only seed there is."""
        return self.answers.get(key if len(self.runs) > 1 else (self.runs[0].seed, key[1]))


def answered(runs: Sequence[StoredRun]) -> dict[str, Answered]:
    """Put the runs of each stack together and leave out what failed anywhere, so that all stacks are compared alike.

    Raises
    ------
    DataError
        If a stack has two runs with one seed, or nothing is left.
    """
    left_out = frozenset().union(*(units_that_failed(run.benchmark, run.answers.values()) for run in runs))
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        group = groups.setdefault(run.stack, [])
        if any(run.seed == other.seed for other in group):
            raise DataError(
                f"stack {run.stack!r} has two runs with seed {run.seed}: {group[0].directory} and {run.directory}"
            )
        group.append(run)
    by_seed = {stack: tuple(sorted(group, key=lambda run: run.seed)) for stack, group in groups.items()}
    made = {stack: Answered(group, left_out) for stack, group in by_seed.items()}
    for stack, each in made.items():
        if not each.answers:
            failed = next(record for run in each.runs for record in run.answers.values() if record.error is not None)
            raise DataError(
                f"stack {stack!r} has no answer that can be compared; sample {failed.id!r} failed with: {failed.error}"
            )
    return made


def summarise(name: str, runs: Sequence[StoredRun], *, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Compare finished runs.

    Everything but ``cost`` and the dates is a pure function of configuration, answers and seed.

    Parameters
    ----------
    name
        Name of the comparison.
    runs
        In the table's order; the first one without methods is the baseline. Runs of one stack with several seeds are
        pooled, in the order of the seeds: the smallest one seeds the bootstrap.
    notes
        Sentences that belong under every presentation.

    Returns
    -------
    dict
        Content of ``comparison.json``, plain JSON; rates in 0..1, undefined numbers ``None``.

    Raises
    ------
    DataError
        If nothing is left to compare because samples failed.
    """
    groups = answered(runs)
    first = groups[runs[0].stack].runs[0]
    benchmark = first.benchmark
    metrics = benchmark.all_metrics()
    baseline = next((group for group in groups.values() if not group.runs[0].methods), None)
    differences = _differences(baseline, groups, metrics, first.seed)
    stacks = {
        stack: _stack(group, baseline, metrics, differences.get(stack, {}), first.seed)
        for stack, group in groups.items()
    }
    _adjust(stacks, benchmark.headline)
    answers = groups[first.stack].answers.values()
    judges = _judges(groups)
    return to_json(  # type: ignore[no-any-return]
        {
            "format": FORMAT,
            "name": name,
            "benchmark": {"name": benchmark.name, "version": benchmark.version, **benchmark.params()},
            "model": _model(first.config["model"]),
            "baseline": None if baseline is None else baseline.stack,
            "seed": first.seed,
            "n_images": len({record.image_id for record in answers}),
            "n_clusters": len(groups[first.stack].counts.images),
            "n_samples": len({record.id for record in answers}),
            "left_out": sorted(groups[first.stack].left_out),
            "headline": benchmark.headline,
            "context": [metric.name for metric in metrics if metric.higher_is_better is None],
            "metrics": {metric.name: _about(metric) for metric in metrics},
            "stacks": stacks,
            "breakdowns": break_down(groups, baseline, metrics, first.seed),
            "judges": judges,
            "notes": [*notes, *_left_out(groups[first.stack]), *_judged(judges)],
            "config": {key: value for key, value in first.config.items() if key not in ("methods", "stack")},
            "data_hash": first.record.data_hash,
            "prompt_hash": first.record.prompt_hash,
        }
    )


def _model(config: Mapping[str, Any]) -> str:
    """Return a model's name, with where it was loaded from if that says more."""
    name, path = str(config["name"]), str(config["path"])
    return name if name == path else f"{name} ({path})"


def _left_out(group: Answered) -> list[str]:
    count = len(group.left_out)
    if not count:
        return []
    one, more = ("group of answers", "groups of answers") if group.benchmark.grouped else ("sample", "samples")
    many = f"{count} {more} are" if count > 1 else f"1 {one} is"
    return [f"{many} left out of every stack's numbers, because some stack failed there."]


def _judges(groups: Mapping[str, Answered]) -> list[str]:
    """Return who graded the answers, as their servers report it; nobody where no judge is needed."""
    names = (record.meta.get("judge") for group in groups.values() for record in group.answers.values())
    return sorted({str(name) for name in names if name})


def _judged(judges: Sequence[str]) -> list[str]:
    if len(judges) > 1:
        return [f"Several judges graded the answers, and they need not agree: {', '.join(judges)}."]
    return [f"The answers were graded by the judge {name}." for name in judges]


def _about(metric: Metric) -> dict[str, Any]:
    """Describe a metric, with a short title for table headings: the last word of a metric of a family."""
    short = metric.title.split()[-1] if "/" in metric.name else metric.title
    return {
        "title": metric.title,
        "short": short,
        "percent": metric.percent,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "detail": metric.detail,
    }


def _stack(
    group: Answered,
    baseline: Answered | None,
    metrics: Sequence[Metric],
    differences: Mapping[str, Difference],
    seed: int,
) -> dict[str, Any]:
    benchmark, own = group.benchmark, list(group.answers.values())
    record, methods = group.runs[0].record, group.runs[0].methods
    summed = totals(own)
    each = effects(summed, len(own))
    idle = [key for key in methods if key not in each or each[key].idle]
    changed = None if baseline is None else _changed(baseline, group)
    against = baseline if baseline is not group else None
    together = asdict(stack_effect(summed, len(own)))
    return {
        "methods": dict(methods),
        "provenance": dict(record.provenance),
        "seeds": [run.seed for run in group.runs],
        "failures": sum(run.failures for run in group.runs),
        "metrics": {key: asdict(value) for key, value in intervals(group.counts, metrics, seed=seed).items()},
        "differences": {
            key: {**asdict(found), "excludes_zero": found.excludes_zero, "caution": found.caution}
            for key, found in differences.items()
        },
        "seed_spread": _seed_spread(group, metrics),
        "mcnemar": _mcnemar(against, group),
        "effects": {
            **{key: value for key, value in together.items() if key != "seconds_per_token"},
            "texts_changed": changed,
            "idle": idle,
            "methods": {
                key: {name: amount for name, amount in counters.items() if name != "seconds"}
                for key, counters in summed.items()
            },
        },
        "cost": _cost(group, baseline, summed),
        "warnings": [*benchmark.warnings(group.counts), *cautions(benchmark, differences)],
        "notes": _notes(group, idle, changed if against else None, baseline),
        "record": {
            "created_at": record.created_at,
            "versions": record.versions,
            "git": record.git,
            "weights": record.weights,
        },
    }


def _differences(
    baseline: Answered | None, groups: Mapping[str, Answered], metrics: Sequence[Metric], seed: int
) -> dict[str, dict[str, Difference]]:
    """Return every stack minus the baseline, all with the same resampled pictures."""
    if baseline is None:
        return {}
    others = {stack: group.counts for stack, group in groups.items() if group is not baseline}
    return compare_all(baseline.counts, others, metrics, seed=seed)


def _seed_spread(group: Answered, metrics: Sequence[Metric]) -> dict[str, float]:
    """Return every metric's standard deviation over the seeds; nothing for a single one."""
    return seed_spread(group.counts_by_seed, metrics) if len(group.runs) > 1 else {}


def cautions(benchmark: Benchmark, differences: Mapping[str, Difference]) -> list[str]:
    """Return why the intervals of headline differences are too optimistic, where they are: a line per reason."""
    found: dict[str, list[str]] = {}
    for metric in benchmark.all_metrics():
        caution = differences[metric.name].caution if metric.name in differences else None
        if caution and metric.name in benchmark.headline:
            found.setdefault(caution, []).append(metric.title)
    return [f"{', '.join(titles)}: {caution}" for caution, titles in found.items()]


def _adjust(stacks: Mapping[str, Any], headline: Sequence[str]) -> None:
    """Add Holm's adjustment over the stacks to the headline differences."""
    for metric in headline:
        compared = [data["differences"][metric] for data in stacks.values() if metric in data["differences"]]
        for difference, p in zip(compared, holm([item["p"] for item in compared]), strict=True):
            difference["p_holm"] = p


def _mcnemar(baseline: Answered | None, group: Answered) -> dict[str, float] | None:
    """Return McNemar's exact test over the answers that are right or wrong; ``None`` without such pairs."""
    if baseline is None:
        return None
    first, second = {}, {}
    for key, record in group.answers.items():
        other = baseline.counterpart(key)
        right, before = (None if item is None else group.benchmark.correct(item) for item in (record, other))
        if right is not None and before is not None:
            first["/".join(map(str, key))], second["/".join(map(str, key))] = before, right
    return asdict(mcnemar(first, second)) if first else None


def _changed(baseline: Answered, group: Answered) -> float:
    """Return the share of answers whose text is not the baseline's."""
    pairs = [(record, baseline.counterpart(key)) for key, record in group.answers.items()]
    known = [(record, other) for record, other in pairs if other is not None]
    return sum(record.text != other.text for record, other in known) / max(len(known), 1)


def _cost(group: Answered, baseline: Answered | None, summed: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the wall time per token of the captions, and its ratio to the baseline's."""
    mine = timing(list(group.answers.values()))
    base = None if baseline is None else timing(list(baseline.answers.values()))["ms_per_token"]
    return {
        **mine,
        "overhead": mine["ms_per_token"] / base if base else None,
        "batch_size": group.runs[0].config["trainer"]["batch_size"],
        "method_seconds": {key: counters["seconds"] for key, counters in summed.items() if "seconds" in counters},
    }


def timing(answers: Sequence[SampleRecord]) -> dict[str, float]:
    """Return what answers cost, from their recorded times.

    Captions alone decide (a yes/no answer is nearly all prompt); where there are none, all answers do.

    Returns
    -------
    dict
        ``tokens``, ``seconds`` (wall time of the batches, shared out to their samples) and ``ms_per_token``.
    """
    timed = [answer for answer in answers if answer.task == "caption"] or answers
    seconds = math.fsum(answer.seconds for answer in timed)
    tokens = sum(answer.tokens for answer in timed)
    return {
        "tokens": float(tokens),
        "seconds": seconds,
        "ms_per_token": 1000.0 * seconds / tokens if tokens else math.nan,
    }


def _notes(group: Answered, idle: Sequence[str], changed: float | None, baseline: Answered | None) -> list[str]:
    notes = [f"{key} did nothing: it changed no attention row, no hidden state and no token" for key in idle]
    if changed == 0.0 and baseline is not None:
        notes.append(f"every reply is the same as with {baseline.stack}")
    failed = [record for run in group.runs for record in run.answers.values() if record.error is not None]
    if failed:
        many = f"{len(failed)} samples failed, the first one" if len(failed) > 1 else "1 sample failed"
        notes.append(f"{many} ({failed[0].id}) with {failed[0].error}; the same command tries again")
    return notes
