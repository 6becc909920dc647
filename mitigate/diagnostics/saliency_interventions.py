"""Does less attention to earlier text make more hallucinations? The benchmark under a gain on that attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Point,
    Rows,
    Subscription,
    Tags,
)
from mitigate.diagnostics.base import Estimate, Findings, Table
from mitigate.lazy import torch
from mitigate.records import read_samples
from mitigate.statistics import paired_differences

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from mitigate.compose import ResolvedRun
    from mitigate.diagnostics.saliency import Saliency
    from mitigate.records import RunRecord
    from mitigate.runner.single import ModelCache


@dataclass(frozen=True, kw_only=True)
class TextGain(Method):
    """Multiplies the attention of predicting rows to the text before them by a factor; rows are not renormalised.

    Parameters
    ----------
    gain
        The factor; 1 changes nothing.
    window
        How many of the latest text columns it applies to; 0: all after the picture. The row's own column is left out.
    """

    name: ClassVar[str] = "text_gain"
    summary: ClassVar[str] = "scales the attention to earlier text at every step"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS}))

    gain: float = 1.0
    window: int = 0

    def __post_init__(self) -> None:
        self.require(self.gain >= 0.0, "gain", "not be negative")
        self.require(self.window >= 0, "window", "not be negative")

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Write the predicting rows of all layers."""
        return [
            Subscription(
                point=Point.ATTENTION_PROBS,
                access=Access.WRITE,
                layers=tuple(range(model.layers)),
                rows=Rows.PREDICTORS,
                where="earlier text",
            )
        ]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """A[q, j] <- gain * A[q, j] for the text columns j < q."""
        if self.gain == 1.0:
            return None
        keys = torch.arange(event.probs.shape[-1], device=event.probs.device)
        start = event.layout.after_image.to(keys.device)[:, None, None]
        rows = event.rows.to(keys.device)[None, :, None]
        inside = (keys >= start) & (keys < rows) & event.row_mask.to(keys.device)[..., None]
        if self.window:
            inside = inside & (keys >= rows - self.window)
        edited: Tensor = torch.where(inside[:, None], event.probs * self.gain, event.probs)
        state.note_change((edited - event.probs).abs().sum(-1).mean(1))
        return edited


def intervene(
    diagnostic: Saliency, resolved: ResolvedRun, folder: Path, *, console: Console, models: ModelCache
) -> Findings:
    """Run the benchmark once per factor and compare with the factor 1; finished runs are not run again."""
    from mitigate.runner.progress import StackProgress
    from mitigate.runner.single import run_stack

    gains = list(dict.fromkeys([1.0, *diagnostic.gains]))
    records: dict[float, RunRecord] = {}
    places = {gain: folder / "interventions" / f"gain-{gain:g}-window-{diagnostic.gain_window}" for gain in gains}
    with StackProgress(console, len(gains)) as progress:
        for gain, place in places.items():
            job = _job(resolved, TextGain(gain=gain, window=diagnostic.gain_window), gain)
            records[gain] = run_stack(job, place, console=console, models=models, progress=progress)
    return _compared(resolved, records, places, diagnostic.resamples)


def _job(resolved: ResolvedRun, method: TextGain, gain: float) -> ResolvedRun:
    key = method.name
    while key in resolved.methods:
        key += "_"
    config = {name: value for name, value in resolved.config.items() if name != "diagnostic"}
    nodes = {**config["methods"], key: {"name": method.name, "preset": "default", **method.params()}}
    name = f"{resolved.stack_name}, text x {gain:g}"
    methods = {**resolved.methods, key: method}
    return dataclasses.replace(resolved, config={**config, "methods": nodes}, methods=methods, stack_name=name)


def _compared(
    resolved: ResolvedRun, records: Mapping[float, RunRecord], places: Mapping[float, Path], resamples: int
) -> Findings:
    """Pair every factor with factor 1 on the same pictures."""
    benchmark = resolved.benchmark
    metrics = [metric for metric in benchmark.metrics() if metric.name in benchmark.headline or "/" not in metric.name]
    counts = {gain: benchmark.counts(read_samples(place)) for gain, place in places.items()}
    images, seed = len(counts[1.0].images), int(resolved.config["seed"])
    rows: list[tuple[Any, ...]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for gain in sorted(records):
        changes = paired_differences(counts[1.0], counts[gain], metrics, resamples, seed) if gain != 1.0 else {}
        for metric in metrics:
            value, change = records[gain].metrics[metric.name], changes.get(metric.name)
            shown = Estimate(value.value, value.low, value.high, images)
            paired = change and Estimate(change.value, change.low, change.high, images, change.p)
            rows.append((f"x {gain:g}", metric.name, shown, paired))
            curves.setdefault(metric.name, []).append({"gain": gain, **dataclasses.asdict(shown)})
    shown_curves = {metric.name: curves[metric.name] for metric in metrics if metric.name in benchmark.headline}
    columns = ("attention to text", "metric", "value", "difference to x 1")
    table = Table("interventions", "Attention to earlier text scaled at every step", columns, tuple(rows))
    return Findings(tables=[table], data={"interventions": shown_curves})
