"""Counts per image, and metrics that never divide by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import DataError
from mitigate.metrics import ImageCounts, Interval
from mitigate.metrics.base import divide, ratio, values

RATE = ratio("rate", "Rate", "hits", "all")


def test_counts_of_one_image_are_summed_and_images_sorted() -> None:
    counts = ImageCounts.accumulate(
        [("b", {"hits": 1, "all": 2}), ("a", {"all": 3}), ("b", {"hits": 4, "all": 5})], ["hits", "all", "hits"]
    )
    assert counts.images == ("a", "b")
    assert counts.columns["hits"].tolist() == [0, 5]
    assert counts.columns["all"].tolist() == [3, 7]
    assert values(counts, [RATE]) == {"rate": 0.5}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=20), st.randoms())
def test_the_order_of_samples_does_not_matter(rows: list[tuple[str, int, int]], random: object) -> None:
    made = [(image, {"hits": float(hits), "all": float(total)}) for image, hits, total in rows]
    one = ImageCounts.accumulate(made, RATE.columns)
    random.shuffle(made)  # type: ignore[attr-defined]
    other = ImageCounts.accumulate(made, RATE.columns)
    assert one.images == other.images
    assert all(np.array_equal(one.columns[name], other.columns[name]) for name in RATE.columns)


def test_a_ratio_without_denominator_is_undefined_not_an_error() -> None:
    with np.errstate(all="raise"):
        assert math.isnan(values(ImageCounts.accumulate([], RATE.columns), [RATE])["rate"])
        assert np.array_equal(
            divide(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0])), [0.5, np.nan, np.nan], equal_nan=True
        )


def test_metrics_work_on_any_leading_shape() -> None:
    sums = np.arange(24, dtype=float).reshape(3, 4, 2) + 1
    assert np.allclose(RATE.compute(sums), sums[..., 0] / sums[..., 1])


def test_undeclared_missing_and_non_finite_counts_are_refused() -> None:
    with pytest.raises(DataError, match=r"'img'.*'other'"):
        ImageCounts.accumulate([("img", {"other": 1})], RATE.columns)
    with pytest.raises(DataError, match="must be finite"):
        ImageCounts.accumulate([("img", {"hits": math.nan})], RATE.columns)
    with pytest.raises(DataError, match=r"metric 'rate'.*'hits'"):
        ImageCounts(("img",), {"all": np.ones(1)}).matrix(RATE)
    with pytest.raises(DataError, match="shape"):
        ImageCounts(("img",), {"all": np.ones(1), "hits": np.ones(2)}).matrix(RATE)


def test_only_an_interval_on_one_side_excludes_zero() -> None:
    assert Interval(0.2, 0.1, 0.3).excludes_zero
    assert Interval(-0.2, -0.3, -0.1).excludes_zero
    assert not Interval(0.2, -0.1, 0.3).excludes_zero
    assert not Interval(0.0, 0.0, 0.0).excludes_zero
    assert not Interval(math.nan, math.nan, math.nan).excludes_zero
