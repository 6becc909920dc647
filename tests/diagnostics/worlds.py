"""A benchmark with a handful of words, and token rows made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mitigate.benchmarks.base import Benchmark, Sample, Span
from mitigate.diagnostics.base import SampleRows, TokenRow
from mitigate.diagnostics.labels import Label
from mitigate.metrics.chair import mentions
from mitigate.metrics.pope import parse

WORDS = {"cat": "cat", "cats": "cat", "dog": "dog", "traffic light": "traffic light", "pâté": "pâté"}


@dataclass(frozen=True, kw_only=True)
class Words(Benchmark):
    """Marks object words; yes/no replies as a whole, as the testbed does."""

    name: ClassVar[str] = "words"
    summary: ClassVar[str] = "words"

    def marked(self, sample: Any, text: str) -> list[Span]:
        if sample.task == "yes_no":
            return [Span(text, "correct" if parse(text) == sample.meta["label"] else "hallucinated")]
        spans, end = [], 0
        for found in mentions(text, WORDS):
            kind = "correct" if found.name in sample.meta["objects"] else "hallucinated"
            spans += [Span(text[end : found.start]), Span(text[found.start : found.end], kind)]
            end = found.end
        return [span for span in [*spans, Span(text[end:])] if span.text]


def caption(*objects: str) -> Sample:
    return Sample(id="a/caption", image_id="a", task="caption", prompt="Describe.", meta={"objects": list(objects)})


def question(label: str) -> Sample:
    return Sample(id="a/q", image_id="a", task="yes_no", prompt="Is there a cat?", meta={"label": label})


def row(image: str, label: str, measures: Mapping[str, Any], *, first: bool = True, position: int = 0) -> TokenRow:
    return TokenRow(
        sample=f"{image}/caption",
        image_id=image,
        task="caption",
        step=position,
        token=7,
        text=" word",
        label=Label(label),
        first=first,
        position=position,
        length=10,
        measures=dict(measures),
    )


def sample(image: str, rows: tuple[TokenRow, ...] = (), task: str = "caption", **measures: Any) -> SampleRows:
    return SampleRows(
        id=f"{image}/{task}",
        image_id=image,
        task=task,
        prompt="Describe.",
        text="",
        finished=True,
        measures=measures,
        rows=rows,
    )
