"""Estimates against scipy and against sums done by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.stats import binomtest

from mitigate.diagnostics import stats
from mitigate.statistics import bootstrap

RNG = np.random.default_rng(3)


def test_auroc_is_the_mann_whitney_statistic() -> None:
    scores = np.round(RNG.normal(size=60), 1)  # with ties
    positive = RNG.random(60) < 0.4
    images = [f"i{number % 11}" for number in range(60)]
    u = scipy_stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    found = stats.auroc(scores, positive, images, n=200)
    assert found.value == pytest.approx(u / (positive.sum() * (~positive).sum()))
    assert found.low < found.value < found.high
    assert found.n == 60


def test_auroc_resamples_images() -> None:
    # image a: positive above negative; image b: below. A resample aa gives 1, bb gives 0, ab the whole: 0.5
    found = stats.auroc([2.0, 1.0, 3.0, 4.0], [True, False, True, False], ["a", "a", "b", "b"], n=4000)
    # positives 2, 3; negatives 1, 4: wins 2>1, 3>1, of 4 pairs
    assert found.value == 0.5
    assert (found.low, found.high) == (0.0, 1.0)
    assert found.p == 1.0


@pytest.mark.parametrize("n", [200])
def test_auroc_without_one_side_is_undefined(n: int) -> None:
    found = stats.auroc([1.0, 2.0], [True, True], ["a", "b"], n=n)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_pearson_is_scipys_and_its_interval_covers() -> None:
    x = RNG.normal(size=80) + 1e6  # far from zero
    y = 0.5 * (x - 1e6) + RNG.normal(size=80)
    images = [f"i{number}" for number in range(80)]
    found = stats.pearson(x, y, images, n=500)
    expected = scipy_stats.pearsonr(x, y)
    assert found.value == pytest.approx(expected.statistic, abs=1e-9)
    low, high = expected.confidence_interval()
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)
    assert stats.pearson(x, 1e-12 * y, images, n=100).value == pytest.approx(expected.statistic, abs=1e-9)
    binary = (y > 0).astype(float)
    point = scipy_stats.pointbiserialr(binary, x)
    assert stats.pearson(x, binary, images, n=200).value == pytest.approx(point.statistic, abs=1e-9)


def test_pearson_of_a_constant_is_undefined() -> None:
    assert math.isnan(stats.pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], list("abc"), n=200).value)


@pytest.mark.parametrize(("r", "n"), list(product([-0.97, -0.3, 0.0, 0.05, 0.6], [3, 4, 10, 30, 500])))
def test_correlation_p_is_scipys(r: float, n: int) -> None:
    t = r * math.sqrt((n - 2) / (1 - r * r))
    assert stats.correlation_p(r, n) == pytest.approx(2 * scipy_stats.t.sf(abs(t), n - 2), rel=1e-8)


def test_correlation_p_at_the_ends() -> None:
    assert stats.correlation_p(1.0, 5) == 0.0
    assert math.isnan(stats.correlation_p(0.5, 2))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 10), (50, 50), (17, 400)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="wilson")
    found = stats.wilson(k, n)
    assert (found.value, found.n) == (k / n, n)
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)
    assert math.isnan(stats.wilson(0, 0).value)


def test_means_weigh_tokens_and_resample_images() -> None:
    found = stats.mean([1.0, 1.0, 1.0, 5.0, math.nan], ["a", "a", "a", "b", "b"], n=4000)
    assert (found.value, found.n) == (2.0, 4)
    assert (found.low, found.high) == (1.0, 5.0)  # resamples aa and bb


def test_one_image_has_no_spread() -> None:
    found = stats.mean([1.0, 9.0], ["a", "a"], n=200)
    assert (found.low, found.high) == (5.0, 5.0)


def test_differences_share_their_images() -> None:
    # in every image the second side is 2 higher: paired by image, the difference has no spread
    first = stats.difference([0.0, 10.0], ["a", "b"], [2.0, 12.0], ["a", "b"], n=500)
    assert (first.value, first.low, first.high) == (2.0, 2.0, 2.0)
    assert first.p is not None
    assert 0.1 < first.p < 0.5  # two images prove nothing, however alike they are
    assert math.isnan(stats.difference([0.0], ["a"], [], [], n=200).value)


def test_equal_bins_hold_equal_counts() -> None:
    parts = stats.equal_bins([3.0, 1.0, 2.0, 5.0, 4.0], 2)
    assert [part.tolist() for part in parts] == [[1, 2, 0], [4, 3]]
    assert len(stats.equal_bins([1.0], 30)) == 1


def test_bootstrap_tests_against_the_null_it_is_given() -> None:
    values = RNG.normal(0.5, 0.1, size=40)

    def mean(weights: np.ndarray) -> np.ndarray:
        return (weights @ values) / weights.sum(1)

    images = [str(number) for number in range(40)]
    assert bootstrap(images, mean, 500, null=0.5).p > 0.05
    assert bootstrap(images, mean, 500).p < 0.01
    spread = bootstrap(images, mean, 4000)
    assert spread.high - spread.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(40), rel=0.1)
    assert math.isnan(bootstrap([], mean, 500).value)
