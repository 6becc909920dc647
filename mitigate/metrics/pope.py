"""POPE: yes/no questions about objects, with the parser as a named choice because it alone moves the score.

``strict``: exactly one of the words "yes" and "no" occurs; anything else is no answer and counts as wrong.
``official``: the rule of the benchmark's own script: up to the first full stop, without commas, any of the
space-separated tokens ``No``, ``no``, ``not`` means no, and everything else, also an empty reply, means yes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, get_args

import numpy as np

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Array, Metric, Scorer, divide, ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

Answer = Literal["yes", "no"]
Parser = Literal["strict", "official"]
PARSERS: Final[tuple[str, ...]] = get_args(Parser)
SPLITS: Final = ("adversarial", "popular", "random")
_COUNTS: Final = ("questions", "correct", "said_yes", "positives", "true_positives")

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def parse(text: str, parser: str = "strict") -> Answer | None:
    """Read a reply as yes or no; ``None`` if it is neither (``strict`` only).

    Raises
    ------
    ConfigError
        If there is no such parser.
    """
    if parser == "strict":
        words = {match.group().lower() for match in _WORD.finditer(text)}
        if ("yes" in words) == ("no" in words):
            return None
        return "yes" if "yes" in words else "no"
    if parser == "official":
        tokens = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"}.intersection(tokens) else "yes"
    raise ConfigError(f"unknown answer parser {parser!r}; it must be one of {', '.join(PARSERS)}")


def columns(splits: Sequence[str] = SPLITS) -> tuple[str, ...]:
    """Return the count columns of these POPE splits."""
    return (*(f"pope/{split}/{count}" for split in splits for count in _COUNTS), "pope/questions", "pope/unparsed")


def pope_counts(text: str, label: str, split: str, parser: str = "strict") -> dict[str, float]:
    """Count one reply.

    Parameters
    ----------
    text
        Raw reply.
    label
        ``yes`` or ``no``.
    split
        POPE split the question belongs to.
    parser
        How to read the reply. ``pope/unparsed`` counts replies that ``strict`` cannot read, whatever the parser.

    Raises
    ------
    DataError
        If the label is neither yes nor no.
    """
    if label not in ("yes", "no"):
        raise DataError(f"a POPE label must be yes or no, but is {label!r}")
    answer = parse(text, parser)
    counts = (1, answer == label, answer == "yes", label == "yes", answer == label == "yes")
    row = {f"pope/{split}/{name}": float(count) for name, count in zip(_COUNTS, counts, strict=True)}
    return row | {"pope/questions": 1.0, "pope/unparsed": float(parse(text, "strict") is None)}


def _f1(said_yes: Array, positives: Array, true_positives: Array) -> Array:
    # 2PR/(P+R) without its removable zero divisions: 0 if no yes is right, undefined if there is nothing to find.
    return divide(2 * true_positives, said_yes + positives)


def _split_metrics(split: str) -> list[Metric]:
    column = {count: f"pope/{split}/{count}" for count in _COUNTS}
    questions = column["questions"]
    return [
        ratio(f"pope/{split}/accuracy", f"POPE {split} accuracy", column["correct"], questions, higher_is_better=True),
        Metric(
            name=f"pope/{split}/f1",
            title=f"POPE {split} F1",
            columns=(column["said_yes"], column["positives"], column["true_positives"]),
            compute=lambda sums: _f1(sums[..., 0], sums[..., 1], sums[..., 2]),
            higher_is_better=True,
        ),
        ratio(f"pope/{split}/yes_rate", f"POPE {split} yes-rate", column["said_yes"], questions),
    ]


def _mean(parts: Sequence[Metric]) -> Metric:
    widths = [len(part.columns) for part in parts]
    ends = np.cumsum(widths)
    statistic = parts[0].name.rsplit("/", 1)[1]

    def compute(sums: Array) -> Array:
        each = [
            part.compute(sums[..., end - width : end]) for part, width, end in zip(parts, widths, ends, strict=True)
        ]
        total: Array = np.stack(each).mean(axis=0)
        return total

    return Metric(
        name=f"pope/mean/{statistic}",
        title=f"POPE mean {parts[0].title.rsplit(' ', 1)[1]}",
        columns=tuple(column for part in parts for column in part.columns),
        compute=compute,
        higher_is_better=parts[0].higher_is_better,
    )


def pope_metrics(splits: Sequence[str] = SPLITS) -> list[Metric]:
    """Return accuracy, F1 of "yes" and yes-rate per split, their means over the splits, and ``unparsed_rate``.

    A reply that is no answer counts as wrong in the accuracy and as "did not say yes" in F1 and yes-rate.
    """
    per_split = [_split_metrics(split) for split in splits]
    means = [_mean(parts) for parts in zip(*per_split, strict=True)]
    unparsed = ratio("unparsed_rate", "Unparsed", "pope/unparsed", "pope/questions", higher_is_better=False)
    return [*(metric for metrics in per_split for metric in metrics), *means, unparsed]


@dataclass(frozen=True, kw_only=True)
class Pope(Scorer):
    """POPE of yes/no questions that know their answer (``meta["label"]``) and their splits (``meta["pope"]``).

    Parameters
    ----------
    parser
        How replies are read: ``strict`` or ``official``.
    """

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "yes/no questions about objects: accuracy, F1, yes-rate"

    parser: str = "strict"

    def metrics(self) -> list[Metric]:
        """Return the metrics of `pope_metrics`."""
        return pope_metrics()

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a reply once for every split that asks its question; other answers are not counted.

        Raises
        ------
        DataError
            If the record lacks its ground truth.
        """
        if record.task != "yes_no":
            return {}
        counts: Counter[str] = Counter()
        for split in benchmark.truth(record, "pope"):
            counts.update(pope_counts(record.text, benchmark.truth(record, "label"), split, self.parser))
        return counts
