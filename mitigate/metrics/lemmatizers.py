"""Three ways to the base form of a word; CHAIR values are comparable only under the same one.

``wordnet``
    What most papers on large models use: nltk's tokens, part-of-speech tags and WordNet forms. It does not know "men",
    takes "vases" for "vas", and what it makes of a word depends on the sentence.
``pattern``
    What the first CHAIR script uses, ``singularize`` of pattern.en, as a table of its results for all words that
    matter. It strips the "s" of "bus" and "tennis", so it finds "buses" and misses "bus".
``closed``
    Our own table of singular and plural forms, free of such accidents: the cleanest, comparable with no paper.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mitigate.errors import ConfigError
from mitigate.metrics import english
from mitigate.metrics.words import Token, tokenize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

LEMMATIZERS: Final = ("wordnet", "pattern", "closed")

_TABLES: Final = Path(__file__).with_name("coco_objects.json")
#: First letter of a Penn Treebank tag -> WordNet's part of speech; anything else is taken for a noun.
_PARTS: Final = {"J": "a", "V": "v", "N": "n", "R": "r"}


def lemmatize(text: str, lemmatizer: str, matter: Set[str] | None = None) -> list[Token]:
    """Cut a text into tokens, with the lemma in place of each token's text.

    Parameters
    ----------
    text
        Any text.
    lemmatizer
        One of `LEMMATIZERS`.
    matter
        The lemmas of interest. A word that has none of them may get any of its base forms, which saves most of the time
        of ``wordnet``.

    Raises
    ------
    ConfigError
        If there is no such lemmatizer, or nltk is not installed.
    DataError
        If nltk's data is not installed.
    """
    if lemmatizer == "wordnet":
        return _wordnet(text, matter)
    if lemmatizer not in LEMMATIZERS:
        raise ConfigError(f"unknown lemmatizer {lemmatizer!r}; it must be one of {', '.join(LEMMATIZERS)}")
    forms: Mapping[str, str] = tables()[lemmatizer]
    return [Token(forms.get(word, word), start, end) for word, start, end in tokenize(text)]


@cache
def tables() -> dict[str, Any]:
    """Return the tables of words that come with the project."""
    data: dict[str, Any] = json.loads(_TABLES.read_text(encoding="utf-8"))
    return data


def _wordnet(text: str, matter: Set[str] | None) -> list[Token]:
    lower = text.lower()
    found = english.tokens(lower)
    words = [token.text for token in found]
    unclear = [index for index, word in enumerate(words) if _is_unclear(word, matter)]
    lemmas = [english.base(word) for word in words]
    for index, tag in english.tags(words, unclear).items():
        lemmas[index] = english.base(words[index], _PARTS.get(tag[0], "n"))
    origin: Sequence[int] = range(len(text))
    if len(lower) != len(text):  # a capital may be more than one character in lower case
        origin = [index for index, sign in enumerate(text) for _ in sign.lower()]
    return [
        Token(lemma, origin[start], origin[end - 1] + 1) for lemma, (_, start, end) in zip(lemmas, found, strict=True)
    ]


def _is_unclear(word: str, matter: Set[str] | None) -> bool:
    """Whether the part of speech decides which lemma a word has, and that matters."""
    forms = _forms(word)
    return len(forms) > 1 and (matter is None or not matter.isdisjoint(forms))


@lru_cache(maxsize=1 << 16)
def _forms(word: str) -> frozenset[str]:
    return frozenset(english.base(word, part) for part in _PARTS.values())
