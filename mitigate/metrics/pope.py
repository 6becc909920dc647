"""POPE: yes/no questions about objects, with the parser as a named choice because it alone moves the score.

What a reply means is up to the parser (`mitigate.metrics.yes_no`); the numbers are the same for all of them. "yes" is
the positive class. A reply that is no answer (``strict`` only) is wrong, and it is not a "yes".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Array, Metric, Scorer, divide, ratio
from mitigate.metrics.yes_no import PARSERS, Answer, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

__all__ = ["PARSERS", "SPLITS", "Answer", "Pope", "columns", "parse", "pope_counts", "pope_metrics"]

SPLITS: Final = ("adversarial", "popular", "random")
_COUNTS: Final = ("questions", "correct", "said_yes", "positives", "true_positives")
_ALL: Final = ("pope/questions", "pope/unparsed", "pope/words")


@lru_cache(maxsize=64)
def _names(split: str) -> tuple[str, ...]:
    return tuple(f"pope/{split}/{count}" for count in _COUNTS)


def columns(splits: Sequence[str] = SPLITS) -> tuple[str, ...]:
    """Return the count columns of these POPE splits."""
    return (*(name for split in splits for name in _names(split)), *_ALL)


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
    clear = parse(text, "strict")
    answer = clear if parser == "strict" else parse(text, parser, label)
    yes, positive = answer == "yes", label == "yes"
    counts = (1.0, float(answer == label), float(yes), float(positive), float(yes and positive))
    row = dict(zip(_names(split), counts, strict=True))
    row.update(zip(_ALL, (1.0, float(clear is None), float(len(text.split()))), strict=True))
    return row


def _f1(sums: Array) -> Array:
    # 2PR/(P+R) without its removable zero divisions: 0 if no yes is right, undefined if there is nothing to find.
    return divide(2 * sums[..., 2], sums[..., 0] + sums[..., 1])


def _split_metrics(split: str) -> list[Metric]:
    questions, correct, said_yes, positives, hits = _names(split)
    name, title = f"pope/{split}", f"POPE {split}"
    return [
        ratio(f"{name}/accuracy", f"{title} accuracy", correct, questions, higher_is_better=True),
        ratio(f"{name}/precision", f"{title} precision", hits, said_yes, higher_is_better=True, empty=0.0, detail=True),
        ratio(f"{name}/recall", f"{title} recall", hits, positives, higher_is_better=True, empty=0.0, detail=True),
        Metric(
            name=f"{name}/f1",
            title=f"{title} F1",
            columns=(said_yes, positives, hits),
            compute=_f1,
            higher_is_better=True,
            empty=0.0,
        ),
        ratio(f"{name}/yes_rate", f"{title} yes-rate", said_yes, questions),
    ]


def _mean(parts: Sequence[Metric], splits: Sequence[str]) -> Metric:
    """Average a metric over the splits that are asked; undefined in one of them it counts 0 there, as it is shown."""
    ends = np.cumsum([len(part.columns) for part in parts])
    statistic = parts[0].name.rsplit("/", 1)[1]

    def compute(sums: Array) -> Array:
        each = np.stack(
            [part.compute(sums[..., end - len(part.columns) : end]) for part, end in zip(parts, ends, strict=True)],
            axis=-1,
        )
        asked = np.where(np.isnan(each).all(axis=-1, keepdims=True), 0.0, sums[..., ends[-1] :] > 0)
        return divide((np.nan_to_num(each, nan=0.0) * asked).sum(axis=-1), asked.sum(axis=-1))

    return Metric(
        name=f"pope/mean/{statistic}",
        title=f"POPE mean {parts[0].title.rsplit(' ', 1)[1]}",
        columns=(*(column for part in parts for column in part.columns), *(_names(split)[0] for split in splits)),
        compute=compute,
        higher_is_better=parts[0].higher_is_better,
        empty=parts[0].empty,
        detail=parts[0].detail,
    )


def pope_metrics(splits: Sequence[str] = SPLITS) -> list[Metric]:
    """Return the metrics of every split, their means over the splits, ``unparsed_rate`` and mean words per reply.

    Those of a split are accuracy, precision, recall, F1 and yes-rate. A number whose denominator is zero, where the
    official script fails, is 0.
    """
    per_split = [_split_metrics(split) for split in splits]
    means = [_mean(parts, splits) for parts in zip(*per_split, strict=True)]
    questions, unparsed, words = _ALL
    return [
        *(metric for metrics in per_split for metric in metrics),
        *means,
        ratio("unparsed_rate", "Unparsed", unparsed, questions, higher_is_better=False),
        ratio("pope/words", "POPE words", words, questions, percent=False, unit="words"),
    ]


@dataclass(frozen=True, kw_only=True)
class Pope(Scorer):
    """POPE of yes/no questions that know their answer (``meta["label"]``) and their splits (``meta["pope"]``).

    Parameters
    ----------
    parser
        How replies are read: ``official``, ``opera``, ``vcd`` or ``strict``.
    splits
        Splits to score.
    """

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "yes/no questions about objects: accuracy, precision, recall, F1, yes-rate"

    parser: str = "strict"
    splits: tuple[str, ...] = SPLITS

    def __post_init__(self) -> None:
        """Check the parameters; splits may come as a list."""
        object.__setattr__(self, "splits", tuple(self.splits))
        if self.parser not in PARSERS:
            raise ConfigError(f"unknown answer parser {self.parser!r}; it must be one of {', '.join(PARSERS)}")

    def metrics(self) -> list[Metric]:
        """Return the metrics of `pope_metrics`."""
        return pope_metrics(self.splits)

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a reply once for every split that asks its question; other answers are not counted.

        Raises
        ------
        DataError
            If the record lacks its ground truth, or belongs to another split.
        """
        if record.task != "yes_no":
            return {}
        total: dict[str, float] = {}
        label = benchmark.truth(record, "label")
        for split in benchmark.truth(record, "pope"):
            if split not in self.splits:
                raise DataError(f"sample {record.id!r} is of the split {split!r}; scored are {', '.join(self.splits)}")
            for column, amount in pope_counts(record.text, label, split, self.parser).items():
                total[column] = total.get(column, 0.0) + amount
        return total

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Name the splits where the official script would divide by zero."""
        found = []
        for split in self.splits:
            questions, _, said_yes, positives, hits = (sums.get(name, 0.0) for name in _names(split))
            if questions and not said_yes:
                found.append(f"pope/{split}: no reply means yes, so precision is undefined and shown as 0, as is F1")
            if questions and not positives:
                found.append(f"pope/{split}: no question's answer is yes, so recall is undefined and shown as 0")
            if said_yes and positives and not hits:
                found.append(f"pope/{split}: no yes is right, so F1 is 0 (the official script divides by zero)")
        return found
