"""Simulation: intervals hold the truth as often as they claim, and comparisons find nothing where nothing is.

Seeds are fixed. Bands are the requirement (95 % +- 2) widened by what so few replications leave to chance, so that only
another procedure can leave them; `scripts/simulate_statistics.py` is the same at full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import stats

from mitigate.metrics.base import Array
from scripts.simulate_statistics import SCENARIOS, Coverage, answers, coverage, false_findings

REPLICATIONS, RESAMPLES, IMAGES = 400, 1000, 60
DENSE = [scenario for scenario in SCENARIOS if scenario.name != "4 % changed"]
(FEW,) = [scenario for scenario in SCENARIOS if scenario.name == "4 % changed"]


def band(low: float, high: float) -> tuple[float, float]:
    """Return what a true share between low and high shows in all but one of a thousand simulations."""
    return (
        float(stats.binom.ppf(0.0005, REPLICATIONS, low)) / REPLICATIONS,
        float(stats.binom.ppf(0.9995, REPLICATIONS, high)) / REPLICATIONS,
    )


@cache
def simulated(name: str, effect: bool) -> Coverage:
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.name == name]
    return coverage(scenario, IMAGES, scenario.effect if effect else 0.0, REPLICATIONS, RESAMPLES)


@pytest.mark.parametrize("effect", [False, True], ids=["null", "effect"])
@pytest.mark.parametrize("name", [scenario.name for scenario in DENSE])
def test_intervals_hold_the_truth(name: str, effect: bool) -> None:
    found = simulated(name, effect)
    low, high = band(0.94, 0.96)
    assert low <= found.run <= high
    assert low <= found.difference <= band(0.94, 0.97)[1]
    assert found.standard_error == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("name", [scenario.name for scenario in DENSE])
def test_a_null_is_rejected_rarely_and_an_effect_often(name: str) -> None:
    low, high = band(0.03, 0.05)
    assert low <= simulated(name, False).rejected <= high
    assert simulated(name, True).rejected > 0.25


def test_pooled_over_the_metrics_coverage_is_95_percent() -> None:
    found = [simulated(scenario.name, effect) for scenario in DENSE for effect in (False, True)]
    assert 0.94 <= np.mean([each.run for each in found]) <= 0.96
    assert 0.94 <= np.mean([each.difference for each in found]) <= 0.97


def test_resampling_answers_instead_of_images_would_be_caught() -> None:
    def every_answer_its_own_image(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
        return [
            np.stack([right.ravel(), np.ones(6 * images)], axis=-1).astype(float)
            for right in answers(rng, images, effects, 0.7, 0.4)
        ]

    ignorant = replace(DENSE[0], draw=every_answer_its_own_image)
    assert coverage(ignorant, IMAGES, 0.0, REPLICATIONS, RESAMPLES).run < band(0.94, 0.96)[0]


def test_a_comparison_of_stacks_without_effect_finds_something_in_at_most_5_percent() -> None:
    scenario = DENSE[0]
    assert band(0.02, 0.05)[0] <= false_findings(scenario, IMAGES, REPLICATIONS, RESAMPLES) <= band(0.02, 0.05)[1]


def test_a_handful_of_changed_answers_proves_nothing() -> None:
    # about six changes per stack: a bootstrap alone goes wrong far out, where Holm looks
    assert false_findings(FEW, 150, REPLICATIONS, RESAMPLES) <= band(0.03, 0.03)[1]
    assert coverage(FEW, 250, FEW.effect, REPLICATIONS, RESAMPLES).difference >= band(0.93, 0.93)[0]
