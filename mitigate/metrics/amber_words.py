"""What AMBER knows about words: which belong together, which never count, and the nouns of a caption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from mitigate.data import read_document, read_lines, require_file
from mitigate.errors import DataError
from mitigate.metrics import english

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

THRESHOLD: Final = 0.8
"""Two words are alike if their vectors are more similar than this."""

Kind = Literal["ignored", "present", "hallucinated"]


class Noun(NamedTuple):
    """A noun of a caption in its base form, and where it stands: ``text[start:end]``."""

    lemma: str
    start: int
    end: int


@dataclass(frozen=True)
class WordLists:
    """The benchmark's words.

    Parameters
    ----------
    associates
        Word -> words that may stand for it; case matters.
    safe
        Words that are never held against a caption.
    alike
        Pairs of different words that mean nearly the same, each in both orders.
    """

    associates: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]
    alike: frozenset[tuple[str, str]] = frozenset()

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """All words that can count; any other noun is passed over."""
        return frozenset(self.associates).union(*self.associates.values())

    def kept(self, nouns: Iterable[str]) -> list[str]:
        """Return the nouns that count, in order."""
        return [noun for noun in nouns if noun in self.vocabulary]

    def candidates(self, entries: Sequence[str]) -> list[tuple[str, int]]:
        """Return the words that may stand for annotated entries, each with the entry's index: associates come first."""
        related = [(word, index) for index, entry in enumerate(entries) for word in self.associates.get(entry, ())]
        return related + [(entry, index) for index, entry in enumerate(entries)]

    def are_alike(self, word: str, other: str) -> bool:
        """Return whether two words mean nearly the same; a word is like itself."""
        return word == other or (word, other) in self.alike


@dataclass(frozen=True)
class Judgement:
    """What a caption's nouns amount to.

    Parameters
    ----------
    kinds
        Of the nouns, in order.
    covered
        Indices of the annotated objects that are named.
    marked
        Indices of the likely hallucinations that occur.
    """

    kinds: tuple[Kind, ...]
    covered: frozenset[int]
    marked: frozenset[int]


def judge(nouns: Sequence[str], truth: Sequence[str], hallu: Sequence[str], words: WordLists) -> Judgement:
    """Compare a caption's nouns to the annotations of its picture.

    Parameters
    ----------
    nouns
        That count (`WordLists.kept`).
    truth
        Objects of the picture; of two equal ones only the first can be covered.
    hallu
        Objects that models like to invent for it.
    words
        The benchmark's words. An entry it does not know has no associates.
    """
    present, invented = words.candidates(truth), words.candidates(hallu)
    kinds: list[Kind] = []
    covered: set[int | None] = set()
    marked: set[int | None] = set()
    for noun in nouns:
        kind: Kind = "present"
        if noun in words.safe:
            kind = "ignored"
        elif (index := _first(noun, present, None)) is not None:
            covered.add(index)
        else:
            # An invented object may still pass for one that is there: the two similarities do not exclude each other.
            marked |= {_first(noun, invented, None), _first(noun, invented, words)}
            index = _first(noun, present, words)
            kind = "hallucinated" if index is None else "present"
            covered |= {index}
        kinds.append(kind)
    return Judgement(tuple(kinds), _indices(covered), _indices(marked))


def _indices(found: Iterable[int | None]) -> frozenset[int]:
    return frozenset(index for index in found if index is not None)


def _first(noun: str, candidates: Sequence[tuple[str, int]], words: WordLists | None) -> int | None:
    """Return the entry of the first candidate that is the noun, or is like it where ``words`` tells what is alike."""
    for word, index in candidates:
        if words.are_alike(noun, word) if words else noun == word:
            return index
    return None


@lru_cache(maxsize=8)
def read_words(folder: Path, similarity: Path | None) -> WordLists:
    """Read ``relation.json`` and ``safe_words.txt`` of the official repository, and a table of similarities.

    Parameters
    ----------
    folder
        Where the two files lie.
    similarity
        Table of word, other word, and similarity: tab-separated lines, or one JSON array of such triples. Pairs above
        `THRESHOLD` are alike.

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    path = require_file(folder / "relation.json", "amber")
    relation = read_document(path)
    if not isinstance(relation, dict) or not all(map(_is_words, relation.values())):
        raise DataError(f"{path} must map words to lists of words; get it again: mitigate data fetch amber")
    safe = require_file(folder / "safe_words.txt", "amber")
    return WordLists(
        associates={word: tuple(others) for word, others in relation.items()},
        safe=frozenset(line for _, line in read_lines(safe)),
        alike=_read_alike(similarity) if similarity else frozenset(),
    )


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _read_alike(path: Path) -> frozenset[tuple[str, str]]:
    pairs: set[tuple[str, str]] = set()
    for where, row in _rows(path):
        try:
            word, other, value = row
            score = float(value)
            usable = isinstance(word, str) and isinstance(other, str) and math.isfinite(score)
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise DataError(f"{where}: a row must be a word, another word and their similarity, not {row!r:.60}")
        if score > THRESHOLD:
            pairs |= {(word, other), (other, word)}
    return frozenset(pairs)


def _rows(path: Path) -> list[tuple[str, Any]]:
    if path.suffix != ".json":
        return [(f"{path}:{number}", line.split("\t")) for number, line in read_lines(path)]
    table = read_document(path)
    if not isinstance(table, list):
        raise DataError(f"{path} must hold a JSON array of [word, other word, similarity]")
    return [(f"{path}: row {number}", row) for number, row in enumerate(table, start=1)]


@lru_cache(maxsize=1 << 13)
def nouns(text: str, vocabulary: frozenset[str]) -> tuple[Noun, ...]:
    """Return those nouns of a text that are in a vocabulary: nltk's tokens and tags, WordNet's base forms, case kept.

    Raises
    ------
    ConfigError, DataError
        If nltk or its data is not installed.
    """
    found = english.tokens(text)
    lemmas = [english.base(token.text) for token in found]
    known = [index for index, lemma in enumerate(lemmas) if lemma in vocabulary]
    tags = english.tags([token.text for token in found], known)
    return tuple(Noun(lemmas[index], *found[index][1:]) for index in known if tags[index].startswith("NN"))
