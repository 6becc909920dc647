"""CHAIR: how many of the objects a caption names are not in the picture.

As in the original, CHAIR_i counts mentions, so a repeated hallucination counts again, CHAIR_s counts captions, and a
caption that names nothing stays in the denominator of CHAIR_s; recall, precision and F1 count object types.

Where a benchmark brings a closed table of word forms, objects are found through it. Captions of COCO pictures are read
by the rules of `mitigate.metrics.coco_objects`, under a named lemmatizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Array, Metric, Scorer, divide, ratio
from mitigate.metrics.coco_objects import Mention, read
from mitigate.metrics.lemmatizers import LEMMATIZERS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

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
NAMED_TYPES = "chair/named_types"
"""Column of the different objects a caption names, which precision needs."""

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?][\])}\"'»”’]*(?=\s|\Z)")


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
    counts = _counts([mention.name for mention in mentions(text, words)], truth, len(text.split()))
    return {column: counts[column] for column in COLUMNS}


def _counts(named: Sequence[str], truth: set[str], words: int) -> dict[str, float]:
    wrong = sum(name not in truth for name in named)
    types = set(named)
    counts = (1, wrong > 0, len(named), wrong, len(truth), len(truth & types), words, len(types))
    return dict(zip((*COLUMNS, NAMED_TYPES), map(float, counts), strict=True))


def without_unfinished(text: str) -> str:
    """Return a text up to its last sentence end; nothing if there is none.

    A sentence ends with a full stop, question mark or exclamation mark, and what closes quotes and brackets behind it,
    before white space or the end of the text.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def _f1(sums: Array) -> Array:
    # 2PR/(P+R) without its removable zero divisions: 0 if nothing named is there.
    return divide(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def chair_metrics(types: bool = False) -> list[Metric]:
    """Return ``chair_s``, ``chair_i``, ``recall`` and ``length`` (mean words per caption).

    Parameters
    ----------
    types
        Whether to add ``precision`` and ``f1`` over object types; they need the column `NAMED_TYPES`.
    """
    found, present = COLUMNS[5], COLUMNS[4]
    metrics = [
        ratio("chair_s", "CHAIR_s", COLUMNS[1], COLUMNS[0], higher_is_better=False),
        ratio("chair_i", "CHAIR_i", COLUMNS[3], COLUMNS[2], higher_is_better=False, empty=0.0),
        ratio("recall", "Recall", found, present, higher_is_better=True, empty=0.0),
        ratio("length", "Length", COLUMNS[6], COLUMNS[0], percent=False, unit="words"),
    ]
    if types:
        f1 = Metric(
            name="f1",
            title="F1",
            columns=(found, present, NAMED_TYPES),
            compute=_f1,
            higher_is_better=True,
            empty=0.0,
        )
        metrics[3:3] = [ratio("precision", "Precision", found, NAMED_TYPES, higher_is_better=True, empty=0.0), f1]
    return metrics


@dataclass(frozen=True, kw_only=True)
class Chair(Scorer):
    """CHAIR of captions whose pictures' objects are known (``meta["objects"]``).

    Parameters
    ----------
    lemmatizer
        How captions of COCO pictures are read: ``wordnet``, ``pattern`` or ``closed``. ``None`` takes the benchmark's
        own object words.
    drop_incomplete_sentence
        Whether to score a caption that the model did not end by itself only up to its last sentence end. Of captions
        that other tools made nobody knows whether the model ended them; they are treated alike.
    """

    name: ClassVar[str] = "chair"
    summary: ClassVar[str] = "objects a caption names that are not in the picture"

    lemmatizer: str | None = None
    drop_incomplete_sentence: bool = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.lemmatizer not in (None, *LEMMATIZERS):
            raise ConfigError(f"lemmatizer={self.lemmatizer!r} must be one of {', '.join(LEMMATIZERS)}")

    def metrics(self) -> list[Metric]:
        """Return the metrics of `chair_metrics`."""
        return chair_metrics(types=self.lemmatizer is not None)

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a caption; other answers are not counted.

        Raises
        ------
        ConfigError
            If the lemmatizer needs a package that is not installed.
        DataError
            If the record lacks its ground truth, the benchmark has no object words, or the lemmatizer lacks its data.
        """
        if record.task != "caption":
            return {}
        objects = benchmark.truth(record, "objects")
        text = self.scored_text(record)
        if self.lemmatizer is None:
            return chair_counts(text, objects, benchmark.object_words())
        if record.meta.get("lemmatizer", self.lemmatizer) != self.lemmatizer:
            raise DataError(
                f"the objects of sample {record.id!r} were found with lemmatizer={record.meta['lemmatizer']}; "
                f"its caption cannot be read with {self.lemmatizer}"
            )
        reading = read(text, self.lemmatizer)
        return _counts([mention.name for mention in reading.mentions], set(objects), reading.length)

    def scored_text(self, record: SampleRecord) -> str:
        """Return the part of an answer that is scored."""
        # A record of another tool's answer counts no tokens, and then `finished` says nothing.
        ended = record.finished and record.tokens > 0
        return record.text if ended or not self.drop_incomplete_sentence else without_unfinished(record.text)

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Say which numbers are not defined: where the official scripts divide by zero, 0 is shown."""
        if not sums["chair/captions"]:
            return []
        found = []
        if not sums["chair/mentions"]:
            found.append("no caption names an object: CHAIR_i and precision are undefined and shown as 0")
        if not sums["chair/present_types"]:
            found.append("no picture has a known object: recall is undefined and shown as 0")
        return found
