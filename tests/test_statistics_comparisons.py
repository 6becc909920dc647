"""Comparisons against textbook formulas and reference values: standard errors, power, pooling, few changes, ties."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mitigate.errors import DataError
from mitigate.metrics.base import ImageCounts, Metric, ratio, values
from mitigate.statistics import (
    Difference,
    compare_all,
    holm,
    intervals,
    mcnemar,
    minimum_detectable_effect,
    paired_differences,
    pool,
    required_images,
    seed_spread,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "stats.json").read_text())
RATE = ratio("rate", "Rate", "hits", "all")


def answers(right: list[int], images: list[int] | None = None) -> ImageCounts:
    """Right and wrong answers, each of an image of its own unless told."""
    names = images if images is not None else range(len(right))
    rows = [(f"{image:04}", {"hits": hit, "all": 1}) for image, hit in zip(names, right, strict=True)]
    return ImageCounts.accumulate(rows, ("hits", "all"))


def changes(broken: int, repaired: int, images: int) -> tuple[ImageCounts, ImageCounts]:
    first = [1] * broken + [0] * repaired + [1] * (images - broken - repaired)
    return answers(first), answers([0] * broken + [1] * repaired + first[broken + repaired :])


def test_one_answer_per_image_gives_the_paired_t_test() -> None:
    reference = VECTORS["paired_ttest"]
    found = paired_differences(answers(VECTORS["baseline"]), answers(VECTORS["current"]), [RATE])["rate"]
    assert found.value == pytest.approx(reference["mean_diff"])
    assert found.se == pytest.approx(reference["se_diff"], rel=0.03)
    assert (found.low, found.high) == pytest.approx((reference["ci_lower"], reference["ci_upper"]), abs=0.018)
    exact = VECTORS["mcnemar_exact"]["p_two_sided"]
    assert found.p == pytest.approx(exact, abs=0.002), "the swap test of single answers is McNemar's"


def test_a_dense_difference_gives_the_t_test_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    before, gain = rng.normal(20, 5, 25), rng.normal(0.7, 2.0, 25)
    names = tuple(f"{index:02}" for index in range(25))
    first, second = (ImageCounts(names, {"hits": h, "all": np.ones(25)}) for h in (before, before + gain))
    found = paired_differences(first, second, [RATE], 40_000)["rate"]
    reference = stats.ttest_rel(before + gain, before)
    interval = reference.confidence_interval()
    assert found.se == pytest.approx(gain.std(ddof=1) / 5, rel=0.02)
    assert found.effect_size == pytest.approx(gain.mean() / gain.std(ddof=1), rel=0.02)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.12)
    assert 0.01 < reference.pvalue < 0.1, "where it matters"
    assert found.p == pytest.approx(reference.pvalue, rel=0.3)


def test_clustered_standard_error_of_a_mean() -> None:
    right, images = np.array(VECTORS["current"], dtype=float), np.array(VECTORS["cluster"])
    residuals = [(right[images == image] - right.mean()).sum() for image in range(10)]
    sandwich = math.sqrt(sum(r**2 for r in residuals)) / len(right)
    # the reference takes n - 1 for the answers' own variance, and n for what answers of one image share
    own = right.var(ddof=1) / 60 - right.var() / 60
    assert math.sqrt(sandwich**2 + own) == pytest.approx(VECTORS["clustered_stderr_current"], rel=1e-9)
    # against a run that is never right, the difference is the mean itself
    never = answers([0] * 60, VECTORS["cluster"])
    found = paired_differences(never, answers(VECTORS["current"], VECTORS["cluster"]), [RATE], 40_000)["rate"]
    assert found.se == pytest.approx(sandwich * math.sqrt(10 / 9), rel=0.02)
    single = paired_differences(answers([0] * 60), answers(VECTORS["current"]), [RATE], 40_000)["rate"]
    assert single.se == pytest.approx(VECTORS["mean_stderr_current"], rel=0.02)


def test_no_difference_and_a_constant_shift() -> None:
    none = paired_differences(answers(VECTORS["current"]), answers(VECTORS["current"]), [RATE], 500)["rate"]
    edge = VECTORS["edge"]["no_difference"]
    assert (none.value, none.se, none.low, none.high, none.p) == (
        edge["mean_diff"], edge["se_diff"], edge["ci_lower"], edge["ci_upper"], edge["p_value"],
    )  # fmt: skip
    assert (none.effect_size, none.mde, none.changed) == (0.0, 0.0, 0)
    shift = paired_differences(answers([0] * 60), answers([1] * 60), [RATE], 999)["rate"]
    edge = VECTORS["edge"]["constant_shift"]
    assert (shift.value, shift.se, shift.low, shift.high) == (
        edge["mean_diff"], edge["se_diff"], edge["ci_lower"], edge["ci_upper"],
    )  # fmt: skip
    assert shift.effect_size == math.inf
    assert 0 < shift.p <= 0.005, "no finite number of draws claims p = 0"


def test_power_equals_the_reference_and_its_definition() -> None:
    reference = VECTORS["power_analysis_effect_0.03"]
    spread = math.sqrt(reference["std_a"] ** 2 + reference["std_b"] ** 2 - 2 * reference["correlation"] * 0.25)
    se = spread / math.sqrt(reference["current_n"])
    assert minimum_detectable_effect(se) == pytest.approx(reference["min_detectable_effect"], abs=5e-5)
    assert required_images(reference["effect_size"], se, int(reference["current_n"])) == reference["min_n"]
    for alpha, power in itertools.product((0.05, 0.01), (0.8, 0.95)):
        effect = minimum_detectable_effect(2.0, alpha=alpha, power=power)
        reached = stats.norm.cdf(effect / 2.0 - stats.norm.ppf(1 - alpha / 2))
        assert reached == pytest.approx(power)
        assert required_images(effect / 2, 2.0, 100, alpha=alpha, power=power) == 400
    assert math.isnan(minimum_detectable_effect(math.nan))
    assert required_images(-0.1, 0.0, 50) == 1
    for arguments in ((0.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, -1.0)):
        with pytest.raises(ValueError, match="an effect other than 0"):
            required_images(*arguments, 10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        minimum_detectable_effect(1.0, power=1.0)


@pytest.mark.parametrize(("broken", "repaired"), [(0, 4), (0, 5), (0, 6), (1, 7), (1, 8), (3, 12), (7, 7)])
def test_few_changed_answers_get_the_exact_p_value_of_mcnemar(broken: int, repaired: int) -> None:
    found = paired_differences(*changes(broken, repaired, 200), [RATE], 20_000)["rate"]
    exact = stats.binomtest(broken, broken + repaired, 0.5).pvalue
    # never surer than the exact test; a bootstrap alone says p = .03 for 4 of 4, which is .125
    assert exact - 0.012 <= found.p <= exact + 0.06
    assert found.excludes_zero == (found.p < 0.05) == (exact < 0.05)
    assert found.changed == broken + repaired
    assert (found.caution is not None) == (found.changed < 10)


def test_interval_and_p_value_never_contradict_each_other() -> None:
    decided = set()
    for broken, repaired, images in itertools.product(range(0, 12, 2), range(12), (2, 5, 12, 40)):
        if broken + repaired <= images:
            for level in (0.95, 0.9):
                pair = changes(broken, repaired, images)
                found = paired_differences(*pair, [RATE], 199, level=level)["rate"]
                assert found.excludes_zero == (found.p < 1 - level)
                assert found.low <= found.value <= found.high
                decided.add(found.excludes_zero)
    assert decided == {True, False}


def test_a_stack_does_not_depend_on_its_neighbours_nor_on_the_order_of_images() -> None:
    rng = np.random.default_rng(0)
    runs = {name: answers(rng.integers(0, 2, 90).tolist(), (np.arange(90) // 3).tolist()) for name in "abcd"}
    together = compare_all(runs["a"], {name: runs[name] for name in "bcd"}, [RATE], 300, 4)
    assert list(together) == ["b", "c", "d"]
    for name in "bcd":
        assert together[name] == paired_differences(runs["a"], runs[name], [RATE], 300, 4)
    order = rng.permutation(30)
    mixed = {
        name: ImageCounts(tuple(run.images[i] for i in order), {c: v[order] for c, v in run.columns.items()})
        for name, run in runs.items()
    }
    assert compare_all(mixed["a"], {name: runs[name] for name in "bcd"}, [RATE], 300, 4) == together
    assert intervals(mixed["a"], [RATE], 300) == intervals(runs["a"], [RATE], 300)


def test_chunks_do_not_change_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = changes(9, 20, 101)
    whole = paired_differences(*pair, [RATE], 100, 5)
    monkeypatch.setattr("mitigate.statistics.resampling._CELLS_PER_CHUNK", 333)
    assert paired_differences(*pair, [RATE], 100, 5) == whole


def test_rounding_is_no_difference() -> None:
    # thirds add up to other last digits in another order; the two runs are equal all the same
    counts = np.random.default_rng(0).integers(1, 9, 50) / 3
    names = tuple(f"{i:02}" for i in range(50))
    first = ImageCounts(names, {"hits": counts, "all": np.ones(50)})
    second = ImageCounts(names, {"hits": counts * 0.1, "all": np.full(50, 0.1)})
    found = paired_differences(first, second, [RATE], 300)["rate"]
    assert (found.value, found.low, found.high, found.se, found.p) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_only_images_that_count_for_a_metric_count() -> None:
    first, second = changes(2, 14, 40)
    names = tuple(f"{i:04}" for i in range(400))
    padded = [
        ImageCounts(
            names,
            {n: np.concatenate([c, np.zeros(360)]) for n, c in run.columns.items()},
        )
        for run in (first, second)
    ]
    alone = paired_differences(first, second, [RATE])["rate"]
    found = paired_differences(*padded, [RATE])["rate"]
    assert found.images == alone.images == 40
    assert found.effect_size == pytest.approx(alone.effect_size, rel=0.05)


def test_an_undefined_metric_shows_what_stands_for_it_without_an_interval() -> None:
    shown = ratio("rate", "Rate", "hits", "all", empty=0.0)
    empty = ImageCounts(tuple("abc"), {"hits": np.zeros(3), "all": np.zeros(3)})
    half = ImageCounts(tuple("abc"), {"hits": np.ones(3), "all": np.full(3, 2.0)})
    found = intervals(empty, [shown], 50)["rate"]
    assert (found.value, found.undefined) == (0.0, 1.0)
    assert math.isnan(found.low)
    difference = paired_differences(empty, half, [shown], 50)["rate"]
    assert (difference.value, difference.undefined) == (0.5, 1.0)
    assert all(math.isnan(x) for x in (difference.low, difference.high, difference.p, difference.effect_size))
    assert math.isnan(holm([difference.p])[0])
    odd = Metric(name="odd", title="", columns=("hits",), compute=lambda s: np.where(s[..., 0] == 1, np.nan, s[..., 0]))
    one = ImageCounts(tuple("ab"), {"hits": np.array([1.0, 0.0])})
    found = intervals(one, [odd], 50)["odd"]
    assert found.undefined == 1.0, "no interval for a value there is not, whatever resamples say"
    assert math.isnan(found.low)


def test_cautions() -> None:
    assert Difference(0.1, 0.0, 0.2, images=30, changed=10).caution is None
    assert "only 29 images count" in str(Difference(0.1, 0.0, 0.2, images=29, changed=20).caution)
    assert "only 9 images changed" in str(Difference(0.1, 0.0, 0.2, images=500, changed=9).caution)


def test_seeds_are_averaged_per_image() -> None:
    one, two, three = (answers(list(bits), [0, 0, 1]) for bits in ((1, 0, 1), (1, 1, 1), (0, 0, 0)))
    mixed = ImageCounts(("0001", "0000"), {name: column[::-1] for name, column in two.columns.items()})
    pooled = pool([one, mixed, three])
    assert pooled.images == ("0000", "0001")
    np.testing.assert_allclose(pooled.columns["hits"], [1.0, 2 / 3])
    np.testing.assert_allclose(pooled.columns["all"], [2.0, 1.0])
    assert values(pooled, [RATE])["rate"] == pytest.approx(5 / 9)
    assert seed_spread([one, two, three], [RATE])["rate"] == pytest.approx(np.std([2 / 3, 1, 0], ddof=1))
    assert math.isnan(seed_spread([one], [RATE])["rate"])


def test_several_seeds_narrow_the_interval_but_are_not_more_images() -> None:
    rng = np.random.default_rng(1)
    easy = rng.random(200)
    seeds = [answers((rng.random(200) < easy).astype(int).tolist()) for _ in range(8)]
    baseline = answers((rng.random(200) < easy).astype(int).tolist())
    one = paired_differences(baseline, seeds[0], [RATE], 2000)["rate"]
    all_of_them = paired_differences(baseline, pool(seeds), [RATE], 2000)["rate"]
    # half of the variance is the baseline's own, and stays
    assert 0.6 * one.se < all_of_them.se < 0.9 * one.se
    assert all_of_them.images == 200


def test_what_cannot_be_pooled_is_refused() -> None:
    run = answers([1, 0])
    with pytest.raises(DataError, match="'0002' is missing in the first"):
        pool([run, answers([1, 0, 1])])
    with pytest.raises(DataError, match="count column 'all' is missing"):
        pool([run, ImageCounts(run.images, {"hits": run.columns["hits"]})])
    with pytest.raises(DataError, match="no run"):
        pool([])


def test_odds_ratios_of_discordant_pairs() -> None:
    def ratio_of(broken: int, repaired: int) -> float:
        first = {str(i): i < broken for i in range(broken + repaired)}
        return mcnemar(first, {key: not right for key, right in first.items()}).odds_ratio

    assert (ratio_of(2, 6), ratio_of(6, 2)) == (3.0, pytest.approx(1 / 3))
    assert (ratio_of(0, 9), ratio_of(9, 0), ratio_of(0, 0)) == (19.0, pytest.approx(1 / 19), 1.0)
    reference = VECTORS["mcnemar_exact"]
    first, second = ({str(i): bool(x) for i, x in enumerate(VECTORS[name])} for name in ("baseline", "current"))
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (reference["baseline_only"], reference["current_only"])
    assert found.p == pytest.approx(reference["p_two_sided"])


def test_a_metric_that_swapping_leaves_undefined_is_not_called_found() -> None:
    compute = lambda s: np.where(s[..., 0] < 12, s[..., 1], np.nan)  # noqa: E731
    total = Metric(name="total", title="", columns=("marks", "hits"), compute=compute)
    names = tuple(f"{i:02}" for i in range(20))
    first = ImageCounts(names, {"marks": np.repeat([1.0, 0.0], 10), "hits": np.zeros(20)})
    second = ImageCounts(names, {"marks": np.repeat([0.0, 1.0], 10), "hits": np.ones(20)})
    found = paired_differences(first, second, [total], 400)["total"]
    assert (found.value, found.low) == (20.0, 0.0)
    assert found.p > 0.1
