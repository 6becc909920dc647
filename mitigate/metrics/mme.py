"""MME: two yes/no questions on each picture, one for each answer; both right counts once more.

A reply is read as the official tool does: lower-cased, its first four characters contain "yes", or else "no", or it is
neither ("other") and wrong. White space is not stripped, and tabs and line ends are characters like any other; the tool
itself cannot read replies that hold them, because they break its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Array, Metric, Scorer, divide, ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.metrics.yes_no import Answer
    from mitigate.records import SampleRecord

PERCEPTION: Final = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION: Final = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS: Final = (*PERCEPTION, *COGNITION)
#: Sums of task scores; papers on hallucination report the last one.
TOTALS: Final = {
    "perception": PERCEPTION,
    "cognition": COGNITION,
    "total": TASKS,
    "hallucination": ("existence", "count", "position", "color"),
}
_COUNTS: Final = ("questions", "correct", "pictures", "both_right", "other")
_ALL: Final = ("mme/questions", "mme/correct", "mme/other", "mme/said_yes", "mme/words", "mme/breaking")
#: What separates the fields and lines of the tool's files, and so cannot be in a reply.
_SEPARATORS: Final = frozenset("\t\n\r")


def parse(text: str) -> Answer | None:
    """Read a reply as the official tool does; ``None`` is what it calls other."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


@lru_cache(maxsize=64)
def _names(task: str) -> tuple[str, ...]:
    return tuple(f"mme/{task}/{count}" for count in _COUNTS)


def picture_counts(task: str, answers: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Count the two answers about one picture of a task.

    Parameters
    ----------
    task
        One of `TASKS`.
    answers
        Reply and label (``yes`` or ``no``) of both questions.
    """
    read = [parse(text) for text, _ in answers]
    right = sum(answer == label for answer, (_, label) in zip(read, answers, strict=True))
    other = read.count(None)
    row = dict(zip(_names(task), map(float, (len(read), right, 1, right == len(read), other)), strict=True))
    words = sum(len(text.split()) for text, _ in answers)
    breaking = sum(not _SEPARATORS.isdisjoint(text) for text, _ in answers)
    return row | dict(zip(_ALL, map(float, (len(read), right, other, read.count("yes"), words, breaking)), strict=True))


def _score(sums: Array) -> Array:
    return 100 * (divide(sums[..., 1], sums[..., 0]) + divide(sums[..., 3], sums[..., 2]))


def _task_metrics(task: str) -> list[Metric]:
    questions, correct, pictures, both, _ = _names(task)  # other is there for the warnings
    return [
        Metric(
            name=f"mme/{task}/score",
            title=f"MME {task}",
            columns=_names(task),
            compute=_score,
            higher_is_better=True,
            percent=False,
            unit="points",
        ),
        ratio(f"mme/{task}/acc", f"MME {task} acc", correct, questions, higher_is_better=True, detail=True),
        ratio(f"mme/{task}/acc_plus", f"MME {task} acc+", both, pictures, higher_is_better=True, detail=True),
    ]


def _total(name: str, tasks: Sequence[str]) -> Metric:
    width = len(_COUNTS)

    def compute(sums: Array) -> Array:
        scores = [_score(sums[..., start : start + width]) for start in range(0, width * len(tasks), width)]
        return np.asarray(np.sum(scores, axis=0), dtype=np.float64)

    return Metric(
        name=f"mme/{name}",
        title=f"MME {name}",
        columns=tuple(column for task in tasks for column in _names(task)),
        compute=compute,
        higher_is_better=True,
        percent=False,
        unit="points",
    )


def mme_metrics(tasks: Sequence[str] = TASKS) -> list[Metric]:
    """Return the totals all of whose tasks are there, the metrics of every task, and context.

    Per task: accuracy (acc), share of pictures with both answers right (acc+), and the score, 100 (acc + acc+).
    """
    questions, correct, other, said_yes, words, breaking = _ALL
    return [
        *(_total(name, parts) for name, parts in TOTALS.items() if set(parts) <= set(tasks)),
        ratio("mme/accuracy", "MME accuracy", correct, questions, higher_is_better=True),
        *(metric for task in tasks for metric in _task_metrics(task)),
        ratio("mme/unparsed_rate", "MME unparsed", other, questions, higher_is_better=False),
        ratio("mme/yes_rate", "MME yes-rate", said_yes, questions),
        Metric(
            name="mme/words",
            title="MME words",
            columns=(words, questions, breaking),  # the last one is there for the warnings
            compute=lambda sums: divide(sums[..., 0], sums[..., 1]),
            percent=False,
            unit="words",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Mme(Scorer):
    """MME of questions that know their answer (``meta["label"]``) and their task (``meta["mme"]``).

    Parameters
    ----------
    tasks
        Tasks to score.
    """

    name: ClassVar[str] = "mme"
    summary: ClassVar[str] = "pairs of yes/no questions: accuracy, both right, and the score of 14 tasks"

    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        """Check the parameters; tasks may come as a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ConfigError(f"unknown MME task {unknown[0]!r}; it must be one of {', '.join(TASKS)}")

    def metrics(self) -> list[Metric]:
        """Return the metrics of `mme_metrics`."""
        return mme_metrics(self.tasks)

    def score_cluster(self, records: Sequence[SampleRecord], benchmark: Benchmark) -> Mapping[str, float]:
        """Count the pictures of a cluster, each with both of its answers; other answers are not counted.

        Raises
        ------
        DataError
            If a picture has not exactly two answers, lacks its ground truth, or belongs to another task.
        """
        pictures: dict[tuple[str, str], list[SampleRecord]] = {}
        for record in records:
            if "mme" in record.meta:
                pictures.setdefault((record.meta["mme"], record.image_id), []).append(record)
        total: dict[str, float] = {}
        for (task, picture), answers in pictures.items():
            if task not in self.tasks:
                raise DataError(f"sample {answers[0].id!r} is of the task {task!r}; scored are {', '.join(self.tasks)}")
            if len(answers) != 2:
                raise DataError(f"MME counts pairs: {picture} needs both its answers, but has {len(answers)}")
            pair = [(answer.text, benchmark.truth(answer, "label")) for answer in answers]
            for column, amount in picture_counts(task, pair).items():
                total[column] = total.get(column, 0.0) + amount
        return total

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Name what the official tool fails on: tasks without any yes or no, and replies that break its files."""
        found = []
        silent = []
        for task in self.tasks:
            questions, _, _, _, other = (sums.get(name, 0.0) for name in _names(task))
            if questions and other == questions:
                silent.append(task)
        if silent:
            tasks = ", ".join(silent)
            found.append(f"mme: no reply begins with yes or no in {tasks}: scored 0, where the official tool fails")
        if breaking := sums.get("mme/breaking"):
            found.append(
                f"mme: {breaking:g} of {sums['mme/questions']:g} replies hold a tab or line end, which count as any "
                "character here and break the official tool's files"
            )
        return found
