"""Statistics of the saliency diagnostic against scipy and hand computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mitigate.diagnostics import saliency_stats as own
from mitigate.diagnostics.base import TokenRow
from mitigate.diagnostics.saliency_analysis import analyse
from tests.diagnostics.worlds import row

rng = np.random.default_rng(3)


def test_ranks_share_ties_and_spearman_is_scipys() -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert own.ranks([10, 30, 10, 20]).tolist() == [1.5, 4.0, 1.5, 3.0]
    x, y = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    assert own.spearman(x, y) == pytest.approx(scipy.spearmanr(x, y).statistic)
    assert math.isnan(own.spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("step", [0.0, 0.7])
def test_mann_whitney_is_scipys_with_ties(step: float) -> None:
    scipy = pytest.importorskip("scipy.stats")
    first, second = rng.normal(size=25), rng.normal(size=40) + 0.5
    if step:
        first, second = np.round(first / step), np.round(second / step)
    wanted = scipy.mannwhitneyu(first, second, method="asymptotic")
    u, p = own.mann_whitney(first, second)
    assert u == pytest.approx(wanted.statistic)
    assert p == pytest.approx(wanted.pvalue, rel=1e-6)


def test_cohens_d_by_hand() -> None:
    # means 2 and 5, variances 1 and 4 over 3 values each: pooled 2.5
    assert own.cohens_d([1, 2, 3], [3, 5, 7]) == pytest.approx(3 / math.sqrt(2.5))
    assert math.isnan(own.cohens_d([1], [2, 3]))


def test_average_precision_by_hand_with_ties() -> None:
    # thresholds 4 (1 of 1), 3 (2 of 3: a tie), 1 (3 of 5)
    scores, positive = [4, 3, 3, 2, 1], [1, 1, 0, 0, 1]
    found = own.auprc(scores, positive, ["a", "b", "c", "d", "e"], n=200)
    assert found.value == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert found.n == 5
    assert found.low < found.value < found.high


def test_logistic_regression_is_the_maximum_of_the_weighted_likelihood() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    x = np.column_stack([np.ones(60), rng.normal(size=(60, 2))])
    y = (rng.random(60) < 1 / (1 + np.exp(-x @ [0.3, -1.0, 0.5]))).astype(float)
    weights = rng.integers(0, 3, (2, 60)).astype(float)

    def loss(b: np.ndarray, w: np.ndarray) -> float:
        return float((w * (np.logaddexp(0, x @ b) - y * (x @ b))).sum())

    for found, w in zip(own.logistic(x, y, weights), weights, strict=True):
        np.testing.assert_allclose(found, optimize.minimize(loss, np.zeros(3), args=(w,), tol=1e-10).x, atol=2e-4)


def test_separated_or_onesided_data_have_no_fit() -> None:
    x = np.column_stack([np.ones(6), np.arange(6.0)])
    assert np.isnan(own.logistic(x, np.array([0, 0, 0, 1, 1, 1.0]), np.ones((1, 6)))).all()
    assert np.isnan(own.logistic(x, np.zeros(6), np.ones((1, 6)))).all()


def test_control_removes_what_position_explains() -> None:
    position = np.repeat(np.arange(20.0), 30)
    positive = rng.random(600) < 1 / (1 + np.exp(-(position - 10) / 3))
    images = [str(index % 50) for index in range(600)]
    mere = -position + rng.normal(size=600)  # follows the position only
    found = own.controlled(mere, positive, [position, np.ones(600)], images, n=200)
    assert found.low < 0 < found.high
    real = mere - 2 * positive
    assert own.controlled(real, positive, [position], images, n=200).high < 0


def test_pairs_are_nearest_and_used_once() -> None:
    score = [1.0, 2.0, 4.0, 9.0, 20.0, 50.0]
    positive = [False, False, True, True, True, False]
    position = [3, 5, 4, 4, 30, 33]
    # the first positive takes position 3 (the earlier of two equally near), the second position 5; 30 has no partner
    found = own.matched_pairs(score, positive, position, list("abcdef"), n=100)
    assert found.value == pytest.approx((4 + 9) / 2 - (1 + 2) / 2)
    assert found.n == 4


def measures(score: float, diagonal: float, columns: int = 4) -> dict[str, object]:
    groups = [[0.1, 0.5, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4]]
    return {
        "score": score,
        "diagonal": diagonal,
        "attention": 0.2,
        "image": 0.1,
        "p": 0.5,
        "entropy": 1.0,
        "columns": columns,
        "score_layers": [score, score / 2],
        "saliency_groups": groups,
        "attention_groups": groups,
        "exact": [score, score, score / 2],
        "direct": [score, 2 * score, score],
    }


def words() -> list[TokenRow]:
    made = []
    for index in range(40):
        wrong = index % 4 == 0
        score = 0.1 + 0.004 * index - 0.05 * wrong
        label = "hallucinated" if wrong else "grounded"
        made.append(row(f"i{index % 10}-{index}", label, measures(score, 0.95 if wrong else 0.42), position=index % 5))
    return made


def test_findings_bins_flow_and_ranks() -> None:
    found = analyse(words(), bins=10, resamples=200)
    bins = found.data["bins"]["diagonal"]
    assert [item["risk"]["n"] for item in bins] == [0, 0, 0, 0, 30, 0, 0, 0, 0, 10]
    assert bins[4]["risk"]["value"] == 0.0
    assert bins[9]["risk"]["value"] == 1.0
    flow = found.data["flow"]["saliency_groups"]["grounded"]
    assert [flow[group][1]["value"] for group in ("system", "image", "prompt", "output")] == pytest.approx(
        [0.2, 0.2, 0.2, 0.4]
    )
    assert found.numbers["rank/tokens"].value == pytest.approx(1.0)
    assert found.numbers["rank/candidates"].value == pytest.approx(1.0)
    assert found.numbers["auroc/score"].value > 0.7
    assert found.numbers["difference/diagonal"].value == pytest.approx(0.53)
    assert found.data["counts"] == {"grounded": 30, "hallucinated": 10}


def test_around_reads_the_neighbours_of_the_same_reply() -> None:
    from dataclasses import replace

    reply = [
        replace(row("i", "other", measures(0.1 * place, 0.1), position=place), sample="s", first=place != 3)
        for place in range(6)
    ]
    reply[2] = replace(reply[2], label=words()[0].label)
    other = replace(words()[1], sample="t")
    found = analyse([*reply, other], bins=4, resamples=100)
    values = {item["shift"]: (item["value"], item["n"]) for item in found.data["around"]["hallucinated"]}
    assert values[0] == (pytest.approx(0.2), 1)
    assert values[1] == (pytest.approx(0.3), 1)  # pieces inside words count as neighbours
    assert values[-2] == (pytest.approx(0.0), 1)
    assert values[4][1] == 0


def test_without_both_kinds_nothing_is_compared_and_it_is_said() -> None:
    found = analyse([item for item in words() if item.label.value == "grounded"], bins=10, resamples=100)
    assert "No hallucinated word" in found.notes[0]
    assert set(found.numbers) == {"rank/tokens", "rank/candidates"}
    assert analyse([], bins=10, resamples=100).notes
