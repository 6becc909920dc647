"""POPE: two parsers that differ where they should, and rates that are what they say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts, values
from mitigate.metrics.pope import SPLITS, columns, parse, pope_counts, pope_metrics


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("NO", "no", "yes"),
        (" **No**! ", "no", "yes"),
        ("No.", "no", "no"),
        ("No, there is none", "no", "no"),
        ("Yes, there is one.", "yes", "yes"),
        ("Yes. There is no other.", None, "yes"),
        ("yes no", None, "no"),
        ("", None, "yes"),
        ("Maybe", None, "yes"),
        ("Not sure", None, "yes"),
        ("It is not there", None, "no"),
        ("There isn't", None, "yes"),
        ("Nope, nothing known", None, "yes"),
        ("no, no", "no", "no"),
        ("1. No", "no", "yes"),
        ("yes\u2019no", None, "yes"),
    ],
)
def test_parsers(text: str, strict: str | None, official: str) -> None:
    assert parse(text) == strict
    assert parse(text, "official") == official


@given(st.text())
def test_no_reply_breaks_a_parser(text: str) -> None:
    assert parse(text) in ("yes", "no", None)
    assert parse(text, "official") in ("yes", "no")


def test_unknown_parser_and_label_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'loose'.*strict, official"):
        parse("yes", "loose")
    with pytest.raises(DataError, match="'maybe'"):
        pope_counts("yes", "maybe", "random")


def score(replies: list[tuple[str, str, str]], parser: str = "strict") -> dict[str, float]:
    rows = [("img", pope_counts(text, label, split, parser)) for text, label, split in replies]
    return values(ImageCounts.accumulate(rows, columns()), pope_metrics())


def test_rates_of_one_split() -> None:
    replies = [("Yes", "yes"), ("Yes", "yes"), ("No", "yes"), ("Yes", "no"), ("No", "no"), ("?", "no"), ("?", "yes")]
    result = score([(text, label, "popular") for text, label in replies])
    assert result["pope/popular/accuracy"] == pytest.approx(3 / 7)
    precision, recall = 2 / 3, 2 / 4
    assert result["pope/popular/f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert result["pope/popular/yes_rate"] == pytest.approx(3 / 7)
    assert result["unparsed_rate"] == pytest.approx(2 / 7)
    assert math.isnan(result["pope/random/f1"])
    assert math.isnan(result["pope/mean/f1"])


def test_the_official_parser_turns_silence_into_yes_and_still_reports_it() -> None:
    result = score([("", "no", "random"), ("", "yes", "random")], "official")
    assert result["pope/random/accuracy"] == 0.5
    assert result["pope/random/yes_rate"] == 1.0
    assert result["unparsed_rate"] == 1.0


def test_f1_is_zero_without_a_right_yes_and_undefined_without_anything_to_find() -> None:
    assert score([("No", "yes", "random")])["pope/random/f1"] == 0.0
    assert score([("Yes", "no", "random"), ("No", "yes", "random")])["pope/random/f1"] == 0.0
    assert math.isnan(score([("No", "no", "random")])["pope/random/f1"])


def test_means_are_over_splits_not_over_questions() -> None:
    replies = [("Yes", "yes", "random"), ("No", "yes", "popular"), ("Yes", "yes", "adversarial")]
    replies += [("Yes", "yes", "random")] * 5
    result = score(replies)
    for statistic in ("accuracy", "f1", "yes_rate"):
        each = [result[f"pope/{split}/{statistic}"] for split in SPLITS]
        assert each == [1.0, 0.0, 1.0]
        assert result[f"pope/mean/{statistic}"] == pytest.approx(2 / 3)
