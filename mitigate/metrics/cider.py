"""CIDEr-D: how close a caption is to what several people wrote about the picture.

Every 1- to 4-gram weighs the more the rarer it is in the reference captions of the evaluated pictures; a caption's
score is its mean clipped cosine to the references, lowered where the lengths differ, times 10. Therefore a value
belongs to its set of pictures, and a set of one picture always scores 0.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import Metric, Scorer, ratio
from mitigate.metrics.words import tokenize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

TOKENIZERS: Final = ("simple", "ptb")
LONGEST: Final = 4
SIGMA: Final = 6.0
#: References have about 10 words; at 40 words the length alone takes a caption to a millionth.
LONG: Final = 40

_PICTURES, _SCORES = "cider/captions", "cider/scores"
_PUNCTUATION: Final = frozenset((*".?!,:;-\"'`", "--", "''", "``"))
_BRACKETS: Final = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

Gram = tuple[str, ...]


def simple_tokens(text: str) -> list[str]:
    """Cut a text into lower-case tokens without punctuation.

    Brackets become ``-lrb-`` and so on, as the official tokenizer leaves them.
    """
    words = (token.text for token in tokenize(text))
    return [_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION and set(word) != {"."}]


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Cut texts into tokens with the official tokenizer, a Java program that pycocoevalcap runs.

    Raises
    ------
    ConfigError
        If pycocoevalcap or Java is missing.
    """
    remedy = "pip install pycocoevalcap, and install Java; benchmark.tokenizer=simple needs neither"
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise ConfigError(f"benchmark.tokenizer=ptb needs pycocoevalcap: {remedy}") from None
    try:
        cut = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(texts)})
    except FileNotFoundError:
        raise ConfigError(f"benchmark.tokenizer=ptb needs Java: {remedy}") from None
    return [cut[index][0].split() for index in range(len(texts))]


def grams(tokens: Sequence[str]) -> Counter[Gram]:
    """Count the 1- to 4-grams."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(tokens) - length + 1)
    )


def cider(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Score captions against the references of their pictures; every picture is one of the collection.

    Parameters
    ----------
    captions
        Tokens of a caption per picture.
    references
        Tokens of its references, per picture; at least one each.

    Returns
    -------
    list of float
        A value of 0 to 10 per picture; their mean is the CIDEr-D of the set.
    """
    counted = [[grams(reference) for reference in each] for each in references]
    pictures = Counter(gram for each in counted for gram in set().union(*each))
    rarity = {gram: math.log(len(references)) - math.log(count) for gram, count in pictures.items()}
    unseen = math.log(len(references)) if references else 0.0
    scores = []
    for caption, each in zip(captions, counted, strict=True):
        mine = _Weights(grams(caption), rarity, unseen)
        total = sum(mine.similarity(_Weights(reference, rarity, unseen)) for reference in each)
        scores.append(10.0 * total / len(each))
    return scores


class _Weights:
    """A text as weights of its n-grams, apart for each n."""

    def __init__(self, counts: Mapping[Gram, int], rarity: Mapping[Gram, float], unseen: float) -> None:
        self.vectors: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            self.vectors[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
        self.norms = [math.sqrt(sum(weight * weight for weight in vector.values())) for vector in self.vectors]
        # The official code takes the number of bigrams for the length.
        self.length = sum(count for gram, count in counts.items() if len(gram) == 2)

    def similarity(self, reference: _Weights) -> float:
        """Return the mean over n of the clipped cosines, lowered by the difference of the lengths."""
        total = 0.0
        for mine, theirs, norm, other in zip(self.vectors, reference.vectors, self.norms, reference.norms, strict=True):
            if norm and other:
                clipped = sum(
                    min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs
                )
                total += clipped / (norm * other)
        return total / LONGEST * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


@dataclass(frozen=True, kw_only=True)
class Cider(Scorer):
    """CIDEr-D of captions whose pictures have reference captions (``meta["references"]``).

    Parameters
    ----------
    tokenizer
        ``simple`` (`simple_tokens`) or ``ptb``, the official one, which needs pycocoevalcap and Java.
    """

    name: ClassVar[str] = "cider"
    summary: ClassVar[str] = "CIDEr-D: agreement of captions with people's"

    tokenizer: str = "simple"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.tokenizer not in TOKENIZERS:
            raise ConfigError(f"tokenizer={self.tokenizer!r} must be one of {', '.join(TOKENIZERS)}")

    def metrics(self) -> list[Metric]:
        """Return ``cider`` (0 to 10 as the official script returns it, shown times 100) and the mean words."""
        return [
            ratio("cider", "CIDEr-D", _SCORES, _PICTURES, higher_is_better=True),
            ratio("cider/length", "Length", "cider/words", _PICTURES, percent=False, unit="words"),
        ]

    def score_all(
        self, records: Sequence[SampleRecord], benchmark: Benchmark
    ) -> Iterable[tuple[str, Mapping[str, float]]]:
        """Score all captions together; other answers are not counted.

        How rare an n-gram is, is settled here for all pictures: a resample of pictures is scored with the same weights.

        Raises
        ------
        ConfigError
            If the tokenizer is not installed.
        DataError
            If a picture has no reference captions.
        """
        captions = [record for record in records if record.task == "caption"]
        references: list[Sequence[str]] = [benchmark.truth(record, "references") for record in captions]
        for record, each in zip(captions, references, strict=True):
            if not each:
                raise DataError(f"sample {record.id!r} has no reference captions; CIDEr-D needs at least one")
        tokens = iter(
            self._tokens([*(record.text for record in captions), *(text for each in references for text in each)])
        )
        mine = [next(tokens) for _ in captions]
        scores = cider(mine, [[next(tokens) for _ in each] for each in references])
        for record, score, words in zip(captions, scores, mine, strict=True):
            yield (
                benchmark.cluster(record),
                {_PICTURES: 1.0, _SCORES: score, "cider/words": float(len(words))},
            )

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        return ptb_tokens(texts) if self.tokenizer == "ptb" else [simple_tokens(text) for text in texts]

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Say where CIDEr-D means nothing: on one picture, and on texts much longer than the references."""
        captions = sums[_PICTURES]
        if captions == 1:
            return ["CIDEr-D of one picture is always 0: every word of its references occurs in all pictures"]
        if captions and sums["cider/words"] / captions > LONG:
            return [f"captions have more than {LONG} words on average: CIDEr-D is near 0 whatever they say"]
        return []
