"""AMBER: captions against annotated objects, and yes/no questions where finding the "no" is the task.

The official script is followed to its roundings: every denominator begins at 0.001, percentages are rounded to one
decimal, and F1 is computed from rounded precision and recall. One clean caption therefore has a Hal of 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.amber_words import Judgement, Noun, WordLists, judge, nouns, read_words
from mitigate.metrics.base import Array, Metric, Scorer, ratio
from mitigate.metrics.yes_no import Answer, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark, Sample
    from mitigate.records import SampleRecord

TASKS: Final = ("generative", "existence", "attribute", "relation")
PARSERS: Final = ("official", "strict")
#: Type in the annotations -> row of the results; the annotations call relations by two names.
KINDS: Final = {
    "generative": "generative",
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
_ATTRIBUTES: Final = ("state", "number", "action")
#: What every denominator of the official script begins with.
_START: Final = 0.001

_CAPTION: Final = tuple(
    f"amber/{name}"
    for name in (
        "captions",
        "clean_captions",
        "nouns",
        "hallucinated_nouns",
        "objects",
        "covered_objects",
        "likely_hallucinations",
        "marked_hallucinations",
        "caption_words",
        "unassociated_captions",
    )
)
_QUESTION: Final = ("amber/questions", "amber/said_yes", "amber/unparsed")
_COUNTS: Final = ("questions", "correct", "answered_no", "truly_no", "both_no")


def kind_of(task: str) -> tuple[str, ...]:
    """Return the kinds of sample a task consists of."""
    return _ATTRIBUTES if task == "attribute" else (task,)


def read_answer(text: str, parser: str) -> Answer | None:
    """Read a reply as yes or no: ``official`` wants exactly ``Yes`` or ``No``, ``strict`` one of the two words."""
    if parser == "strict":
        return parse(text, "strict")
    return {"Yes": "yes", "No": "no"}.get(text)  # type: ignore[return-value]


def caption_counts(
    found: Sequence[str], truth: Sequence[str], hallu: Sequence[str], words: WordLists, length: int = 0
) -> dict[str, float]:
    """Count one caption.

    Parameters
    ----------
    found
        All its nouns in their base form, case kept.
    truth, hallu
        Objects that are there, and objects that models like to invent.
    words
        The benchmark's words.
    length
        Words of the caption.
    """
    result = judge(words.kept(found), truth, hallu, words)
    wrong = result.kinds.count("hallucinated")
    unknown = any(entry not in words.associates for entry in (*truth, *hallu))
    counts = (
        *(1, wrong == 0, len(result.kinds), wrong, len(truth), len(result.covered), len(hallu), len(result.marked)),
        *(length, unknown),
    )
    return dict(zip(_CAPTION, map(float, counts), strict=True))


def answer_counts(text: str, truth: str, kind: str, parser: str = "official") -> dict[str, float]:
    """Count one reply to a yes/no question.

    Parameters
    ----------
    text
        Raw reply.
    truth
        ``yes`` or ``no``.
    kind
        ``existence``, ``state``, ``number``, ``action`` or ``relation``.
    parser
        How the reply is read (`read_answer`); one that is neither yes nor no is wrong.
    """
    answer = read_answer(text, parser)
    no = answer == "no"
    counts = (1, answer == truth, no, truth == "no", no and truth == "no")
    row = {f"amber/{kind}/{name}": float(count) for name, count in zip(_COUNTS, counts, strict=True)}
    return row | dict(zip(_QUESTION, (1.0, float(answer == "yes"), float(answer is None)), strict=True))


def rounded(values: Array) -> Array:
    """Round to one decimal exactly as Python's ``round`` does, which NumPy does not where a value is close to a tie."""
    values = np.asarray(values, dtype=np.float64)
    result: Array = np.array(np.round(values, 1))
    close = np.abs(values * 10 % 1 - 0.5) < 1e-6
    result[close] = [round(float(value), 1) for value in values[close]]
    return result


def _percent(part: Array, whole: Array, start: float = _START) -> Array:
    return rounded(part / (start + whole) * 100)


def _where(asked: Array, percents: Array) -> Array:
    """Return rates; undefined where nothing was asked (the script's 0.001 would make up a number)."""
    return np.where(asked > 0, percents / 100, np.nan)


def _caption_metric(
    name: str, title: str, part: int, whole: int, *, higher: bool = False, rest: bool = False
) -> Metric:
    def compute(sums: Array) -> Array:
        share = _percent(sums[..., 1], sums[..., 2])
        if rest:  # what is not in the part, subtracted before the rounding
            share = rounded(100 - sums[..., 1] / (_START + sums[..., 2]) * 100)
        return _where(sums[..., 0], share)

    return Metric(
        name=f"amber/{name}",
        title=title,
        # The last column is no part of the number; `Amber.warnings` looks at it.
        columns=(_CAPTION[0], _CAPTION[part], _CAPTION[whole], _CAPTION[9]),
        compute=compute,
        higher_is_better=higher,
        empty=1.0 if rest else 0.0,
    )


def _caption_metrics() -> list[Metric]:
    return [
        _caption_metric("chair", "AMBER CHAIR", 3, 2),
        _caption_metric("cover", "AMBER Cover", 5, 4, higher=True),
        _caption_metric("hal", "AMBER Hal", 1, 0, rest=True),
        _caption_metric("cog", "AMBER Cog", 7, 6),
        ratio("amber/words", "AMBER words", _CAPTION[8], _CAPTION[0], percent=False, unit="words"),
    ]


def _answer_metrics(name: str, title: str, kinds: Sequence[str], *, start: float, f1_start: float) -> list[Metric]:
    """Return accuracy, precision, recall and F1 of "no" over the questions of some kinds."""
    columns = tuple(f"amber/{kind}/{count}" for kind in kinds for count in _COUNTS)

    def compute(value: Callable[[Array], Array]) -> Callable[[Array], Array]:
        def metric(sums: Array) -> Array:
            total = sums.reshape(*sums.shape[:-1], len(kinds), len(_COUNTS)).sum(axis=-2)
            return _where(total[..., 0], value(total))

        return metric

    def accuracy(sums: Array) -> Array:
        return _percent(sums[..., 1], sums[..., 0], start)

    def precision(sums: Array) -> Array:
        return _percent(sums[..., 4], sums[..., 2], start)

    def recall(sums: Array) -> Array:
        return _percent(sums[..., 4], sums[..., 3], start)

    def f1(sums: Array) -> Array:
        p, r = precision(sums) / 100, recall(sums) / 100
        return rounded(2 * p * r / (p + r + f1_start) * 100)

    return [
        Metric(
            name=f"amber/{name}{statistic.__name__}",
            title=f"AMBER {title}{label}",
            columns=columns,
            compute=compute(statistic),
            higher_is_better=True,
            empty=0.0,
            detail=statistic in (precision, recall),
        )
        for statistic, label in ((accuracy, "accuracy"), (precision, "precision"), (recall, "recall"), (f1, "F1"))
    ]


def amber_metrics(tasks: Sequence[str] = TASKS) -> list[Metric]:
    """Return the official numbers of some tasks, and what goes with them.

    ``amber/score``, the mean of 100 - CHAIR and F1, is from papers; the official script does not print it.
    """
    captions = _caption_metrics() if "generative" in tasks else []
    asked = [task for task in TASKS if task in tasks and task != "generative"]
    everything = [kind for task in asked for kind in kind_of(task)]
    overall: list[Metric] = []
    if len(asked) == 3:
        overall = _answer_metrics("", "", everything, start=_START, f1_start=0.0001)
    rows: list[Metric] = []
    for task in asked:
        kinds = kind_of(task)
        f1_start = 0.001 if task == "existence" else 0.0001
        rows += _answer_metrics(f"{task}/", f"{task} ", kinds, start=_START * len(kinds), f1_start=f1_start)
        for kind in kinds if task == "attribute" else ():
            rows += _answer_metrics(f"{kind}/", f"{kind} ", (kind,), start=_START, f1_start=0.0001)
    score = [_score(captions[0], overall[3])] if captions and overall else []
    questions, said_yes, unparsed = _QUESTION
    context = [
        ratio("amber/yes_rate", "AMBER yes-rate", said_yes, questions),
        ratio("amber/unparsed_rate", "AMBER unparsed", unparsed, questions, higher_is_better=False),
    ]
    return [*captions, *score, *overall, *rows, *(context if asked else [])]


def _score(chair: Metric, f1: Metric) -> Metric:
    width = len(chair.columns)
    return Metric(
        name="amber/score",
        title="AMBER score (of papers)",
        columns=(*chair.columns, *f1.columns),
        compute=lambda sums: (1 - chair.compute(sums[..., :width]) + f1.compute(sums[..., width:])) / 2,
        higher_is_better=True,
    )


@dataclass(frozen=True, kw_only=True)
class Amber(Scorer):
    """AMBER of captions and yes/no answers that know their annotations (``meta["type"]``, ``truth``, ``hallu``).

    Parameters
    ----------
    data
        Folder of ``relation.json`` and ``safe_words.txt``; captions need it.
    similarity
        Table of similar words (`mitigate.metrics.amber_words.read_words`); without one only equal words are alike.
    parser
        How yes/no replies are read: ``official`` or ``strict``.
    tasks
        Tasks to score.
    """

    name: ClassVar[str] = "amber"
    summary: ClassVar[str] = "AMBER: invented objects in captions, and yes/no answers, by the official rules"

    data: str | None = None
    similarity: str | None = None
    parser: str = "official"
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        """Check the parameters; tasks may come as a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.parser not in PARSERS:
            raise ConfigError(f"unknown parser {self.parser!r} of AMBER; it must be one of {', '.join(PARSERS)}")

    def metrics(self) -> list[Metric]:
        """Return the metrics of `amber_metrics`."""
        return amber_metrics(self.tasks)

    def words(self) -> WordLists:
        """Return the benchmark's words.

        Raises
        ------
        ConfigError, DataError
            If nobody said where they are, or they are damaged.
        """
        if self.data is None:
            raise ConfigError("the metric amber needs AMBER's lists of words; score captions with benchmark=amber")
        return read_words(Path(self.data), Path(self.similarity).expanduser() if self.similarity else None)

    def judged(self, sample: Sample | SampleRecord, text: str, benchmark: Benchmark) -> tuple[list[Noun], Judgement]:
        """Return the nouns of a caption that count, and what they amount to."""
        words = self.words()
        found = list(nouns(text, words.vocabulary))
        truth, hallu = benchmark.truth(sample, "truth"), benchmark.truth(sample, "hallu")
        return found, judge([noun.lemma for noun in found], truth, hallu, words)

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a caption or an answer to a yes/no question; other replies are not counted.

        Raises
        ------
        ConfigError, DataError
            If the record lacks its annotations, is of another task, or a caption cannot be read (nltk).
        """
        if record.task not in ("caption", "yes_no"):
            return {}
        kind = KINDS.get(benchmark.truth(record, "type"))
        if not any(kind in kind_of(task) for task in self.tasks):
            raise DataError(
                f"sample {record.id!r} is of the type {record.meta['type']!r}; scored are {', '.join(self.tasks)}"
            )
        truth = benchmark.truth(record, "truth")
        if kind != "generative":
            return answer_counts(record.text, truth, str(kind), self.parser)
        words = self.words()
        found = [noun.lemma for noun in nouns(record.text, words.vocabulary)]
        return caption_counts(found, truth, benchmark.truth(record, "hallu"), words, length=len(record.text.split()))

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Say where the numbers are not those of the official script, or would surprise."""
        found = []
        if sums.get(_CAPTION[0]) and self.similarity is None:
            found.append(
                "amber: only equal words are alike; the official script compares vectors of spaCy's en_core_web_lg "
                "(give benchmark.similarity, see scripts/make_amber_similarity.py)"
            )
        if unknown := sums.get(_CAPTION[9]):
            found.append(
                f"amber: annotations of {unknown:g} captions name words that relation.json does not have; they have no "
                "associates (the official script stops with a KeyError)"
            )
        if (unparsed := sums.get(_QUESTION[2])) and self.parser == "official":
            found.append(
                f"amber: {unparsed:g} of {sums[_QUESTION[0]]:g} replies are neither exactly 'Yes' nor exactly 'No' and "
                "count as wrong; parser=strict looks for the words"
            )
        return found
