"""CHAIR counts mentions, recall counts types, and the word table is closed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import DataError
from mitigate.metrics.base import ImageCounts, values
from mitigate.metrics.chair import COLUMNS, chair_counts, chair_metrics, mentions

WORDS = {
    "dog": "dog",
    "dogs": "dog",
    "puppy": "dog",
    "cat": "cat",
    "bus": "bus",
    "bus stop": "bus stop",
    "light": "lamp",
    "traffic light": "traffic light",
}


def named(text: str) -> list[str]:
    return [mention.name for mention in mentions(text, WORDS)]


def score(*captions: tuple[str, list[str]]) -> dict[str, float]:
    rows = [(str(i), chair_counts(text, truth, WORDS)) for i, (text, truth) in enumerate(captions)]
    return values(ImageCounts.accumulate(rows, COLUMNS), chair_metrics())


def test_words_are_found_whatever_their_case_and_punctuation() -> None:
    assert named("A DOG, two dogs; the puppy's (cat).") == ["dog", "dog", "dog", "cat"]


def test_only_whole_words_count() -> None:
    assert named("dogma, catalogue, bus-stop, hotdog") == []


def test_forms_of_several_words_win_over_their_parts() -> None:
    assert named("a traffic light, a light, a bus stop, a bus and a dog") == [
        "traffic light",
        "lamp",
        "bus stop",
        "bus",
        "dog",
    ]


@given(st.text(alphabet="dogcat sb.,-'\n", max_size=60))
def test_mentions_point_at_their_words(text: str) -> None:
    end = 0
    for mention in mentions(text, WORDS):
        assert end <= mention.start < mention.end
        assert WORDS[" ".join(text[mention.start : mention.end].lower().split())] == mention.name
        end = mention.end


def test_counts_of_one_caption() -> None:
    counts = chair_counts("A dog and a dog and a cat see a cat.", ["dog", "bus"], WORDS)
    assert list(counts.values()) == [1, 1, 4, 2, 2, 1, 11]


def test_repeated_hallucinations_count_again_but_recall_counts_types() -> None:
    result = score(("A cat, a cat and a dog.", ["dog", "bus"]), ("A bus.", ["bus"]))
    assert result["chair_i"] == pytest.approx(2 / 4)
    assert result["chair_s"] == pytest.approx(1 / 2)
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["length"] == pytest.approx((7 + 2) / 2)


def test_a_caption_that_names_nothing_stays_in_the_denominator_of_chair_s() -> None:
    result = score(("Nothing here.", ["dog"]), ("A cat.", ["dog"]))
    assert (result["chair_s"], result["chair_i"], result["recall"]) == (0.5, 1.0, 0.0)


def test_where_the_script_divides_by_zero_the_value_is_zero() -> None:
    result = score(("Nothing.", []))
    assert (result["chair_s"], result["chair_i"], result["recall"]) == (0.0, 0.0, 0.0)
    assert math.isnan(score()["chair_s"])


def test_an_object_that_no_word_can_name_is_refused() -> None:
    with pytest.raises(DataError, match="'zebra'"):
        chair_counts("A zebra.", ["zebra"], WORDS)
