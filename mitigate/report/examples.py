"""Which pictures a report shows: those about which the stacks disagree first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.benchmarks.base import Benchmark, Sample, Span
    from mitigate.records import SampleRecord

#: Questions shown per picture.
QUESTIONS = 3

Answers = Mapping[str, Mapping[str, "SampleRecord"]]
"""Stack -> sample id -> record."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample and what every stack made of it.

    Parameters
    ----------
    sample
        What was asked.
    spans
        Stack -> its reply, cut into marked pieces.
    """

    sample: Sample
    spans: Mapping[str, Sequence[Span]]

    @property
    def replies(self) -> int:
        """Number of different replies."""
        return len({_text(spans) for spans in self.spans.values()})

    @property
    def verdicts(self) -> int:
        """Number of different sets of hallucinated pieces."""
        return len({frozenset(span.text.lower() for span in hallucinated(spans)) for spans in self.spans.values()})


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture with its entries: captions first, then the questions that separate the stacks best."""

    image_id: str
    pictures: Sequence[Image]
    entries: Sequence[Entry]


def hallucinated(spans: Sequence[Span]) -> list[Span]:
    """Return the pieces of a reply that are not in the picture."""
    return [span for span in spans if span.kind == "hallucinated"]


def choose_examples(
    benchmark: Benchmark, samples: Sequence[Sample], answers: Answers, limit: int = 12
) -> list[Example]:
    """Choose the pictures to show.

    Parameters
    ----------
    benchmark
        Marks replies and brings the pictures.
    samples
        All samples.
    answers
        All records, by stack and sample id.
    limit
        Most pictures to show.
    """
    by_image: dict[str, list[Entry]] = {}
    for sample in samples:
        spans = {stack: benchmark.marked(sample, records[sample.id].text) for stack, records in answers.items()}
        by_image.setdefault(sample.image_id, []).append(Entry(sample=sample, spans=spans))

    def interest(image_id: str) -> tuple[int, int, int]:
        entries = by_image[image_id]
        captions = [entry for entry in entries if entry.sample.task != "yes_no"]
        wrong = sum(bool(hallucinated(spans)) for entry in captions for spans in entry.spans.values())
        return (
            -sum(entry.verdicts - 1 for entry in entries),
            -sum(entry.replies - 1 for entry in entries),
            -wrong,
        )

    # sorted() is stable: pictures of equal interest keep the benchmark's order.
    chosen = sorted(by_image, key=interest)[:limit]
    return [
        Example(
            image_id=image_id,
            pictures=benchmark.images(by_image[image_id][0].sample),
            entries=_shown(by_image[image_id]),
        )
        for image_id in chosen
    ]


def _shown(entries: Sequence[Entry]) -> list[Entry]:
    captions = [entry for entry in entries if entry.sample.task != "yes_no"]
    questions: dict[str, Entry] = {}
    for entry in sorted(
        (entry for entry in entries if entry.sample.task == "yes_no"),
        key=lambda entry: (-entry.verdicts, -sum(bool(hallucinated(spans)) for spans in entry.spans.values())),
    ):
        questions.setdefault(entry.sample.prompt, entry)  # splits of one benchmark may share a question
    return captions + list(questions.values())[:QUESTIONS]


def _text(spans: Sequence[Span]) -> str:
    return "".join(span.text for span in spans)
