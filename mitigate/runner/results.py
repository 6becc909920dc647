"""From finished records to ``comparison.json``: metrics, paired differences, effects, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mitigate.effects import effects, stack_effect, totals
from mitigate.jsonfiles import to_json
from mitigate.records import RunRecord, SampleRecord
from mitigate.runner.single import timing
from mitigate.statistics import holm, intervals, mcnemar, paired_differences

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.compose import ResolvedRun
    from mitigate.metrics.base import Metric

FORMAT = 1
#: Units of metrics that are no rates.
_UNITS = {"length": "words"}

Answers = Mapping[str, SampleRecord]
"""Sample id -> record."""


def summarise(
    name: str,
    resolved: Sequence[ResolvedRun],
    records: Mapping[str, RunRecord],
    answers: Mapping[str, Answers],
    *,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare finished runs.

    Everything but ``cost`` and the dates is a pure function of configuration, answers and seed.

    Parameters
    ----------
    name
        Name of the comparison.
    resolved
        The runs, in the table's order; the first one without methods is the baseline.
    records, answers
        By stack name.
    notes
        Sentences that belong under every presentation.

    Returns
    -------
    dict
        Content of ``comparison.json``, plain JSON; rates in 0..1, undefined numbers ``None``.
    """
    first = resolved[0]
    benchmark, seed = first.benchmark, int(first.config["seed"])
    metrics = benchmark.all_metrics()
    baseline = next((item.stack_name for item in resolved if not item.methods), None)
    stacks = {
        item.stack_name: _stack(item, records[item.stack_name], answers, baseline, metrics, seed) for item in resolved
    }
    _adjust(stacks, benchmark.headline)
    return to_json(  # type: ignore[no-any-return]
        {
            "format": FORMAT,
            "name": name,
            "benchmark": {"name": benchmark.name, "version": benchmark.version, **benchmark.params()},
            "model": _model(first.config["model"]),
            "baseline": baseline,
            "seed": seed,
            "n_images": len({record.image_id for record in answers[first.stack_name].values()}),
            "n_samples": len(answers[first.stack_name]),
            "headline": benchmark.headline,
            "metrics": {metric.name: _about(metric) for metric in metrics},
            "stacks": stacks,
            "notes": list(notes),
            "config": {key: value for key, value in first.config.items() if key not in ("methods", "stack")},
            "data_hash": records[first.stack_name].data_hash,
            "prompt_hash": records[first.stack_name].prompt_hash,
        }
    )


def _model(config: Mapping[str, Any]) -> str:
    """Return a model's name, with where it was loaded from if that says more."""
    name, path = str(config["name"]), str(config["path"])
    return name if name == path else f"{name} ({path})"


def _about(metric: Metric) -> dict[str, Any]:
    """Describe a metric, with a short title for table headings: the last word of a metric of a family."""
    short = metric.title.split()[-1] if "/" in metric.name else metric.title
    return {
        "title": metric.title,
        "short": short,
        "percent": metric.percent,
        "unit": "" if metric.percent else _UNITS.get(metric.name, ""),
        "higher_is_better": metric.higher_is_better,
    }


def _stack(
    item: ResolvedRun,
    record: RunRecord,
    answers: Mapping[str, Answers],
    baseline: str | None,
    metrics: Sequence[Metric],
    seed: int,
) -> dict[str, Any]:
    benchmark, own = item.benchmark, list(answers[item.stack_name].values())
    summed = totals(own)
    each = effects(summed, len(own))
    idle = [key for key in item.methods if key not in each or each[key].idle]
    changed = None if baseline is None else _changed(answers[baseline], answers[item.stack_name])
    against = baseline is not None and baseline != item.stack_name
    return {
        "methods": item.config.get("methods") or {},
        "provenance": dict(item.provenance),
        "metrics": {key: asdict(value) for key, value in intervals(benchmark.counts(own), metrics, seed=seed).items()},
        "differences": _differences(benchmark, answers, baseline, item.stack_name, metrics, seed)
        if baseline is not None and against
        else {},
        "mcnemar": _mcnemar(benchmark, answers, baseline, item.stack_name)
        if baseline is not None and against
        else None,
        "effects": {
            **{
                key: value
                for key, value in asdict(stack_effect(summed, len(own))).items()
                if key != "seconds_per_token"
            },
            "texts_changed": changed,
            "idle": idle,
            "methods": {
                key: {name: amount for name, amount in counters.items() if name != "seconds"}
                for key, counters in summed.items()
            },
        },
        "cost": _cost(item, own, answers, baseline, summed),
        "notes": _stack_notes(idle, changed if against else None, baseline),
        "record": {
            "created_at": record.created_at,
            "versions": record.versions,
            "git": record.git,
            "weights": record.weights,
        },
    }


def _deterministic(effect: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a second run of the same configuration need not repeat: times, and what is said elsewhere."""
    return {key: value for key, value in effect.items() if key not in ("seconds_per_token", "idle")}


def _differences(
    benchmark: Benchmark,
    answers: Mapping[str, Answers],
    baseline: str,
    stack: str,
    metrics: Sequence[Metric],
    seed: int,
) -> dict[str, Any]:
    """Return stack minus baseline for every metric, with the same resampled pictures on both sides."""
    first, second = (benchmark.counts(answers[name].values()) for name in (baseline, stack))
    found = paired_differences(first, second, metrics, seed=seed)
    return {key: {**asdict(value), "excludes_zero": value.excludes_zero} for key, value in found.items()}


def _adjust(stacks: Mapping[str, Any], headline: Sequence[str]) -> None:
    """Add Holm's adjustment over the stacks to the headline differences."""
    for metric in headline:
        compared = [data["differences"][metric] for data in stacks.values() if metric in data["differences"]]
        for difference, p in zip(compared, holm([item["p"] for item in compared]), strict=True):
            difference["p_holm"] = p


def _mcnemar(
    benchmark: Benchmark, answers: Mapping[str, Answers], baseline: str, stack: str
) -> dict[str, float] | None:
    """Return McNemar's exact test over the answers that are right or wrong; ``None`` without such answers."""
    outcomes = [
        {key: right for key, record in answers[name].items() if (right := benchmark.correct(record)) is not None}
        for name in (baseline, stack)
    ]
    return asdict(mcnemar(*outcomes)) if outcomes[0] else None


def _changed(baseline: Answers, stack: Answers) -> float:
    return sum(stack[key].text != record.text for key, record in baseline.items()) / max(len(baseline), 1)


def _cost(
    item: ResolvedRun,
    own: list[SampleRecord],
    answers: Mapping[str, Answers],
    baseline: str | None,
    summed: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return the wall time per token of the captions, and its ratio to the baseline's."""
    mine = timing(own)
    base = None if baseline is None else timing(list(answers[baseline].values()))["ms_per_token"]
    return {
        **mine,
        "overhead": mine["ms_per_token"] / base if base else None,
        "batch_size": item.config["trainer"]["batch_size"],
        "method_seconds": {key: counters["seconds"] for key, counters in summed.items() if "seconds" in counters},
    }


def _stack_notes(idle: Sequence[str], changed: float | None, baseline: str | None) -> list[str]:
    notes = [f"{key} did nothing: it changed no attention row, no hidden state and no token" for key in idle]
    if changed == 0.0:
        notes.append(f"every reply is the same as with {baseline}")
    return notes
