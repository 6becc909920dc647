"""What the methods did, from the telemetry: a method that did nothing shows zeros."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.effects import effects, stack_effect, totals
from mitigate.records import SampleRecord


def record(number: int, telemetry: dict[str, dict[str, float]]) -> SampleRecord:
    return SampleRecord(
        id=str(number), image_id="i", task="caption", prompt="", text="", tokens=5, finished=True, telemetry=telemetry
    )


BUS = {"attention_rows": 40.0, "forwards": 5.0, "tokens": 5.0}


def test_totals_sum_over_samples_and_keep_methods_that_counted_nothing() -> None:
    summed = totals([record(1, {"a": {"x": 1.5}, "b": {}, "bus": BUS}), record(2, {"a": {"x": 2, "y": 1}, "bus": BUS})])
    assert totals([]) == {}
    assert totals([record(1, {}), record(2, {"bus": {"tokens": 7.0}})]) == {"bus": {"tokens": 12.0}}
    assert summed == {
        "a": {"x": 3.5, "y": 1.0},
        "b": {},
        "bus": {"attention_rows": 80.0, "forwards": 10.0, "tokens": 10.0},
    }


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.randoms())
def test_totals_do_not_depend_on_the_order_of_samples(amounts: list[float], random: object) -> None:
    records = [record(i, {"a": {"x": amount}}) for i, amount in enumerate(amounts)]
    one = totals(records)
    random.shuffle(records)  # type: ignore[attr-defined]
    assert totals(records) == one


def test_undefined_counters_stay_undefined() -> None:
    assert math.isnan(totals([record(1, {"a": {"x": math.nan}}), record(2, {"a": {"x": 1.0}})])["a"]["x"])
    assert math.isnan(totals([record(1, {"a": {"x": math.inf}}), record(2, {"a": {"x": -math.inf}})])["a"]["x"])


def test_effects_are_shares_of_what_there_was() -> None:
    counters = {
        "rows_edited": 20.0,
        "l1_change": 5.0,
        "tokens_edited": 6.0,
        "rejections": 2.0,
        "tokens_changed": 5.0,
        "extra_forwards": 4.0,
        "extra_backwards": 10.0,
        "seconds": 1.0,
    }
    found = effects({"a": counters, "bus": {"attention_rows": 80.0, "forwards": 10.0, "tokens": 10.0}}, samples=2)
    assert list(found) == ["a"]
    effect = found["a"]
    assert effect.rows_edited_share == 0.25
    assert effect.l1_per_row == 0.25
    assert effect.tokens_edited_per_sample == 3.0
    assert effect.rejections_per_token == 0.2
    assert effect.tokens_changed_per_token == 0.5
    assert effect.extra_forwards_per_token == 0.4
    assert effect.extra_backwards_per_token == 1.0
    assert effect.seconds_per_token == 0.1
    assert not effect.idle


@pytest.mark.parametrize("counters", [{}, {"steps": 5.0, "gated": 5.0, "seconds": 0.5, "extra_backwards": 5.0}])
def test_a_method_that_changed_nothing_is_idle_and_shows_zeros(counters: dict[str, float]) -> None:
    effect = effects({"a": counters, "bus": BUS}, samples=1)["a"]
    assert effect.idle
    shown = ("rows_edited_share", "l1_per_row", "tokens_edited_per_sample", "steps_edited_per_token")
    assert [getattr(effect, name) for name in (*shown, "rejections_per_token")] == [0.0] * 5


@pytest.mark.parametrize(
    "counter", ["rows_edited", "tokens_edited", "steps_edited", "tokens_changed", "rejections", "fallbacks"]
)
def test_every_kind_of_change_ends_idleness(counter: str) -> None:
    assert not effects({"a": {counter: 1.0}, "bus": BUS}, samples=1)["a"].idle


def test_without_denominators_nothing_is_zero_and_something_is_undefined() -> None:
    nothing = dataclasses.asdict(effects({"a": {}}, samples=0)["a"])
    assert set(nothing.values()) == {0.0, True}
    assert math.isnan(effects({"a": {"rejections": 1.0}}, samples=1)["a"].rejections_per_token)


def test_a_stack_adds_up_its_methods() -> None:
    summed = {"a": {"rows_edited": 40.0}, "b": {"rows_edited": 20.0, "rejections": 1.0}, "bus": BUS}
    effect = stack_effect(summed, samples=1)
    assert effect.rows_edited_share == 1.5
    assert effect.rejections_per_token == 0.2
    assert stack_effect({"bus": BUS}, samples=1).idle
