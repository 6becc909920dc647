"""What a diagnostic is: an observer in the stack, token rows on disk, and a pure function from rows to findings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.diagnostics.labels import Label, Piece
from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from rich.console import Console

    from mitigate.benchmarks.base import Benchmark, Box, Sample
    from mitigate.compose import ResolvedRun
    from mitigate.core.facts import ModelFacts
    from mitigate.core.method import Method
    from mitigate.core.state import MethodState, Trace
    from mitigate.runner.single import ModelCache

TASKS = ("auto", "caption", "yes_no", "all")

Measures = dict[str, Any]
"""Name -> number, list of numbers (one per layer) or nested lists; plain JSON."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One generated token.

    Parameters
    ----------
    sample, image_id, task
        As in the benchmark's sample; the image is the cluster of the statistics.
    step
        Tokens generated before this one: the step that predicted it.
    token
        Its id.
    text
        Its characters in the reply, leading space included; empty for the end token.
    label
        ``grounded``, ``hallucinated`` or ``other``.
    first
        Whether it is the first piece of its word or, where an object's name is longer, of the name.
    position
        Its place among the generated tokens, from 0.
    length
        Number of generated tokens of the reply.
    measures
        What the diagnostic measured at the step that predicted it.
    """

    sample: str
    image_id: str
    task: str
    step: int
    token: int
    text: str
    label: Label
    first: bool
    position: int
    length: int
    measures: Measures


@dataclass(frozen=True, kw_only=True)
class SampleRows:
    """One answered sample: the unit of resuming, one line of the records.

    Parameters
    ----------
    id, image_id, task, prompt, meta
        As in the benchmark's sample.
    text
        The reply.
    finished
        Whether the model ended by itself.
    telemetry
        What the stack's methods counted for this sample.
    seconds
        Wall time of its batch divided by the batch size.
    measures
        What the diagnostic measured once per sample.
    rows
        Its tokens.
    """

    id: str
    image_id: str
    task: str
    prompt: str
    text: str
    finished: bool
    meta: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    measures: Measures = field(default_factory=dict)
    rows: tuple[TokenRow, ...] = ()


@dataclass(frozen=True)
class Context:
    """What is known about a sample once its reply is there; for measures that need the ground truth.

    Parameters
    ----------
    sample, pictures
        From the benchmark.
    pieces
        The reply's tokens with labels, one per generated token.
    boxes
        Word form -> boxes of the objects it names, or ``None`` where the benchmark knows no places.
    traces
        What the stack's methods reported; empty unless the diagnostic asks for it (`Diagnostic.traces`).
    row
        Row of the sample in its batch.
    plain
        The observer's state in a run of the same prompts without the stack (`Diagnostic.compares`), else ``None``.
    """

    sample: Sample
    pictures: Sequence[Image]
    pieces: Sequence[Piece]
    boxes: Mapping[str, Sequence[Box]] | None
    traces: Sequence[Trace]
    row: int
    plain: MethodState | None = None


@dataclass(frozen=True)
class Estimate:
    """A number with what is needed to believe it.

    Parameters
    ----------
    value
        In its own unit; NaN where undefined.
    low, high
        Its 95 % interval.
    n
        Number of observations behind it.
    p
        Two-sided p-value against the null value that its name implies; ``None`` if nothing is tested.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of results: cells are text, numbers, `Estimate` or ``None``."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Findings:
    """What an analysis found.

    Parameters
    ----------
    numbers
        Headline numbers by name.
    tables
        Tables, in the order in which they are shown.
    data
        What figures draw, as plain JSON.
    notes
        Sentences for the reader: what could not be measured, what to beware of.
    """

    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """Base class of every diagnostic: a frozen dataclass of plain parameters, set by ``diagnostic.KEY=VALUE``.

    A subclass brings `observer`, `measure` and `analyse`; the other methods have defaults.

    Parameters
    ----------
    tasks
        Which samples of the benchmark are generated: ``caption``, ``yes_no``, ``all``, or ``auto``: captions where
        the benchmark has some, else everything.
    resamples
        Bootstrap resamples of the images.
    ablation
        Also run the benchmark once per variant of the stack's methods, to see which part of a method matters. It
        multiplies the cost.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""
    analysis: ClassVar[frozenset[str]] = frozenset({"resamples", "ablation"})
    """Parameters that only the analysis reads: another value keeps the records."""
    traces: ClassVar[bool] = False
    """Whether the stack's methods shall report what they do (`Context.traces`)."""
    compares: ClassVar[bool] = False
    """Whether the prompts are also run without the stack (`Context.plain`)."""

    tasks: str = "auto"
    resamples: int = 2000
    ablation: bool = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        self.require(self.tasks in TASKS, "tasks", f"be one of {', '.join(TASKS)}")
        self.require(self.resamples >= 100, "resamples", "be at least 100")

    def check_model(self, facts: ModelFacts) -> None:
        """Refuse parameters that do not fit a model, such as layers it does not have; once it is loaded."""

    def bind(self, benchmark: Benchmark) -> Self:
        """Return the diagnostic as it watches a benchmark: without what needs more than the benchmark knows."""
        return self

    def observer(self, facts: ModelFacts) -> Method:
        """Return the method that watches: read-only, it joins the stack as its last one."""
        raise NotImplementedError(f"{type(self).__name__} does not observe: override observer()")

    def measure(self, state: MethodState, row: int) -> list[Measures]:
        """Return what the observer saw of one request row, one entry per step, in order.

        Entries beyond the reply's tokens are dropped; an empty list means that nothing is measured per token.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing: override measure()")

    def measure_sample(self, state: MethodState, row: int, context: Context) -> Measures:
        """Return what is measured once per sample."""
        return {}

    def analyse(self, rows: Sequence[TokenRow]) -> Findings:
        """Turn token rows into findings: a pure function."""
        raise NotImplementedError(f"{type(self).__name__} does not analyse: override analyse()")

    def study(self, samples: Sequence[SampleRows]) -> Findings:
        """Turn whole samples into findings; those of their token rows by default."""
        return self.analyse([row for sample in samples for row in sample.rows])

    def draw(self, findings: Findings, folder: Path) -> list[Path]:
        """Draw figures into a folder and return their PNG files."""
        return []

    def illustrate(self, samples: Sequence[SampleRows], benchmark: Benchmark, folder: Path) -> list[Path]:
        """Draw figures that need the pictures themselves; returns their PNG files."""
        return []

    def follow_up(
        self,
        resolved: ResolvedRun,
        samples: Sequence[SampleRows],
        folder: Path,
        *,
        console: Console,
        models: ModelCache,
    ) -> tuple[Findings, list[Path]]:
        """Measure and draw what needs the model again once all samples are recorded; returns PNG files, too."""
        return Findings(), []

    def params(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def choose(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that are generated.

        Raises
        ------
        ConfigError
            If there are none of the wanted task.
        """
        wanted = self.tasks
        if wanted == "auto":
            wanted = "caption" if any(sample.task == "caption" for sample in samples) else "all"
        chosen = [sample for sample in samples if wanted in ("all", sample.task)]
        self.require(bool(chosen), "tasks", "name a task of this benchmark")
        return chosen

    def require(self, condition: bool, parameter: str, must: str) -> None:
        """Raise a `ConfigError` that names the parameter unless the condition holds."""
        if not condition:
            shown = json.dumps(getattr(self, parameter), default=str)
            raise ConfigError(f"diagnostic.{parameter}={shown} must {must}")


def words_only(rows: Iterable[TokenRow]) -> list[TokenRow]:
    """Return the rows that begin a word: later pieces follow from the first and would count it again."""
    return [row for row in rows if row.first]
