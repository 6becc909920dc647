"""Scores of captions and answers, against values worked out by hand."""

from __future__ import annotations

import pytest

from mitigate.testbed.language import Question
from mitigate.testbed.scores import (
    answer_metrics,
    caption_metrics,
    chair_difference,
    kinship_metrics,
    rate_by_sentence,
)

CAPTIONS = [
    "The cup at top left is red. The spoon at top center is blue.",
    "The boat at top left is red. The boat at top left is red. The drum at top center is blue.",
    "The car at top left is red.",
]
TRUTHS = [frozenset({"cup", "pot"}), frozenset({"boat", "lamp"}), frozenset({"car"})]


def test_caption_metrics() -> None:
    scores = caption_metrics(CAPTIONS, TRUTHS)
    assert scores["chair_i"] == pytest.approx(2 / 6)
    assert scores["chair_s"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(3 / 5)
    assert scores["words"] == pytest.approx((14 + 21 + 7) / 3)


def test_kinship() -> None:
    scores = kinship_metrics(CAPTIONS, TRUTHS)
    assert scores["count"] == 2
    assert scores["partner"] == pytest.approx(0.5)
    assert scores["related"] == pytest.approx(0.5)
    # 22 are absent in either scene. Partners: spoon and knife; fish and desk. Theme-mates add four in the second.
    assert scores["partner_by_chance"] == pytest.approx(2 / 22)
    assert scores["related_by_chance"] == pytest.approx((2 / 22 + 6 / 22) / 2)


def test_rate_by_sentence() -> None:
    rows = rate_by_sentence(CAPTIONS, TRUTHS)
    assert rows == [
        {"rate": 0.0, "mentions": 3.0},
        {"rate": 0.5, "mentions": 2.0},
        {"rate": 1.0, "mentions": 1.0},
    ]


def test_answers() -> None:
    questions = [Question("test-0", "cup", label, "", "random") for label in ("yes", "yes", "no", "no")]
    scores = answer_metrics(questions, ["Yes", "No", "Yes.", "maybe"])
    assert scores == {"accuracy": 0.5, "f1": 0.5, "yes_rate": 0.5, "unclear": 0.25}


def test_difference_has_an_interval_that_shrinks_with_the_sample() -> None:
    few = chair_difference(CAPTIONS, ["The cup at top left is red."] * 3, TRUTHS)
    assert few["difference"] == pytest.approx(2 / 3 - 2 / 6)
    assert few["low"] <= few["difference"] <= few["high"]
    many = chair_difference(CAPTIONS * 50, ["The cup at top left is red."] * 150, TRUTHS * 50)
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert many["low"] > 0
