"""CHAIR: how many of the objects a caption names are not in the picture.

Object words are found through a closed table of word forms (no tagger, no lemmatiser: the same text always gives the
same objects). As in the original, CHAIR_i counts mentions, so a repeated hallucination counts again, CHAIR_s counts
captions, and a caption that names nothing stays in the denominator of CHAIR_s; recall counts object types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mitigate.errors import DataError
from mitigate.metrics.base import Metric, Scorer, ratio

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

COLUMNS = (
    "chair/captions",
    "chair/hallucinated_captions",
    "chair/mentions",
    "chair/hallucinated_mentions",
    "chair/present_types",
    "chair/found_types",
    "chair/words",
)

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


@dataclass(frozen=True)
class Mention:
    """An object named in a text: its class and where (``text[start:end]``)."""

    name: str
    start: int
    end: int


def mentions(text: str, words: Mapping[str, str]) -> Iterator[Mention]:
    """Find the objects a text names, in order, repetitions kept.

    Parameters
    ----------
    text
        Caption; case and punctuation do not matter.
    words
        Lower-case word form -> object class. Forms of several words (``"traffic light"``) win over their parts.
    """
    found = list(_WORD.finditer(text))
    lower = [match.group().lower() for match in found]
    longest = max((form.count(" ") + 1 for form in words), default=0)
    index = 0
    while index < len(found):
        step = 1
        for length in range(min(longest, len(found) - index), 0, -1):
            name = words.get(" ".join(lower[index : index + length]))
            if name is not None:
                yield Mention(name, found[index].start(), found[index + length - 1].end())
                step = length
                break
        index += step


def chair_counts(text: str, present: Collection[str], words: Mapping[str, str]) -> dict[str, float]:
    """Count one caption: a value for each of `COLUMNS`.

    Parameters
    ----------
    text
        Caption.
    present
        Object classes in the picture.
    words
        Word form -> object class, as in `mentions`.

    Raises
    ------
    DataError
        If an object of the picture has no word in the table, so that it could never be found.
    """
    truth = set(present)
    if unknown := sorted(truth - set(words.values())):
        raise DataError(f"the object {unknown[0]!r} has no word in the table of object words; add one")
    named = [mention.name for mention in mentions(text, words)]
    wrong = sum(name not in truth for name in named)
    counts = (1, wrong > 0, len(named), wrong, len(truth), len(truth.intersection(named)), len(text.split()))
    return dict(zip(COLUMNS, map(float, counts), strict=True))


def chair_metrics() -> list[Metric]:
    """Return ``chair_s``, ``chair_i``, ``recall`` and ``length`` (mean words per caption)."""
    return [
        ratio("chair_s", "CHAIR_s", COLUMNS[1], COLUMNS[0], higher_is_better=False),
        ratio("chair_i", "CHAIR_i", COLUMNS[3], COLUMNS[2], higher_is_better=False),
        ratio("recall", "Recall", COLUMNS[5], COLUMNS[4], higher_is_better=True),
        ratio("length", "Length", COLUMNS[6], COLUMNS[0], percent=False, unit="words"),
    ]


@dataclass(frozen=True, kw_only=True)
class Chair(Scorer):
    """CHAIR of captions whose pictures' objects are known (``meta["objects"]``), in the benchmark's object words."""

    name: ClassVar[str] = "chair"
    summary: ClassVar[str] = "objects a caption names that are not in the picture"

    def metrics(self) -> list[Metric]:
        """Return the metrics of `chair_metrics`."""
        return chair_metrics()

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a caption; other answers are not counted.

        Raises
        ------
        DataError
            If the record lacks its ground truth, or the benchmark has no object words.
        """
        if record.task != "caption":
            return {}
        return chair_counts(record.text, benchmark.truth(record, "objects"), benchmark.object_words())
