"""Words, lemmas and the objects they name, against the outputs of the official scripts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import ConfigError, MitigateError
from mitigate.metrics import english
from mitigate.metrics.coco_objects import find, merge, object_words, read, vocabulary
from mitigate.metrics.lemmatizers import LEMMATIZERS, lemmatize
from mitigate.metrics.words import Token, tokenize

VECTORS = Path(__file__).parents[1] / "vectors"
CHAIR: dict[str, Any] = json.loads((VECTORS / "chair.json").read_text())
FORMS: dict[str, list[str | None]] = json.loads((VECTORS / "chair_forms.json").read_text())["forms"]


def nltk_reason() -> str | None:
    """Say why lemmatizer=wordnet cannot run here."""
    try:
        english.load()
    except MitigateError as error:
        return str(error)
    return None


REASON = nltk_reason()
needs_nltk_data = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def tokens(*words: str) -> list[Token]:
    return [Token(word, 10 * index, 10 * index + 9) for index, word in enumerate(words)]


def named(text: str, lemmatizer: str) -> list[str]:
    return [mention.name for mention in read(text, lemmatizer).mentions]


# --- words ------------------------------------------------------------------------------------------------------------

#: What captions are made of, as far as nltk treats it alike inside and at the end of a sentence.
_PIECES = (
    "dog dogs dog's dogs' dogs, dog; (dog) [dog] {dog} <dog> \"dog\" 'dog' “dog” ‘dog’ dog’s hot-dog dog/cat dog,cat "
    "dog:cat dog—cat dog–cat dog--cat dog...cat dog_cat 'a it's don't can't they're we'll i've i'm i'd o'clock cannot "
    "gonna wanna gotta gimme lemme $5 50% #1 a&b **dog** 3.5 1,000 10:30 no.5 ... ? ! ?! - -- … & @ ~ | é 日本"
)
PIECES = _PIECES.split(" ")


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(["", ".", '."', ".)", "!", "?", "...", " "]))
def test_words_of_a_sentence_are_those_of_nltk(pieces: list[str], end: str) -> None:
    nltk = pytest.importorskip("nltk")
    text = " ".join(pieces) + end
    expected = [
        '"' if word in ("``", "''") else word for word in nltk.tokenize.NLTKWordTokenizer().tokenize(text.lower())
    ]
    assert [token.text for token in tokenize(text)] == expected


@given(st.text(alphabet="aB'.,:-\"() \n’Éİ", max_size=40))
def test_words_stand_where_they_say(text: str) -> None:
    found = tokenize(text)
    assert [token.text for token in found] == [text[token.start : token.end].lower() for token in found]
    assert "".join(text[token.start : token.end] for token in found) == "".join(text.split())
    assert all(one.end <= other.start for one, other in pairwise(found))


def test_a_full_stop_ends_every_sentence_but_no_abbreviation() -> None:
    words = [token.text for token in tokenize("A dog. Two cats.\n\nDr. Who in the U.S. army. End.")]
    assert words == ["a", "dog", ".", "two", "cats", ".", "dr.", "who", "in", "the", "u.s.", "army", ".", "end", "."]
    # Also where no white space follows, if a sign does that cannot continue a word; this is what nltk makes of them.
    for text, expected in (
        ("A dog.)cats", "a dog . ) cats"),
        ("dogs.”Two ’cats.'x", "dogs . ” two ’ cats . ' x"),
        ("**dog.** x", "* * dog . * * x"),
        ("dog.;cat bus.'s car.? cat.?bus car.> x", "dog . ; cat bus . 's car. ? cat . ? bus car. > x"),
        ("dog.'cat. x", "dog. ' cat . x"),  # of two places the last one decides
        ("a dog.>", "a dog . >"),
        ("a 'dog's' bed", "a ' dog 's ' bed"),
        ("dog.—cat dog.-cat dog.cat", "dog. — cat dog.-cat dog.cat"),
    ):
        assert " ".join(token.text for token in tokenize(text)) == expected


# --- lemmas of the table ----------------------------------------------------------------------------------------------


def test_forms_under_pattern() -> None:
    found = {form: next(iter(named(form, "pattern")), None) for form in FORMS}
    assert found == {form: row[0] for form, row in FORMS.items()}


def test_pattern_singularizes_what_matters_as_the_original() -> None:
    known = vocabulary()
    matters = set(known.objects) | {part for words in known.merged for part in words.split()}
    for form, singular in CHAIR["singularize"].items():
        if form.endswith("'"):
            continue  # two tokens
        ours = [token.text for token in lemmatize(form, "pattern")]
        assert (ours[0] if ours[0] in matters else None) == (singular if singular in matters else None), form


def test_forms_under_closed() -> None:
    wrong = {
        form: row[0]
        for form, row in FORMS.items()
        if row[0] and row[0] == row[1] and named(form, "closed") != [row[0]] and named(form, "closed") != []
    }
    assert wrong == {}
    for text, name in (
        ("a bus", "bus"),
        ("men", "person"),
        ("vases", "vase"),
        ("ties", "tie"),
        ("canoes", "boat"),
        ("thieves", "person"),
        ("motor bikes", "motorcycle"),
        ("two cheesecakes", "cake"),
        ("iPhones", "cell phone"),
        ("tennis rackets", "tennis racket"),
        ("sports balls", "sports ball"),
        ("a stove top oven", "oven"),
        ("potted plants", "potted plant"),
        ("dining tables", "dining table"),
        ("glass, glasses", None),
        ("tennis", None),
    ):
        assert named(text, "closed") == ([name] if name else []), text


def test_every_synonym_and_its_plural_is_found_under_closed() -> None:
    for form, name in object_words().items():
        assert set(named(form, "closed")) == {name}, form
    assert len(set(object_words().values())) == 80


@pytest.mark.parametrize(
    ("text", "pattern", "closed"),
    [
        ("a bus and buses", ["bus"], ["bus", "bus"]),
        ("iPhone", [], ["cell phone"]),
        ("motor bike", [], ["motorcycle"]),
        ("a tennis racket", ["tennis racket"], ["tennis racket"]),
        ("a wine glass, wine glasses", ["wine glass", "wine glass"], ["wine glass", "wine glass"]),
        ("table tennis ball", ["dining table", "sports ball"], ["dining table", "sports ball"]),
    ],
)
def test_oddities_stay_in_pattern_and_not_in_closed(text: str, pattern: list[str], closed: list[str]) -> None:
    assert named(text, "pattern") == pattern
    assert named(text, "closed") == closed


# --- what follows the lemmas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["opera", "standalone"])
def test_lemmas_of_the_official_scripts_name_their_objects(variant: str) -> None:
    for row in CHAIR["captions"]:
        reading = find(tokens(*row[variant]["words"]), vocabulary())
        assert [mention.name for mention in reading.mentions] == row[variant]["generated"], row["caption"]
        assert reading.length == len(row[variant]["words"])


def test_pairs_merge_from_left_to_right() -> None:
    merged = merge(tokens("a", "hot", "dog", "baby", "dog", "bow", "tie", "track"), vocabulary())
    assert [token.text for token in merged] == ["a", "hot dog", "dog", "tie", "track"]
    assert merged[1][1:] == (10, 29)
    # "train track" is taken first, so "passenger train" is not.
    assert [token.text for token in merge(tokens("passenger", "train", "track"), vocabulary())] == ["train", "track"]
    assert [token.text for token in merge(tokens("stove", "top", "oven"), vocabulary())] == ["stove", "top", "oven"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["toilet", "seat"], ["toilet"]),
        (["the", "seat", "of", "the", "toilet"], ["toilet"]),
        (["seat", "toilet", "seat", "chair"], ["toilet", "chair"]),
        (["seat", "toilet seat"], ["chair"]),
        (["baby", "cub"], []),
        (["adult", "bear"], ["bear"]),
        (["passenger", "jet"], ["airplane"]),
        (["dog", "dog"], ["dog", "dog"]),
        ([], []),
    ],
)
def test_rules_of_the_vocabulary(words: list[str], expected: list[str]) -> None:
    assert [mention.name for mention in find(tokens(*words), vocabulary()).mentions] == expected


@given(st.lists(st.sampled_from(["toilet", "seat", "hot", "dog", "baby", "wine", "glass", "bow", "tie"]), max_size=9))
def test_merging_keeps_all_words_and_their_order(words: list[str]) -> None:
    before = tokens(*words)
    merged = merge(before, vocabulary())
    starts = [token.start for token in merged]
    assert starts == sorted(set(starts))
    if before:
        assert (merged[0].start, merged[-1].end) == (before[0].start, before[-1].end)


# --- nltk -------------------------------------------------------------------------------------------------------------


@needs_nltk_data
def test_captions_under_wordnet() -> None:
    for row in CHAIR["captions"]:
        merged = merge(lemmatize(row["caption"], "wordnet"), vocabulary())
        assert [token.text for token in merged] == row["opera"]["words"]
        assert named(row["caption"], "wordnet") == row["opera"]["generated"], row["caption"]
        assert read(row["caption"], "wordnet").length == len(row["opera"]["words"])


@needs_nltk_data
def test_forms_under_wordnet() -> None:
    from nltk.stem import WordNetLemmatizer

    objects, wordnet = vocabulary().objects, WordNetLemmatizer()
    for form, (_, noun, verb) in FORMS.items():
        assert [objects.get(wordnet.lemmatize(form, part)) for part in "nv"] == [noun, verb], form


def test_captions_under_pattern() -> None:
    for row in CHAIR["captions"]:
        assert named(row["caption"], "pattern") == row["standalone"]["generated"], row["caption"]


def test_only_known_lemmatizers() -> None:
    assert LEMMATIZERS == ("wordnet", "pattern", "closed")
    with pytest.raises(ConfigError, match="unknown lemmatizer 'stem'; it must be one of wordnet, pattern, closed"):
        lemmatize("A dog.", "stem")
