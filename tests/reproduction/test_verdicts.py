"""Verdicts, from their definitions: what the interval holds, and on which side of zero it lies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.reproduction.verdicts import MEANING, Measured, difference_verdict, sign_only, value_verdict

NUMBERS = st.floats(-100, 100).map(lambda number: round(number, 1))
UNDEFINED = Measured(math.nan, math.nan, math.nan)


@pytest.mark.parametrize(
    ("published", "low", "high", "expected"),
    [
        (48.0, 45.0, 51.0, "agrees"),
        (48.0, 48.0, 51.0, "agrees"),  # the end belongs to it
        (48.0, 48.05, 51.0, "agrees"),  # 48.05 is printed as 48.0 or 48.1
        (48.0, 48.06, 51.0, "differs"),
        (48.0, 45.0, 47.94, "differs"),
        (48.0, 45.0, 47.95, "agrees"),
    ],
)
def test_a_value_agrees_if_the_interval_holds_what_rounds_to_it(
    published: float, low: float, high: float, expected: str
) -> None:
    assert value_verdict(published, Measured((low + high) / 2, low, high), 0.05) == expected


@pytest.mark.parametrize(
    ("published", "value", "low", "high", "expected"),
    [
        (-9.6, -8.0, -12.0, -4.0, "confirmed"),
        (-9.6, -3.0, -5.0, -1.0, "weaker"),
        (-9.6, -15.0, -18.0, -12.0, "stronger"),
        (-9.6, -6.0, -13.0, 1.0, "inconclusive"),
        (-9.6, -1.0, -4.0, 2.0, "not found"),
        (-9.6, 0.0, 0.0, 0.0, "not found"),
        (-9.6, 5.0, 2.0, 8.0, "opposite"),
        (1.5, 1.0, 0.5, 1.4, "confirmed"),  # 86.9 - 85.4 may be 1.4
        (1.5, 1.0, 0.5, 1.39, "weaker"),
        (1.5, -1.0, -1.6, -0.2, "opposite"),
        (0.0, 0.5, -1.0, 2.0, "no effect"),
        (0.0, 0.5, 0.1, 2.0, "effect"),
    ],
)
def test_a_difference_is_judged_by_sign_and_size(
    published: float, value: float, low: float, high: float, expected: str
) -> None:
    assert difference_verdict(published, Measured(value, low, high), 0.1) == expected


def test_nothing_measured_is_no_verdict() -> None:
    assert value_verdict(1.0, UNDEFINED, 0.05) == "undefined"
    assert difference_verdict(1.0, UNDEFINED, 0.1) == "undefined"
    assert sign_only(1.0, UNDEFINED) == "undefined"
    assert difference_verdict(1.0, Measured(1.0, math.nan, math.nan), 0.1) == "undefined"


@pytest.mark.parametrize(
    ("published", "value", "expected"),
    [(-2.0, -0.1, "same sign"), (-2.0, 0.1, "opposite sign"), (-2.0, 0.0, "no difference"), (0.0, 3, "no difference")],
)
def test_of_another_model_only_the_sign_is_shown(published: float, value: float, expected: str) -> None:
    assert sign_only(published, Measured(value, value - 5, value + 5)) == expected


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_verdicts_do_not_depend_on_which_direction_is_better(first: float, second: float, a: float, b: float) -> None:
    low, value, high = sorted((first, second, a))
    up, down = Measured(value, low, high), Measured(-value, -high, -low)
    assert difference_verdict(b, up, 0.1) == difference_verdict(-b, down, 0.1)
    assert value_verdict(b, up, 0.05) == value_verdict(-b, down, 0.05)
    assert sign_only(b, up) == sign_only(-b, down)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_every_difference_has_one_verdict_that_fits_its_definition(
    first: float, second: float, third: float, published: float
) -> None:
    low, value, high = sorted((first, second, third))
    verdict = difference_verdict(published, Measured(value, low, high), 0.0)
    inside, zero = low <= published <= high, low <= 0 <= high
    assert verdict in MEANING
    expected = {
        (True, True): {"inconclusive", "no effect"},
        (True, False): {"confirmed"},
        (False, True): {"not found"},
        (False, False): {"weaker", "stronger", "opposite", "effect"},
    }
    assert verdict in expected[inside, zero]
    assert (verdict in ("no effect", "effect")) == (published == 0)
    if verdict in ("weaker", "stronger"):
        assert math.copysign(1, low) == math.copysign(1, published)
        assert (abs(value) < abs(published)) == (verdict == "weaker")


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(0, 50))
def test_a_wider_interval_never_turns_agreement_into_disagreement(
    first: float, second: float, third: float, published: float, more: float
) -> None:
    low, value, high = sorted((first, second, third))
    if value_verdict(published, Measured(value, low, high), 0.05) == "agrees":
        assert value_verdict(published, Measured(value, low - more, high + more), 0.05) == "agrees"
