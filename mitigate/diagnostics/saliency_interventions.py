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
    TokenChosen,
    parse_layers,
)
from mitigate.diagnostics.base import Estimate, Findings, Table
from mitigate.lazy import torch
from mitigate.ops.saliency import cotangent, normalised, saliency_row
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
class SaliencyMarks(Method):
    """Marks the generated tokens whose last-token saliency was above a threshold when they were chosen.

    Parameters
    ----------
    above
        The threshold.
    layers
        Layers whose saliency is averaged: numbers or shares of the depth.
    """

    name: ClassVar[str] = "saliency_marks"
    summary: ClassVar[str] = "marks tokens of high saliency"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS, Point.TOKEN_CHOSEN}), gradient=True)

    above: float = 0.45
    layers: str = "0.1875-0.25"

    def _chosen(self, depth: int) -> tuple[int, ...]:
        return parse_layers(self.layers, depth, name="layers")

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Differentiate the predicting row."""
        rows = Subscription(
            point=Point.ATTENTION_PROBS,
            access=Access.GRADIENT,
            layers=self._chosen(model.layers),
            rows=Rows.LAST,
            where="predicting row",
        )
        return [rows, Subscription(point=Point.TOKEN_CHOSEN, where="saliency of the chosen token")]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Only the gradients are needed; they are asked for when the token is chosen."""

    def on_token_chosen(self, event: TokenChosen, state: MethodState) -> None:
        """Keep one yes or no per request row, ``[B]``, in the order of the steps."""
        asked = dict.fromkeys(self._chosen(event.request.facts.layers), Access.GRADIENT)
        parts = event.request.attention_gradients(asked, cotangent(event.logits, event.tokens))
        own = [normalised(saliency_row(a, g), "row_l2")[:, -1].to(event.logits.device) for a, g in parts.values()]
        marked = torch.stack(own).mean(0) > self.above
        state.marks = [*state.get("marks", [])[: event.step], marked]
        state.count("marked", marked.float())


@dataclass(frozen=True, kw_only=True)
class TextGain(Method):
    """Multiplies the attention of predicting rows to the text before them by a factor; rows are not renormalised.

    Parameters
    ----------
    gain
        The factor; 1 changes nothing.
    window
        How many of the latest text columns it applies to; 0: all after the picture. The row's own column is left out.
    marked_by
        Key of a `SaliencyMarks` in the stack: only tokens that it marked are scaled. Empty: all text.
    """

    name: ClassVar[str] = "text_gain"
    summary: ClassVar[str] = "scales the attention to earlier text at every step"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS}))

    gain: float = 1.0
    window: int = 0
    marked_by: str = ""

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
        if self.marked_by:
            inside = inside & self._marked(event).to(keys.device)[:, None]
        edited: Tensor = torch.where(inside[:, None], event.probs * self.gain, event.probs)
        state.note_change((edited - event.probs).abs().sum(-1).mean(1))
        return edited

    def _marked(self, event: AttentionProbs) -> Tensor:
        """Return the columns of marked tokens, ``[B, K]``."""
        columns = torch.zeros(event.probs.shape[0], event.probs.shape[-1], dtype=torch.bool)
        for place, marks in enumerate(event.request.state(self.marked_by).get("marks", [])):
            column = event.layout.prompt_length + place
            if column < columns.shape[1]:
                columns[:, column] = marks.cpu()
        return columns


def intervene(
    diagnostic: Saliency, resolved: ResolvedRun, folder: Path, *, console: Console, models: ModelCache
) -> Findings:
    """Run the benchmark once per factor and compare with the factor 1; finished runs are not run again."""
    from mitigate.runner.progress import StackProgress
    from mitigate.runner.single import run_stack

    gains = list(dict.fromkeys([1.0, *diagnostic.gains]))
    records: dict[float, RunRecord] = {}
    suffix = f"-above-{diagnostic.gain_above:g}" if diagnostic.gain_above else ""
    places = {
        gain: folder / "interventions" / f"gain-{gain:g}-window-{diagnostic.gain_window}{suffix if gain != 1.0 else ''}"
        for gain in gains
    }
    with StackProgress(console, len(gains)) as progress:
        for gain, place in places.items():
            job = _job(resolved, diagnostic, gain)
            records[gain] = run_stack(job, place, console=console, models=models, progress=progress)
    return _compared(resolved, records, places, diagnostic.resamples)


def _job(resolved: ResolvedRun, diagnostic: Saliency, gain: float) -> ResolvedRun:
    config = {name: value for name, value in resolved.config.items() if name != "diagnostic"}
    added: dict[str, Method] = {}
    marks = ""
    if diagnostic.gain_above and gain != 1.0:
        marks = _free("saliency_marks", resolved.methods)
        added[marks] = SaliencyMarks(above=diagnostic.gain_above, layers=diagnostic.layers)
    gained = TextGain(gain=gain, window=diagnostic.gain_window, marked_by=marks)
    added[_free("text_gain", resolved.methods)] = gained
    own = {key: {"name": method.name, "preset": "default", **method.params()} for key, method in added.items()}
    name = f"{resolved.stack_name}, text x {gain:g}"
    whole = {**config, "methods": {**config["methods"], **own}}
    return dataclasses.replace(resolved, config=whole, methods={**resolved.methods, **added}, stack_name=name)


def _free(key: str, taken: Mapping[str, Any]) -> str:
    while key in taken:
        key += "_"
    return key


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
