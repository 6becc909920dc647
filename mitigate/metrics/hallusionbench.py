"""HallusionBench: the same questions on original and edited pictures, counted per question, pair and figure.

A verdict says whether an answer is right (1), wrong (0) or unclear (2). The grader ``judge`` takes it from what a
language model says about the answer; ``exact`` compares the one word "yes" or "no" of the reply (as the parser
``strict`` of POPE) with the right answer, and a reply with words but neither or both is unclear.

Right is verdict 1. Where a question is asked without its picture (category VS, figure 0) nobody can know, and verdict 2
is right, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Array, Metric, Scorer, divide, ratio
from mitigate.metrics.yes_no import parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

Verdict = Literal[0, 1, 2]
GRADERS: Final = ("exact", "judge")
_PREFIX: Final = "hallusionbench/"
_COUNTS: Final = (
    *("questions", "correct", "pairs", "pairs_right", "figures", "figures_right"),
    *("easy", "easy_right", "hard", "hard_right"),
    *("said_yes", "label_yes", "wrong", "wrong_no", "unparsed", "words"),
)


def judge_verdict(reply: str) -> Verdict:
    """Read what a judge says: "incorrect" anywhere in it, else "correct" (so "not correct", too), else unclear."""
    lower = reply.lower()
    if "incorrect" in lower:
        return 0
    return 1 if "correct" in lower else 2


def exact_verdict(text: str, label: str) -> Verdict:
    """Compare a reply with the label, ``yes`` or ``no``; a reply without any word is wrong, not unclear."""
    answer = parse(text, "strict")
    if answer is None:
        return 2 if any(character.isalnum() for character in text) else 0
    return 1 if answer == label else 0


def verdict(meta: Mapping[str, Any], text: str, grader: str) -> Verdict:
    """Grade one answer.

    Raises
    ------
    DataError
        If the judge has not said anything about it yet.
    """
    if grader == "exact":
        return exact_verdict(text, meta["label"])
    if "judge_reply" not in meta:
        raise DataError("an answer has no verdict of a judge: grade the records first, or set benchmark.grader=exact")
    return judge_verdict(meta["judge_reply"])


def without_picture(meta: Mapping[str, Any]) -> bool:
    """Return whether a question is asked without the picture it is about."""
    return bool(meta["category"] == "VS" and meta["figure"] == "0")


def is_right(meta: Mapping[str, Any], text: str, grader: str) -> bool:
    """Return whether an answer is right."""
    found = verdict(meta, text, grader)
    return found == 1 or (found == 2 and without_picture(meta))


def _groups(rows: Iterable[tuple[tuple[str, ...], bool]]) -> tuple[int, int]:
    """Return how many groups there are, and in how many every answer is right."""
    right: dict[tuple[str, ...], bool] = {}
    for key, correct in rows:
        right[key] = right.get(key, True) and correct
    return len(right), sum(right.values())


def hallusionbench_counts(answers: Sequence[tuple[Mapping[str, Any], str]], grader: str = "exact") -> dict[str, float]:
    """Count the answers of one or more whole sets.

    Parameters
    ----------
    answers
        Ground truth and reply of each. The ground truth has ``category``, ``subcategory``, ``set``, ``figure``,
        ``question_id``, ``visual_input`` (all text), ``label`` (``yes`` or ``no``), and for a judge ``judge_reply``.
    grader
        ``exact`` or ``judge``.
    """
    rows = [(meta, is_right(meta, text, grader)) for meta, text in answers]
    pairs = [((*_set(meta), meta["question_id"]), right, meta["visual_input"] == "2") for meta, right in rows]
    figures = [((*_set(meta), meta["figure"]), right) for meta, right in rows if not without_picture(meta)]
    labels = [meta["label"] == "yes" for meta, _ in rows]
    unparsed = [
        parse(text) is None if grader == "exact" else verdict(meta, text, grader) == 2 for meta, text in answers
    ]
    counts = (
        *(len(rows), sum(right for _, right in rows)),
        *_groups((key, right) for key, right, _ in pairs),
        *_groups(figures),
        *_groups((key, right) for key, right, edited in pairs if not edited),
        *_groups((key, right) for key, right, edited in pairs if edited),
        # the official script knows no replies: a right answer to a yes question, or a wrong one to a no question
        sum(right == label for (_, right), label in zip(rows, labels, strict=True)),
        sum(labels),
        sum(not right for _, right in rows),
        sum(not right and not label for (_, right), label in zip(rows, labels, strict=True)),
        sum(unparsed),
        sum(len(text.split()) for _, text in answers),
    )
    return {f"{_PREFIX}{name}": float(count) for name, count in zip(_COUNTS, counts, strict=True)}


def _set(meta: Mapping[str, Any]) -> tuple[str, str, str]:
    return meta["category"], meta["subcategory"], meta["set"]


def _difference(sums: Array) -> Array:
    return divide(sums[..., 0] - sums[..., 1], sums[..., 2])


def hallusionbench_metrics() -> list[Metric]:
    """Return aAcc, qAcc, fAcc, their easy and hard halves, the bias towards yes, and context.

    Where the official script divides by zero, the number is 0.
    """

    def accuracy(name: str, title: str, right: str, total: str) -> Metric:
        columns = f"{_PREFIX}{right}", f"{_PREFIX}{total}"
        return ratio(f"{_PREFIX}{name}", f"HallusionBench {title}", *columns, higher_is_better=True, empty=0.0)

    questions = f"{_PREFIX}questions"
    return [
        accuracy("aAcc", "aAcc", "correct", "questions"),
        accuracy("qAcc", "qAcc", "pairs_right", "pairs"),
        accuracy("fAcc", "fAcc", "figures_right", "figures"),
        accuracy("easy_aAcc", "easy-aAcc", "easy_right", "easy"),
        accuracy("hard_aAcc", "hard-aAcc", "hard_right", "hard"),
        Metric(
            name=f"{_PREFIX}yes_diff",
            title="HallusionBench yes-bias",
            columns=(f"{_PREFIX}said_yes", f"{_PREFIX}label_yes", questions),
            compute=_difference,
        ),
        ratio(f"{_PREFIX}fp_ratio", "HallusionBench FP-ratio", f"{_PREFIX}wrong_no", f"{_PREFIX}wrong", empty=0.0),
        ratio(f"{_PREFIX}yes_rate", "HallusionBench yes-rate", f"{_PREFIX}said_yes", questions),
        ratio(
            f"{_PREFIX}unparsed_rate",
            "HallusionBench unparsed",
            f"{_PREFIX}unparsed",
            questions,
            higher_is_better=False,
        ),
        ratio(f"{_PREFIX}words", "HallusionBench words", f"{_PREFIX}words", questions, percent=False, unit="words"),
    ]


@dataclass(frozen=True, kw_only=True)
class HallusionBench(Scorer):
    """HallusionBench of answers whose ground truth is that of `hallusionbench_counts`.

    Parameters
    ----------
    grader
        ``exact``, or ``judge``, whose replies are in the records.
    """

    name: ClassVar[str] = "hallusionbench"
    summary: ClassVar[str] = "accuracy per question, per question on all its pictures, and per picture"

    grader: str = "exact"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.grader not in GRADERS:
            raise ConfigError(f"unknown grader {self.grader!r}; it must be one of {', '.join(GRADERS)}")

    def metrics(self) -> list[Metric]:
        """Return the metrics of `hallusionbench_metrics`."""
        return hallusionbench_metrics()

    def score_cluster(self, records: Sequence[SampleRecord], benchmark: Benchmark) -> Mapping[str, float]:
        """Count the answers of one set; answers to other questions are not counted.

        Raises
        ------
        DataError
            If the grader is a judge that has not said anything yet.
        """
        own = [(record.meta, record.text) for record in records if record.meta.get("category") in ("VD", "VS")]
        return hallusionbench_counts(own, self.grader) if own else {}

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Name what the official script would divide by zero for."""
        total = {name: sums.get(f"{_PREFIX}{name}", 0.0) for name in _COUNTS}
        if not total["questions"]:
            return []
        kinds = {
            "figures": "fAcc: no picture",
            "easy": "easy_aAcc: no original picture",
            "hard": "hard_aAcc: no edited picture",
        }
        found = [
            f"{_PREFIX}{text} is asked about, so it is undefined and shown as 0"
            for name, text in kinds.items()
            if not total[name]
        ]
        if not total["wrong"]:
            found.append(f"{_PREFIX}fp_ratio: no answer is wrong, so it is undefined and shown as 0")
        return found
