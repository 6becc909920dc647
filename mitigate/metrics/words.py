"""Cutting English text into words the way the usual tools do, with the place of every word.

CHAIR and CIDEr are defined over the tokens of the Penn Treebank style: punctuation stands alone, "dog's" is two tokens,
"t-shirt" and "and/or" are one. The rules below give them without data files. They follow nltk's ``word_tokenize``; the
one part of it that is a trained model, telling the full stop of a sentence from that of an abbreviation, is the short
rule of `_is_abbreviation`.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class Token(NamedTuple):
    """A word or sign as it counts, and where it stands: ``text[start:end]``."""

    text: str
    start: int
    end: int


_CHUNK: Final = re.compile(r"\S+")
#: What is a token wherever it stands. A comma or colon inside a number is not.
_SIGN: Final = re.compile(r"`+|''|\.{2,}|--|[\"«»“”‘’„;@#$%&?!*\[\](){}<>\u2012-\u2015]|[:,](?!\d)")
#: Where a sentence may end. Of several places between two white spaces nltk looks at the last.
_END: Final = re.compile(r"[.?!](?=[?!)\";}\]*:@'({\[«»“”‘’]|\Z)")
#: The full stop that ends a text, and the quotes and brackets that may close behind it.
_LAST: Final = re.compile(r"\.(?=[\])}>\"'»”’]*\Z)")
_CLITIC: Final = re.compile(r"(?<=[^'])('s|'m|'d|'ll|'re|'ve|n't)\Z", re.IGNORECASE)
_CLOSING_QUOTE: Final = re.compile(r"(?<=[^'])'\Z")
_OPENING_QUOTE: Final = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
#: Words that are two tokens; the first is of three letters.
SPLITS: Final = frozenset(("cannot", "gimme", "gonna", "gotta", "lemme", "wanna"))
_ABBREVIATIONS: Final = frozenset(
    ("co", "corp", "dr", "inc", "jr", "ltd", "mr", "mrs", "ms", "mt", "prof", "rev", "sr", "st", "vs")
)


def tokenize(text: str) -> list[Token]:
    """Cut a text into tokens, in order."""
    end = len(text.rstrip())
    tokens: list[Token] = []
    for chunk in _CHUNK.finditer(text):
        word = chunk.group()
        if word.isalpha() and word.lower() not in SPLITS:  # nine of ten: nothing to cut
            tokens.append(Token(word.lower(), *chunk.span()))
        else:
            tokens.extend(_cut(word, chunk.start(), end))
    return tokens


def _cut(chunk: str, offset: int, length: int) -> Iterator[Token]:
    """Cut what stands between two white spaces."""
    cuts = {0, len(chunk)}
    for sign in _SIGN.finditer(chunk):
        cuts |= set(sign.span())
    last = offset + len(chunk) == length
    for stop in (*[*_END.finditer(chunk)][-1:], *(_LAST.finditer(chunk) if last else ())):
        before = chunk[: stop.start()]
        if stop.group() == "." and not before.endswith(".") and (last or not _is_abbreviation(before)):
            cuts |= set(stop.span())
    places = sorted(cuts)
    for start, end in pairwise(places):
        yield from _cut_word(chunk[start:end], offset + start)


def _cut_word(word: str, offset: int) -> Iterator[Token]:
    """Cut quotes and clitics off a word without punctuation: ``'dogs'`` is three tokens, ``dog's`` two."""
    cuts = {0, len(word), *(place for quote in _OPENING_QUOTE.finditer(word) for place in quote.span())}
    end = len(word)
    if quote := _CLOSING_QUOTE.search(word):
        end = quote.start()
        cuts.add(end)
    if clitic := _CLITIC.search(word, 0, end):
        cuts.add(clitic.start())
    if word.lower() in SPLITS:
        cuts.add(3)
    places = sorted(cuts)
    for start, end in pairwise(places):
        yield Token(word[start:end].lower(), offset + start, offset + end)


def _is_abbreviation(word: str) -> bool:
    """Whether a full stop belongs to the word before it: an initial, ``u.s.``, or a title or company."""
    lower = re.split(r"[^\w.]", word.lower())[-1]
    return (len(lower) == 1 and lower.isalpha()) or "." in lower.strip(".") or lower in _ABBREVIATIONS
