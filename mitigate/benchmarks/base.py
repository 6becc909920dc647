"""What a benchmark is: samples, their pictures, and a score that is a pure function of the records."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts, Metric
from mitigate.records import SampleRecord, content_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from PIL.Image import Image

SpanKind = Literal["plain", "correct", "hallucinated"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of an object, as fractions of the picture's width and height."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One thing to answer.

    Parameters
    ----------
    id
        Unique within the benchmark.
    image_id
        The picture; samples with the same one are one cluster of the statistics.
    task
        ``caption`` or ``yes_no``.
    prompt
        What the user says, without any chat template.
    meta
        Plain JSON: the ground truth, and whatever else scoring needs.
    """

    id: str
    image_id: str
    task: str
    prompt: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """A piece of a reply and how to show it; the pieces of a reply joined give the reply."""

    text: str
    kind: SpanKind = "plain"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Base class of every benchmark: a frozen dataclass of plain parameters.

    A subclass brings `samples`, `images`, `metrics` and `score`; the rest follows from them.

    Parameters
    ----------
    limit
        How much of the benchmark to use, in its own unit; ``None`` for its default size.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1

    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        self.require(self.limit is None or self.limit >= 1, "limit", "be at least 1, or null for the default size")

    def samples(self) -> list[Sample]:
        """Return all samples, always the same ones in the same order."""
        raise NotImplementedError(f"{type(self).__name__} has no samples: override samples()")

    def images(self, sample: Sample) -> list[Image]:
        """Return the pictures of a sample, RGB, in the order the prompt takes them."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures: override images()")

    def metrics(self) -> list[Metric]:
        """Return the metrics in the order of the table."""
        raise NotImplementedError(f"{type(self).__name__} has no metrics: override metrics()")

    def score(self, record: SampleRecord) -> Mapping[str, float]:
        """Return what one answered sample adds to the metrics' count columns."""
        raise NotImplementedError(f"{type(self).__name__} cannot score: override score()")

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return the most tokens a reply may have, or ``None`` to leave it to the decoding configuration."""
        return None

    def correct(self, record: SampleRecord) -> bool | None:
        """Return whether an answer is right, for McNemar; ``None`` where that is not a yes/no matter."""
        return None

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Cut a reply into spans that show what is right and what is hallucinated."""
        return [Span(text)] if text else []

    def boxes(self, sample: Sample | SampleRecord) -> Mapping[str, Sequence[Box]] | None:
        """Return where the objects of the (first) picture are, by the lower-case words that name them.

        Absent objects have no entry; ``None`` if the benchmark does not know places.
        """
        return None

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics whose paired difference is shown first; the first metric by default."""
        return tuple(metric.name for metric in self.metrics()[:1])

    def counts(self, records: Iterable[SampleRecord]) -> ImageCounts:
        """Score records and sum the counts per image.

        Raises
        ------
        DataError
            If a sample failed, so that its reply would be scored as if the model had been silent.
        """
        rows = []
        for record in records:
            if record.error is not None:
                raise DataError(
                    f"sample {record.id!r} failed ({record.error}) and cannot be scored; "
                    "start the run again, finished samples are kept"
                )
            rows.append((record.image_id, self.score(record)))
        return ImageCounts.accumulate(rows, (column for metric in self.metrics() for column in metric.columns))

    def params(self) -> dict[str, Any]:
        """Return the parameters by name, as plain JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def data_hash(self) -> str:
        """Return a sha256 over the samples' ground truth and the pixels of their pictures."""
        parts: list[Any] = [self.name, self.version]
        seen = set()
        for sample in self.samples():
            parts.append([sample.id, sample.image_id, sample.task, sample.meta])
            if sample.image_id not in seen:
                seen.add(sample.image_id)
                parts.extend(part for image in self.images(sample) for part in ([*image.size], image.tobytes()))
        return content_hash(parts)

    def prompt_hash(self) -> str:
        """Return a sha256 over the prompts."""
        return content_hash([sample.id, sample.prompt] for sample in self.samples())

    def require(self, condition: bool, parameter: str, must: str) -> None:
        """Raise a `ConfigError` that names the parameter unless the condition holds."""
        if not condition:
            shown = json.dumps(getattr(self, parameter), default=str)
            raise ConfigError(f"benchmark.{parameter}={shown} must {must}")


def check_samples(samples: Sequence[Sample]) -> None:
    """Check what every benchmark promises.

    Raises
    ------
    DataError
        If two samples share an id, or there are none.
    """
    if not samples:
        raise DataError("the benchmark has no samples; raise its limit or choose other tasks")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"two samples have the id {sample.id!r}; ids must be unique within a benchmark")
        seen.add(sample.id)
