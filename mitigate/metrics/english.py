"""English as nltk reads it: tokens, parts of speech, and WordNet's base forms.

The official scripts tag every word of a caption and send every sentence through thirty regular expressions. Here a word
is tagged only if somebody wants its tag (`tags`), and plain sentences are split by one expression (`words_of`); the
results are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.words import SPLITS, Token

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NLTK_DATA: Final = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")

#: nltk writes a quote in one of these ways, whichever stands in the text.
_QUOTE: Final = re.compile("``|''|\"")
#: A sentence of nothing but words, commas and a full stop.
_PLAIN: Final = re.compile(r"[A-Za-z-]+(?:,?\s+[A-Za-z-]+)*\.?")
_PIECE: Final = re.compile(r"[A-Za-z-]+|[,.]")
_NEED: Final = "reading captions as the official scripts do (AMBER, or CHAIR with lemmatizer=wordnet) needs"
#: How many words behind a word its tag depends on.
_AHEAD: Final = 2


@dataclass(frozen=True)
class Nltk:
    """What is used of nltk."""

    sentences: Callable[[str], list[str]]
    tokenizer: Any
    tagger: Any
    lemmatizer: Any


@cache
def load() -> Nltk:
    """Load nltk and its data.

    Raises
    ------
    ConfigError
        If nltk is not installed.
    DataError
        If its data is not.
    """
    try:
        from nltk import NLTKWordTokenizer, PerceptronTagger, WordNetLemmatizer, sent_tokenize
        from nltk.corpus import wordnet
    except ImportError:
        raise ConfigError(f"{_NEED} nltk; get it with: pip install 'mitigate[chair]'") from None
    try:
        sent_tokenize("a")
        wordnet.ensure_loaded()
        return Nltk(sent_tokenize, NLTKWordTokenizer(), PerceptronTagger(), WordNetLemmatizer())
    except LookupError:
        data = " ".join(NLTK_DATA)
        raise DataError(f"{_NEED} data of nltk; get it with: python -m nltk.downloader {data}") from None


def tokens(text: str) -> list[Token]:
    """Cut a text into the tokens of nltk's ``word_tokenize``, each with its place.

    Raises
    ------
    ConfigError, DataError
        As `load`.
    """
    nltk = load()
    words = [word for sentence in nltk.sentences(text) for word in words_of(sentence, nltk.tokenizer)]
    return locate(words, text)


def words_of(sentence: str, tokenizer: Any) -> list[str]:
    """Return what a tokenizer of nltk makes of a sentence."""
    if _PLAIN.fullmatch(sentence) and "--" not in sentence:
        words: list[str] = _PIECE.findall(sentence)
        if SPLITS.isdisjoint(map(str.lower, words)):
            return words
    found: list[str] = tokenizer.tokenize(sentence)
    return found


def locate(words: Sequence[str], text: str) -> list[Token]:
    """Find each of nltk's tokens in the text it was cut from.

    Raises
    ------
    DataError
        If a token is not in the text behind the one before it.
    """
    found, behind = [], 0
    for word in words:
        if _QUOTE.fullmatch(word):
            quote = _QUOTE.search(text, behind)
            start, end = quote.span() if quote else (-1, -1)
        else:
            start = text.find(word, behind)
            end = start + len(word)
        if start < 0:
            raise DataError(f"the token {word!r} is not in the caption {text!r:.80}")
        found.append(Token(word, start, end))
        behind = end
    return found


def tags(words: Sequence[str], wanted: Sequence[int]) -> dict[int, str]:
    """Return the tags that nltk gives some words within their text.

    A tag depends on the two tags before it, the two words before it and the two behind it. Frequent words have one tag
    wherever they stand, so tagging may begin at two of them.

    Parameters
    ----------
    words
        The whole text.
    wanted
        Indices of words, ascending.
    """
    tagger = load().tagger
    runs: list[tuple[int, int]] = []
    for index in wanted:
        start = max(index - 1, 0)
        while start > 0 and not (words[start] in tagger.tagdict and words[start + 1] in tagger.tagdict):
            start -= 1
        if runs and start < runs[-1][1]:
            start = runs.pop()[0]
        runs.append((start, index + 1 + _AHEAD))
    tagged = {
        index: found
        for start, end in runs
        for index, (_, found) in enumerate(tagger.tag(words[start:end]), start=start)
    }
    return {index: tagged[index] for index in wanted}


@lru_cache(maxsize=1 << 16)
def base(word: str, part: str = "n") -> str:
    """Return WordNet's base form of a word as a noun (``n``), verb (``v``), adjective (``a``) or adverb (``r``)."""
    form: str = load().lemmatizer.lemmatize(word, part)
    return form
