"""The objects of COCO in English text, as CHAIR defines them: words, lemmas, merged pairs, synonyms.

The official scripts differ only in how they lemmatise (`mitigate.metrics.lemmatizers`). What follows is the same in all
of them, and is here: some pairs of words are one word ("traffic light", "baby elephant"), a toilet's seat is no chair,
and every word that is in the list of synonyms is a mention of an object, as often as it occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING

from mitigate.metrics.lemmatizers import lemmatize, tables
from mitigate.metrics.words import Token

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Mention:
    """An object named in a text: its class and where (``text[start:end]``)."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """What a caption says: how many words it has after merging, and the objects it names in order, repetitions kept."""

    length: int
    mentions: tuple[Mention, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Which words name which object.

    Parameters
    ----------
    objects
        Word, or merged words -> object.
    merged
        Words joined by a space -> the one word they are taken for.
    """

    objects: Mapping[str, str]
    merged: Mapping[str, str]

    @cached_property
    def longest(self) -> Mapping[str, int]:
        """First of the words that are merged into one -> how many they are at most."""
        found: dict[str, int] = {}
        for words in map(str.split, self.merged):
            found[words[0]] = max(found.get(words[0], 0), len(words))
        return found

    @cached_property
    def parts(self) -> frozenset[str]:
        """All single words that can matter."""
        return frozenset(word for words in (*self.objects, *self.merged) for word in words.split())


@cache
def vocabulary(complete: bool = False) -> Vocabulary:
    """Return the official vocabulary, or the complete one.

    Parameters
    ----------
    complete
        Whether to find also what the official scripts cannot, although it is on their list: words with a stray space
        or a capital letter in the list, and forms of several words that no rule merges.
    """
    data = tables()
    objects = {word: name for name, words in data["synonyms"].items() for word in (name, *words)}
    merged = data["merged"]
    if complete:
        merged = {word: word for word in objects if " " in word} | merged
    else:
        objects = {word: name for word, name in objects.items() if word not in data["unreachable"]}
    return Vocabulary(objects, merged)


@cache
def object_words() -> Mapping[str, str]:
    """Return every synonym and its plural forms -> object, for texts that are searched word by word."""
    objects = vocabulary(complete=True).objects
    plurals: dict[str, list[str]] = {}
    for plural, singular in tables()["closed"].items():
        plurals.setdefault(singular, []).append(plural)
    forms = dict(objects)
    for word, name in objects.items():
        first, _, last = word.rpartition(" ")
        for plural in plurals.get(last, []):
            forms.setdefault(f"{first} {plural}".strip(), name)
    return forms


def merge(lemmas: Sequence[Token], known: Vocabulary) -> list[Token]:
    """Merge words that are one, from left to right, the longest first."""
    merged, index = [], 0
    while index < len(lemmas):
        for length in range(known.longest.get(lemmas[index].text, 1), 1, -1):
            whole = known.merged.get(" ".join(token.text for token in lemmas[index : index + length]))
            if whole is not None:
                merged.append(Token(whole, lemmas[index].start, lemmas[index + length - 1].end))
                index += length
                break
        else:
            merged.append(lemmas[index])
            index += 1
    return merged


def find(lemmas: Sequence[Token], known: Vocabulary) -> Reading:
    """Find the objects that lemmas name."""
    merged = merge(lemmas, known)
    named = [token for token in merged if token.text in known.objects]
    # "The seat of the toilet is up" names no chair; the rule looks at the whole caption, as it does officially.
    if any(token.text == "toilet" for token in named):
        named = [token for token in named if token.text != "seat"]
    return Reading(len(merged), tuple(Mention(known.objects[token.text], token.start, token.end) for token in named))


@lru_cache(maxsize=1 << 17)
def read(text: str, lemmatizer: str) -> Reading:
    """Find the objects a text names.

    Readings are kept, because a caption is read again for every number and mark made of it.

    Parameters
    ----------
    text
        Caption.
    lemmatizer
        A name of `mitigate.metrics.lemmatizers.LEMMATIZERS`.

    Raises
    ------
    ConfigError
        If there is no such lemmatizer, or nltk is not installed.
    DataError
        If nltk's data is not installed.
    """
    known = vocabulary(complete=lemmatizer == "closed")
    return find(lemmatize(text, lemmatizer, known.parts), known)
