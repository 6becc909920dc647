"""Which part of a method matters: its variants on the benchmark, paired with the unablated stack."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.diagnostics.base import Diagnostic, Estimate, Findings, SampleRows, Table
from mitigate.errors import ConfigError
from mitigate.metrics.base import Metric
from mitigate.records import RunRecord, read_samples
from mitigate.statistics import paired_differences

if TYPE_CHECKING:
    from rich.console import Console

    from mitigate.compose import ResolvedRun
    from mitigate.core.method import Method
    from mitigate.runner.single import ModelCache

FULL = "unablated"


def ablate(
    resolved: ResolvedRun,
    diagnostic: Diagnostic,
    samples: Sequence[SampleRows],
    folder: Path,
    *,
    console: Console,
    models: ModelCache,
) -> Findings:
    """Run the benchmark once per variant if the diagnostic's ``ablation`` asks for it; nothing otherwise.

    Finished variants are not run again.

    Raises
    ------
    ConfigError
        If the stack has nothing to ablate.
    """
    if not diagnostic.ablation:
        return Findings()
    stacks = variants(resolved.methods, samples)
    if len(stacks) == 1:
        listed = ", ".join(resolved.methods) or "none"
        raise ConfigError(
            f"diagnostic.ablation=true: no method of the stack ({listed}) has variants to compare; "
            f"choose a stack that has one, or leave diagnostic.ablation out"
        )
    from mitigate.runner.progress import StackProgress
    from mitigate.runner.single import run_stack

    records: dict[str, RunRecord] = {}
    with StackProgress(console, len(stacks)) as progress:
        for name, methods in stacks.items():
            job = _job(resolved, name, methods)
            place = _folder(folder, name)
            records[name] = run_stack(job, place, console=console, models=models, progress=progress)
    return Findings(tables=[_table(resolved, diagnostic, records, folder)])


def variants(methods: Mapping[str, Method], samples: Sequence[SampleRows]) -> dict[str, dict[str, Method]]:
    """Return name -> stack: the unablated one first, then one per variant of each method.

    Parameters
    ----------
    methods
        The stack.
    samples
        What was diagnosed: a method learns what it counted there, for variants that match a measured rate.
    """
    stacks = {FULL: dict(methods)}
    for key, method in methods.items():
        counted: dict[str, float] = {}
        for sample in samples:
            for name, amount in sample.telemetry.get(key, {}).items():
                counted[name] = counted.get(name, 0.0) + (amount or 0.0)
        for name, variant in method.ablations(counted).items():
            stacks[f"{key}: {name}"] = {**methods, key: variant}
    return stacks


def _folder(folder: Path, name: str) -> Path:
    return folder / "ablation" / re.sub(r"[^\w.+-]+", "-", name)


def _job(resolved: ResolvedRun, name: str, methods: Mapping[str, Method]) -> ResolvedRun:
    config = {key: value for key, value in resolved.config.items() if key != "diagnostic"}
    nodes = {
        key: {**config["methods"].get(key, {}), "name": method.name, **method.params()}
        for key, method in methods.items()
    }
    return dataclasses.replace(resolved, config={**config, "methods": nodes}, methods=dict(methods), stack_name=name)


def _table(resolved: ResolvedRun, diagnostic: Diagnostic, records: Mapping[str, RunRecord], folder: Path) -> Table:
    """Pair every variant with the unablated stack."""
    benchmark = resolved.benchmark
    metrics = _shown(benchmark.metrics(), benchmark.headline)
    counts = {name: benchmark.counts(read_samples(_folder(folder, name))) for name in records}
    rows: list[tuple[Any, ...]] = []
    images = len(counts[FULL].images)
    for name, record in records.items():
        if name == FULL:
            differences = {}
        else:
            seed = int(resolved.config["seed"])
            differences = paired_differences(counts[FULL], counts[name], metrics, diagnostic.resamples, seed)
        for metric in metrics:
            value, difference = record.metrics[metric.name], differences.get(metric.name)
            change = difference and Estimate(difference.value, difference.low, difference.high, images, difference.p)
            rows.append((name, metric.name, Estimate(value.value, value.low, value.high, images), change))
    columns = ("variant", "metric", "value", f"difference to {FULL}")
    return Table("ablation", "Which part of the method matters", columns, tuple(rows))


def _shown(metrics: Sequence[Metric], headline: Sequence[str]) -> list[Metric]:
    """Headline metrics, and those of no sub-task, such as recall and length, without which the former mislead."""
    return [metric for metric in metrics if metric.name in headline or "/" not in metric.name]
