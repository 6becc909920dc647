"""What a benchmark is: samples, their pictures, and a score that is a pure function of the records."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mitigate.data import Source, open_image, require_file
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts, Metric
from mitigate.records import SampleRecord, content_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from mitigate.metrics.base import Scorer

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
        ``caption``, ``yes_no`` or ``open`` (anything else that is asked).
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


def whole(text: str, right: bool) -> list[Span]:
    """Mark a reply as right or hallucinated as a whole; an empty one has nothing to mark."""
    return [Span(text, "correct" if right else "hallucinated")] if text else []


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Base class of every benchmark: a frozen dataclass of plain parameters.

    A subclass brings `samples`, `images` (or `image_files`), and either `scorers` or `metrics` and `score`; the rest
    follows from them.

    Parameters
    ----------
    limit
        How much of the benchmark to use, in its own unit; ``None`` for its default size.
    extra_metrics
        Names of further metrics to score the answers with (`mitigate list metrics`).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""
    sources: ClassVar[tuple[Source, ...]] = ()
    """The files it needs below its data folder (``mitigate data``)."""
    ids: ClassVar[str] = ""
    """What a sample's id looks like, for people whose answers come from elsewhere (``mitigate score``)."""
    grouped: ClassVar[bool] = False
    """Whether the answers of a cluster count together: where one of them failed, none of the others means anything."""

    limit: int | None = None
    extra_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parameters."""
        self.require(self.limit is None or self.limit >= 1, "limit", "be at least 1, or null for the default size")
        object.__setattr__(self, "extra_metrics", tuple(self.extra_metrics))  # may come as a list

    def samples(self) -> list[Sample]:
        """Return all samples, always the same ones in the same order."""
        raise NotImplementedError(f"{type(self).__name__} has no samples: override samples()")

    def images(self, sample: Sample) -> list[Image]:
        """Return the pictures of a sample, RGB, in the order the prompt takes them; by default its `image_files`."""
        return [open_image(path) for path in self.image_files(sample)]

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the files of a sample's pictures; a benchmark that draws its pictures overrides `images` instead."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures: override image_files() or images()")

    def scorers(self) -> list[Scorer]:
        """Return the metric plugins the benchmark is scored with."""
        return []

    def metrics(self) -> list[Metric]:
        """Return the benchmark's own metrics in the order of the table; by default those of its scorers."""
        if scorers := self.scorers():
            return [metric for scorer in scorers for metric in scorer.metrics()]
        raise NotImplementedError(f"{type(self).__name__} has no metrics: override scorers() or metrics()")

    def score(self, record: SampleRecord) -> Mapping[str, float]:
        """Return what one answered sample adds to the count columns; by default what the scorers count."""
        if scorers := self.scorers():
            return {column: amount for scorer in scorers for column, amount in scorer.score(record, self).items()}
        raise NotImplementedError(f"{type(self).__name__} cannot score: override scorers() or score()")

    def cluster(self, record: SampleRecord) -> str:
        """Return what is resampled as a whole: answers of one cluster are not independent. By default the picture."""
        return record.image_id

    def graded(
        self, records: Sequence[SampleRecord], folder: Path, report: Callable[[int, int], None] | None = None
    ) -> list[SampleRecord]:
        """Return the records with what scoring needs beyond the answers, such as a judge's verdicts in their ``meta``.

        Parameters
        ----------
        records
            Answers that did not fail.
        folder
            The run's folder: verdicts are kept there, so that nothing is asked twice.
        report
            Called with how many are graded and how many there are.
        """
        return list(records)

    def aliases(self, sample: Sample) -> Sequence[str]:
        """Return other names under which the answers of another tool may know a sample."""
        return ()

    def all_metrics(self) -> list[Metric]:
        """Return the benchmark's own metrics and then the `extra_metrics`.

        Raises
        ------
        ConfigError
            If an extra metric is unknown, broken, or measures what is measured already.
        """
        found = self.metrics()
        for scorer in self._extra():
            taken = {metric.name for metric in found} | {column for metric in found for column in metric.columns}
            for metric in scorer.metrics():
                both = sorted(taken.intersection({metric.name, *metric.columns}))
                self.require(
                    not both, "extra_metrics", f"leave out {scorer.name}: {', '.join(both[:1])} is measured already"
                )
                found.append(metric)
        return found

    def _extra(self) -> list[Scorer]:
        from mitigate.registry import metrics

        return [metrics().get(name)() for name in self.extra_metrics]

    def truth(self, sample: Sample | SampleRecord, key: str) -> Any:
        """Return a part of a sample's ground truth.

        Raises
        ------
        DataError
            If the sample has none.
        """
        try:
            return sample.meta[key]
        except KeyError:
            raise DataError(
                f"sample {sample.id!r} has no {key!r} in its meta; it was not made by this benchmark, "
                f"or a metric does not fit it"
            ) from None

    def object_words(self) -> Mapping[str, str]:
        """Return word form -> object class, for metrics that look for objects in texts.

        Raises
        ------
        DataError
            If the benchmark has no such table.
        """
        raise DataError(f"the benchmark {self.name} has no table of object words; take the metric that needs it out")

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return the most tokens a reply may have, or ``None`` to leave it to the decoding configuration."""
        return None

    def correct(self, record: SampleRecord) -> bool | None:
        """Return whether an answer is right, for McNemar; ``None`` where that is not a yes/no matter."""
        return None

    def errors(self, record: SampleRecord) -> float | None:
        """Return how wrong an answer is: 0 where it is right, ``None`` where nobody can say.

        By default 0 or 1 after `correct`, otherwise how many pieces of the reply `marked` finds hallucinated.
        """
        right = self.correct(record)
        if right is not None:
            return float(not right)
        kinds = [span.kind for span in self.marked(record, record.text)]
        return float(kinds.count("hallucinated")) if set(kinds) - {"plain"} or record.task == "caption" else None

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return a sample's categories, by the name of the breakdown: ``{"type": "counting"}``."""
        return {}

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
        """Score records and sum the counts per cluster.

        Raises
        ------
        DataError
            If a sample failed, so that its reply would be scored as if the model had been silent.
        """
        answers = list(records)
        for record in answers:
            if record.error is not None:
                raise DataError(
                    f"sample {record.id!r} failed ({record.error}) and cannot be scored; "
                    "start the run again, finished samples are kept"
                )
        columns = [column for metric in self.all_metrics() for column in metric.columns]
        return ImageCounts.accumulate(self._rows(answers), columns)

    def _rows(self, answers: Sequence[SampleRecord]) -> Iterator[tuple[str, Mapping[str, float]]]:
        # Every cluster has a row, also where no metric counts anything in it: it is drawn like the others.
        yield from ((self.cluster(answer), {}) for answer in answers)
        own = self.scorers()
        if not own or type(self).score is not Benchmark.score:
            yield from ((self.cluster(answer), self.score(answer)) for answer in answers)
            own = []
        for scorer in [*own, *self._extra()]:
            yield from scorer.score_all(answers, self)

    def warnings(self, counts: ImageCounts) -> list[str]:
        """Return what the metrics have to say about the counts, such as that a number is not defined."""
        sums = {name: float(column.sum()) for name, column in counts.columns.items()}
        return [line for scorer in [*self.scorers(), *self._extra()] for line in scorer.warnings(sums)]

    def params(self) -> dict[str, Any]:
        """Return the parameters by name, as plain JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def data_hash(self, pictures: Mapping[str, str | None] | None = None) -> str:
        """Return a sha256 over the samples' ground truth and their pictures.

        Parameters
        ----------
        pictures
            What `picture_hashes` gave; by default it is asked.
        """
        found = self.picture_hashes() if pictures is None else pictures
        truths = [[sample.id, sample.image_id, sample.task, sample.meta] for sample in self.samples()]
        return content_hash([self.name, self.version, *truths, *map(list, found.items())])

    def picture_hashes(self, *, skip: bool = False) -> dict[str, str | None]:
        """Read all pictures, so that a broken one is known before anything is answered.

        Parameters
        ----------
        skip
            Whether pictures that cannot be had get ``None`` instead of raising.

        Returns
        -------
        dict
            Image id -> sha256: of the files, or of the pixels where pictures are drawn.
        """
        found: dict[str, str | None] = {}
        for sample in self.samples():
            if sample.image_id not in found:
                try:
                    found[sample.image_id] = content_hash(self._pictures(sample))
                except Exception:
                    if not skip:
                        raise
                    found[sample.image_id] = None
        return found

    def _pictures(self, sample: Sample) -> list[Any]:
        """Return what identifies a sample's pictures: the bytes of their files, or pixels where they are drawn."""
        if type(self).images is not Benchmark.images:
            return [part for image in self.images(sample) for part in ([*image.size], image.tobytes())]
        files = [require_file(path, self.name) for path in self.image_files(sample)]
        for path in files:
            open_image(path)
        return [path.read_bytes() for path in files]

    def prompt_hash(self) -> str:
        """Return a sha256 over the prompts."""
        return content_hash([sample.id, sample.prompt] for sample in self.samples())

    def require(self, condition: bool, parameter: str, must: str) -> None:
        """Raise a `ConfigError` that names the parameter unless the condition holds."""
        if not condition:
            shown = json.dumps(getattr(self, parameter), default=str)
            raise ConfigError(f"benchmark.{parameter}={shown} must {must}")

    def require_some_of(self, known: Sequence[str], parameter: str) -> None:
        """Raise a `ConfigError` unless the parameter lists some of the known names, each once."""
        chosen = getattr(self, parameter)
        fits = bool(chosen) and set(chosen) <= set(known) and len(set(chosen)) == len(chosen)
        self.require(fits, parameter, f"list some of {', '.join(known)}, each once")

    def require_question(self, prompt: str, answer_tokens: int | None) -> None:
        """Raise a `ConfigError` unless ``prompt`` has a place for the question and ``answer_tokens`` allows a reply."""
        self.require("{question}" in prompt, "prompt", "contain {question}")
        self.require(answer_tokens is None or answer_tokens >= 1, "answer_tokens", "be at least 1, or null")


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
