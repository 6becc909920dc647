"""MME: fourteen tasks of perception and cognition, with one "yes" and one "no" question on each picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mitigate.benchmarks.base import Benchmark, Sample, Span, whole
from mitigate.data import Source, data_folder, read_lines, require_file
from mitigate.data.catalogue import MME
from mitigate.errors import DataError
from mitigate.metrics.mme import TASKS, TOTALS, parse
from mitigate.metrics.mme import Mme as MmeScorer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord


@dataclass(frozen=True, kw_only=True)
class Mme(Benchmark):
    """The questions of the official tool's files, one per task.

    Parameters
    ----------
    limit
        Number of pictures of each task, in the order of its file; all of them if not given.
    tasks
        Any of the 14 tasks.
    prompt
        What is asked; ``{question}`` stands for the question of the file, which asks for yes or no already.
    answer_tokens
        Most tokens a reply may have; ``null`` leaves it to the decoding configuration.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "mme"
    summary: ClassVar[str] = "MME: pairs of yes/no questions, 14 tasks of perception and cognition"
    sources: ClassVar[tuple[Source, ...]] = MME
    ids: ClassVar[str] = "task/picture/line of the pair, such as existence/000000006040.jpg/0"
    grouped: ClassVar[bool] = True

    tasks: tuple[str, ...] = TASKS
    prompt: str = "{question}"
    answer_tokens: int | None = 16
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters; tasks may come as a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        super().__post_init__()
        self.require_some_of(TASKS, "tasks")
        self.require_question(self.prompt, self.answer_tokens)

    def samples(self) -> list[Sample]:
        """Return the questions task by task, in the order of their files."""
        return [sample for task in self.tasks for sample in self._task(task)]

    def _task(self, task: str) -> list[Sample]:
        path = require_file(data_folder(self.name, self.data_dir) / f"{task}.txt", self.name)
        rows = [(f"{path}:{number}", *_row(line, f"{path}:{number}")) for number, line in read_lines(path)]
        if not rows:
            raise DataError(f"{path} is empty; it must hold two lines for each picture")
        samples: list[Sample] = []
        seen: dict[str, None] = {}
        for index in range(0, len(rows), 2):
            where, picture = rows[index][:2]
            pair = rows[index : index + 2]
            if len(pair) != 2 or pair[1][1] != picture:
                raise DataError(f"{where}: {picture} must have two questions, in this line and the next")
            if picture in seen:
                raise DataError(f"{where}: {picture} is there twice; keep one pair of its questions")
            seen[picture] = None
            if self.limit is None or len(seen) <= self.limit:
                samples += [
                    Sample(
                        id=f"{task}/{picture}/{position}",
                        image_id=f"{task}/{picture}",
                        task="yes_no",
                        prompt=self.prompt.replace("{question}", question),
                        meta={"label": label, "mme": task},
                    )
                    for position, (_, _, question, label) in enumerate(pair)
                ]
        return samples

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture's file: below ``images/TASK/``, or its folder ``images/`` as the release has for some."""
        task, _, picture = sample.image_id.partition("/")
        folder = data_folder(self.name, self.data_dir) / "images" / task
        inner = folder / "images"
        return [(inner if inner.is_dir() else folder) / picture]

    def scorers(self) -> list[Scorer]:
        """Return MME's metrics of the chosen tasks."""
        return [MmeScorer(tasks=self.tasks)]

    @property
    def headline(self) -> tuple[str, ...]:
        """Return perception and cognition, else the hallucination subset, else accuracy: what all its tasks are for."""
        for names in (("perception", "cognition"), ("hallucination",)):
            full = [f"mme/{name}" for name in names if set(TOTALS[name]) <= set(self.tasks)]
            if full:
                return tuple(full)
        return ("mme/accuracy",)

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return `answer_tokens`."""
        return self.answer_tokens

    def correct(self, record: SampleRecord) -> bool:
        """Return whether the reply, as the official tool reads it, is right."""
        return bool(parse(record.text) == self.truth(record, "label"))

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return the task."""
        return {"task": self.truth(record, "mme")}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark the whole reply as right or wrong."""
        return whole(text, parse(text) == self.truth(sample, "label"))


def _row(line: str, where: str) -> tuple[str, str, str]:
    """Cut a line into picture, question and label; a fourth field is the reply of a results file, and not ours."""
    fields = line.split("\t")
    if len(fields) not in (3, 4):
        raise DataError(
            f"{where}: a line is PICTURE, QUESTION, Yes or No, and in a results file the reply, separated by single "
            f"tabs; this one has {len(fields)} fields"
        )
    picture, question, label = fields[:3]
    if not picture or "/" in picture or "\\" in picture:
        raise DataError(f"{where}: the first field must be the name of a picture, not {picture!r:.60}")
    if label.lower() not in ("yes", "no"):
        raise DataError(f"{where}: the answer must be Yes or No, not {label!r:.60}")
    return picture, question, label.lower()
