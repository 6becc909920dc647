"""Bootstrap, McNemar and Holm against slow or independent computations."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mitigate.errors import DataError
from mitigate.metrics.base import Array, ImageCounts, Metric, ratio, values
from mitigate.metrics.chair import COLUMNS, chair_metrics
from mitigate.metrics.pope import columns, pope_metrics
from mitigate.statistics import holm, intervals, mcnemar, mcnemar_p, paired_differences

RATE = ratio("rate", "Rate", "hits", "all")
METRICS = [*chair_metrics(), *pope_metrics()]


def make(seed: int, images: int = 40, shift: float = 0.0) -> ImageCounts:
    """Per-image hits out of a varying number of trials."""
    rng = np.random.default_rng(seed)
    trials = np.random.default_rng(999).integers(1, 9, images)
    hits = rng.binomial(trials, 0.4 + shift)
    names = tuple(f"img-{index:03}" for index in range(images))
    return ImageCounts(names, {"hits": hits.astype(float), "all": trials.astype(float)})


def full(seed: int, images: int) -> ImageCounts:
    rng = np.random.default_rng(seed)
    names = (*COLUMNS, *columns())
    return ImageCounts(
        tuple(f"{index:04}" for index in range(images)),
        {name: rng.integers(1, 7, images).astype(float) for name in names},
    )


def naive_draws(run: ImageCounts, metric: Metric, n: int, seed: int) -> list[float]:
    """One resample at a time, by plain loops over the drawn images, with the same stream of random numbers."""
    drawn = np.random.default_rng(seed).integers(len(run.images), size=(n, len(run.images)))
    return [value_of([run.columns[name][row] for name in metric.columns], metric) for row in drawn]


def value_of(columns: list[Array], metric: Metric) -> float:
    return float(metric.compute(np.array([column.sum() for column in columns])))


def bounds(draws: list[float], images: int) -> tuple[float, float]:
    """Percentiles, moved out as Student's t with ``images - 1`` degrees and the ``n - 1`` of a sample ask for."""
    tail = stats.norm.cdf(-stats.t.ppf(0.975, images - 1) * math.sqrt(images / (images - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def test_intervals_equal_a_naive_bootstrap() -> None:
    run = full(3, 12)
    found = intervals(run, METRICS, 300, 7)
    for metric in METRICS:
        low, high = bounds(naive_draws(run, metric, 300, 7), 12)
        interval = found[metric.name]
        assert interval.value == pytest.approx(values(run, [metric])[metric.name])
        assert (interval.low, interval.high) == pytest.approx((low, high))


def test_differences_equal_a_naive_paired_bootstrap() -> None:
    first, second = full(3, 12), full(4, 12)
    found = paired_differences(first, second, METRICS, 300, 7)
    reached = 0
    for metric in METRICS:
        draws = np.subtract(naive_draws(second, metric, 300, 7), naive_draws(first, metric, 300, 7))
        low, high = bounds(list(draws), 12)
        difference = found[metric.name]
        assert difference.value == pytest.approx(
            values(second, [metric])[metric.name] - values(first, [metric])[metric.name]
        )
        side = (min(sum(draws <= 1e-12), sum(draws >= -1e-12)) + 1) / 301
        by_bootstrap = 2 * stats.t.cdf(stats.norm.ppf(min(side, 0.5)) * math.sqrt(11 / 12), 11)
        assert difference.p == pytest.approx(max(by_bootstrap, naive_swap_p(first, second, metric, 300, 7)))
        reached += difference.p > by_bootstrap + 1e-9
        if difference.p >= 0.05:
            low, high = min(low, 0.0), max(high, 0.0)
        assert (difference.low, difference.high) == pytest.approx((low, high), abs=1e-12)
        assert difference.se == pytest.approx(np.std(draws, ddof=1) * math.sqrt(12 / 11))
        assert difference.effect_size == pytest.approx(difference.value / (difference.se * math.sqrt(12)))
        assert difference.mde == pytest.approx(2.801585 * difference.se, rel=1e-6)
        assert difference.images == 12
    assert 0 < reached < len(METRICS), "both tests must have decided somewhere"


def naive_swap_p(first: ImageCounts, second: ImageCounts, metric: Metric, n: int, seed: int) -> float:
    """Change the two runs' places in a random half of the images, again and again."""
    sides = [[run.columns[name] for name in metric.columns] for run in (first, second)]
    observed = abs(value_of(sides[1], metric) - value_of(sides[0], metric))
    words = np.random.default_rng([seed, 1]).integers(2**64, size=n, dtype=np.uint64)
    extreme = 1
    for word in words.tolist():
        # eight images per byte, beginning with its highest bit
        stay = np.array([word >> (8 * (i // 8) + 7 - i % 8) & 1 for i in range(12)]) == 0
        one, two = ([np.where(stay, a, b) for a, b in zip(*pair, strict=True)] for pair in (sides, sides[::-1]))
        extreme += abs(value_of(two, metric) - value_of(one, metric)) >= observed - 1e-12
    return extreme / (n + 1)


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = intervals(make(1), [RATE], 100, 5)
    monkeypatch.setattr("mitigate.statistics.resampling._CELLS_PER_CHUNK", 123)
    assert intervals(make(1), [RATE], 100, 5) == whole


def test_interval_agrees_with_scipy() -> None:
    run = make(1, images=60)
    reference = stats.bootstrap(
        (run.columns["hits"], run.columns["all"]),
        lambda hits, total, axis: hits.sum(axis=axis) / total.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = intervals(run, [RATE])["rate"]
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.005)


def test_the_seed_decides_the_draws() -> None:
    assert intervals(make(1), [RATE], 200, 1) == intervals(make(1), [RATE], 200, 1)
    assert intervals(make(1), [RATE], 200, 1) != intervals(make(1), [RATE], 200, 2)


def test_pairing_removes_what_both_runs_share() -> None:
    first = make(1, 60)
    second = ImageCounts(first.images, {**first.columns, "hits": first.columns["hits"] + (np.arange(60) % 6 == 0)})
    difference = paired_differences(first, second, [RATE], 2000)["rate"]
    alone = intervals(first, [RATE], 2000)["rate"]
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)


def test_a_run_does_not_differ_from_itself() -> None:
    difference = paired_differences(make(1), make(1), [RATE], 500)["rate"]
    assert (difference.value, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)


def test_images_are_matched_by_name_not_by_place() -> None:
    first, second = make(1), make(2)
    order = np.random.default_rng(0).permutation(len(first.images))
    shuffled = ImageCounts(
        tuple(second.images[index] for index in order),
        {name: column[order] for name, column in second.columns.items()},
    )
    assert paired_differences(first, shuffled, [RATE], 100) == paired_differences(first, second, [RATE], 100)


def test_runs_over_other_images_are_refused_naming_the_first_one() -> None:
    with pytest.raises(DataError, match=r"'img-003' is missing in the second"):
        paired_differences(make(1, 5), make(1, 3), [RATE])
    with pytest.raises(DataError, match=r"'img-003' is missing in the first"):
        paired_differences(make(1, 3), make(1, 5), [RATE])


def test_missing_columns_and_senseless_arguments_are_refused() -> None:
    other = ratio("other", "Other", "hits", "nowhere")
    with pytest.raises(DataError, match="metric 'other' needs the count column 'nowhere'"):
        intervals(make(1), [RATE, other])
    with pytest.raises(ValueError, match="n >= 1"):
        intervals(make(1), [RATE], 0)
    with pytest.raises(ValueError, match="level"):
        intervals(make(1), [RATE], level=1.0)


def test_undefined_stays_undefined_and_partly_undefined_is_said() -> None:
    empty = ImageCounts(("a", "b"), {"hits": np.zeros(2), "all": np.zeros(2)})
    found = intervals(empty, [RATE], 50)["rate"]
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert found.undefined == 1.0
    half = ImageCounts(("a", "b"), {"hits": np.array([1.0, 0.0]), "all": np.array([2.0, 0.0])})
    found = intervals(half, [RATE], 400)["rate"]
    assert found.value == 0.5
    assert math.isnan(found.low), "one image has no spread"
    assert 0.15 < found.undefined < 0.35
    difference = paired_differences(empty, half, [RATE], 50)["rate"]
    assert math.isnan(difference.value)
    assert math.isnan(difference.p)


def test_no_images_at_all() -> None:
    none = ImageCounts((), {"hits": np.zeros(0), "all": np.zeros(0)})
    assert math.isnan(intervals(none, [RATE])["rate"].value)
    assert math.isnan(paired_differences(none, none, [RATE])["rate"].value)


def test_ten_thousand_resamples_of_five_hundred_images_are_fast() -> None:
    run = full(1, 500)
    started = time.process_time()
    intervals(run, METRICS, 10_000)
    paired_differences(run, full(2, 500), METRICS, 10_000)
    assert time.process_time() - started < 4.0


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar_p(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_of_pairs() -> None:
    assert mcnemar_p(1500, 1400) == pytest.approx(stats.binomtest(1400, 2900, 0.5).pvalue, rel=1e-9)
    assert mcnemar_p(0, 2000) == 0.0


def test_mcnemar_counts_discordant_pairs_by_id() -> None:
    first = {"a": True, "b": True, "c": False, "d": True}
    second = {"d": False, "c": False, "b": True, "a": False}
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second, found.p) == (2, 0, 0.5)
    with pytest.raises(DataError, match="sample 'e' is missing in the first"):
        mcnemar(first, {**second, "e": True})


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    adjusted = holm([0.01, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == 0.5


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_against_its_definition(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, found in zip(p_values, adjusted, strict=True):
        smaller = [other for other in p_values if other <= p]
        steps = sorted(p_values)[: len(smaller)]
        expected = max(min(1.0, (len(p_values) - rank) * other) for rank, other in enumerate(steps))
        assert found == pytest.approx(expected)
