"""Tokens, tags and base forms: the short ways give what nltk's long ones give."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import ConfigError, DataError
from mitigate.metrics import english
from mitigate.metrics.coco_objects import vocabulary
from mitigate.metrics.lemmatizers import lemmatize
from tests.metrics.test_lemmatizers import PIECES, needs_nltk_data

_WORDS = (
    "the a of and is are in on by with to red two . , , . seated training parking biking tied dining skiing manned "
    "lighted docked men vases sitting Cannot WANNA ''dogs'' ''a `b` ``c'' \"x\" '' -a- --a re-use Re, dog,cat (a b) "
    'end.) end." end.* İ ΟΔΟΣ dog.”x'
)
WORDS = [*PIECES, *_WORDS.split(" "), "\n\n"]


@given(st.lists(st.sampled_from(WORDS), max_size=9), st.sampled_from(["", ".", "..", ",", "?", ".)", " ."]))
def test_a_plain_sentence_is_cut_as_nltk_cuts_it(pieces: list[str], end: str) -> None:
    tokenizer = pytest.importorskip("nltk").NLTKWordTokenizer()
    sentence = " ".join(pieces) + end
    assert english.words_of(sentence, tokenizer) == tokenizer.tokenize(sentence)


@needs_nltk_data
def test_tokens_are_those_of_nltk_and_stand_where_they_say() -> None:
    nltk = pytest.importorskip("nltk")
    rng = random.Random(0)
    for _ in range(400):
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
        found = english.tokens(text)
        assert [token.text for token in found] == nltk.word_tokenize(text)
        assert "".join(text[token.start : token.end] for token in found) == "".join(text.split())


@needs_nltk_data
def test_tags_of_some_words_are_those_of_the_whole_text() -> None:
    nltk = pytest.importorskip("nltk")
    rng = random.Random(0)
    for _ in range(150):
        words = nltk.word_tokenize(" ".join(rng.choices(WORDS, k=rng.randint(1, 25))))
        wanted = sorted(rng.sample(range(len(words)), k=rng.randint(0, min(len(words), 4))))
        tagged = nltk.pos_tag(words)
        assert english.tags(words, wanted) == {index: tagged[index][1] for index in wanted}


@needs_nltk_data
def test_lemmas_that_matter_are_those_of_the_official_script() -> None:
    nltk = pytest.importorskip("nltk")
    rng, lemmas, matter = random.Random(0), nltk.WordNetLemmatizer(), vocabulary().parts
    for _ in range(150):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))
        tagged = nltk.pos_tag(nltk.word_tokenize(text.lower()))
        official = [lemmas.lemmatize(word, {"J": "a", "V": "v", "R": "r"}.get(tag[0], "n")) for word, tag in tagged]
        assert [token.text for token in lemmatize(text, "wordnet")] == official
        few = [token.text for token in lemmatize(text, "wordnet", matter)]
        assert [word if word in matter else "" for word in few] == [w if w in matter else "" for w in official]


def test_quotes_are_located() -> None:
    text = "An \"é\" 'x ''dog'' ``cat``."
    words = ["An", "``", "é", "''", "'", "x", "``", "dog", "''", "``", "cat", "``", "."]
    places = [text[token.start : token.end] for token in english.locate(words, text)]
    assert places == ["An", '"', "é", '"', "'", "x", "''", "dog", "''", "``", "cat", "``", "."]
    with pytest.raises(DataError, match="'cat' is not in the caption"):
        english.locate(["cat"], "A dog.")


@needs_nltk_data
def test_a_capital_of_two_characters_moves_no_word() -> None:
    text = "İ dog İ"
    assert [text[token.start : token.end] for token in lemmatize(text, "wordnet")] == ["İ", "dog", "İ"]


@pytest.mark.parametrize("lacking", ["nltk", "data"])
def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    nltk = pytest.importorskip("nltk")
    english.load.cache_clear()

    def missing(text: str) -> list[str]:
        raise LookupError("Resource punkt_tab not found")

    expected: tuple[type[Exception], str] = (
        DataError,
        "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet$",
    )
    monkeypatch.setattr(nltk, "sent_tokenize", missing)
    if lacking == "nltk":
        monkeypatch.setitem(sys.modules, "nltk", None)
        expected = (ConfigError, r"pip install 'mitigate\[chair\]'$")
    with pytest.raises(expected[0], match=expected[1]):
        lemmatize("A dog.", "wordnet")
