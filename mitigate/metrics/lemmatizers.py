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

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.words import Token, tokenize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEMMATIZERS: Final = ("wordnet", "pattern", "closed")
NLTK_DATA: Final = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")

_TABLES: Final = Path(__file__).with_name("coco_objects.json")
_QUOTES: Final = {"``": '"', "''": '"'}
#: First letter of a Penn Treebank tag -> WordNet's part of speech; anything else is taken for a noun.
_PARTS: Final = {"J": "a", "V": "v", "N": "n", "R": "r"}


def lemmatize(text: str, lemmatizer: str) -> list[Token]:
    """Cut a text into tokens, with the lemma in place of each token's text.

    Raises
    ------
    ConfigError
        If there is no such lemmatizer, or nltk is not installed.
    DataError
        If nltk's data is not installed.
    """
    if lemmatizer == "wordnet":
        return _wordnet(text)
    if lemmatizer not in LEMMATIZERS:
        raise ConfigError(f"unknown lemmatizer {lemmatizer!r}; it must be one of {', '.join(LEMMATIZERS)}")
    forms: Mapping[str, str] = tables()[lemmatizer]
    return [Token(forms.get(word, word), start, end) for word, start, end in tokenize(text)]


@cache
def tables() -> dict[str, Any]:
    """Return the tables of words that come with the project."""
    data: dict[str, Any] = json.loads(_TABLES.read_text(encoding="utf-8"))
    return data


def _wordnet(text: str) -> list[Token]:
    try:
        import nltk
    except ImportError:
        raise ConfigError(
            "benchmark.lemmatizer=wordnet needs nltk: pip install 'mitigate[chair]'; closed and pattern need nothing"
        ) from None
    try:
        words = nltk.word_tokenize(text.lower())
        tags = [tag for _, tag in nltk.pos_tag(words)]
        lemmas = [_lemma(word, _PARTS.get(tag[0], "n")) for word, tag in zip(words, tags, strict=True)]
    except LookupError:
        raise DataError(
            "benchmark.lemmatizer=wordnet needs data of nltk; get it with: python -m nltk.downloader "
            + " ".join(NLTK_DATA)
        ) from None
    places = locate(words, text)
    return [Token(lemma, start, end) for lemma, (start, end) in zip(lemmas, places, strict=True)]


@cache
def _wordnet_forms() -> Any:
    from nltk.stem import WordNetLemmatizer

    return WordNetLemmatizer()


@lru_cache(maxsize=1 << 16)
def _lemma(word: str, part: str) -> str:
    lemma: str = _wordnet_forms().lemmatize(word, part)
    return lemma


def locate(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Return where each token of ``text.lower()`` stands in the text; quotes may have been rewritten.

    Raises
    ------
    DataError
        If a token is not in the text behind the one before it.
    """
    lower = text.lower()
    # A capital may be more than one character in lower case; then count which character each came from.
    origin = None if len(lower) == len(text) else [index for index, sign in enumerate(text) for _ in sign.lower()]
    places, behind = [], 0
    for word in words:
        found = [
            (start, start + len(form))
            for form in (word, _QUOTES.get(word, word))
            if (start := lower.find(form, behind)) >= 0
        ]
        if not found:
            raise DataError(f"the token {word!r} is not in the caption {text!r:.80}")
        start, behind = min(found)
        places.append((start, behind) if origin is None else (origin[start], origin[behind - 1] + 1))
    return places
