"""The analyses are pure functions: planted effects come out, hand computations agree, figures are drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import pearsonr

from mitigate.benchmarks.base import Sample
from mitigate.diagnostics.credit import Credit
from mitigate.diagnostics.credit_analysis import binned_correlation
from mitigate.diagnostics.credit_figures import chosen, overlays
from mitigate.diagnostics.drift import Drift
from mitigate.diagnostics.entropy import Entropy
from mitigate.diagnostics.entropy_analysis import POLICIES, flags
from tests.diagnostics.worlds import Words, row, sample

LAYERS = 4
RNG = np.random.default_rng(5)


def entropy_rows(shift: float, images: int = 20) -> list[Any]:
    """Grounded, hallucinated and other words; hallucinated entropies are ``shift`` higher."""
    rows = []
    for image in range(images):
        for label, more in (("grounded", 0.0), ("grounded", 0.0), ("hallucinated", shift), ("other", 0.3)):
            entropy = (2.0 + more + 0.05 * RNG.normal(size=LAYERS)).tolist()
            mass = (0.5 + 0.01 * RNG.normal(size=LAYERS)).tolist()
            measures = {"entropy": entropy, "mass": mass, "abnormal": [2, 1, 3, 0], "image_tokens": 36}
            rows.append(row(f"i{image}", label, measures, position=image))
    return rows


def test_entropy_finds_a_planted_difference_and_no_other() -> None:
    found = Entropy(resamples=300).analyse(entropy_rows(0.5))
    assert found.numbers["auroc/entropy_mean"].value == 1.0
    assert found.numbers["difference/entropy"].value == pytest.approx(0.5, abs=0.05)
    assert found.numbers["difference/entropy"].low > 0.4
    assert found.numbers["difference/mass"].p > 0.01
    assert found.numbers["auroc/entropy_mean"].n == 60
    table = next(item for item in found.tables if item.name == "by_type")
    assert [line[1] for line in table.rows] == [40, 20, 20]
    assert table.rows[0][3].value == pytest.approx(table.rows[0][2].value / math.log(36))
    assert table.rows[0][5].value == 1.5
    assert found.data["counts"] == {"grounded": 40, "hallucinated": 20, "other": 20}


def test_later_pieces_and_words_without_a_picture_do_not_count() -> None:
    rows = entropy_rows(0.5, images=6)
    blind = {"entropy": [0.0] * LAYERS, "mass": [0.0] * LAYERS, "abnormal": [0] * LAYERS, "image_tokens": 0}
    more = [row("i0", "grounded", {**rows[0].measures, "entropy": [99.0] * LAYERS}, first=False)]
    more.append(row("i0", "hallucinated", blind))
    assert Entropy(resamples=100).analyse([*rows, *more]).numbers == Entropy(resamples=100).analyse(rows).numbers


def test_nothing_to_analyse_is_said() -> None:
    for diagnostic in (Entropy(), Drift(), Credit()):
        found = diagnostic.study([sample("a")])
        assert found.notes
        assert not found.numbers


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # entropies 3, 2, 2.5, 2.2: a level from the layers before
        ("bas_min", [0, 0, 1, 1]),  # levels 3, 2, 2
        ("running_mean", [0, 0, 0, 0]),  # 3, 2.5, 2.5
        ("mean + 1 sd", [0, 0, 0, 0]),
        ("ema", [0, 0, 0, 0]),  # 3, 2.9, 2.86
    ],
)
def test_policies_by_hand(policy: str, expected: list[int]) -> None:
    assert flags(np.array([[3.0, 2.0, 2.5, 2.2]]), POLICIES[policy]).tolist() == [expected]


def test_policies_differ_where_they_should() -> None:
    # 1, 3, 2.5, 2.9: means 1, 2, 2.17; sd 0, 1, 0.85 -> 1, 3, 3.02; ema 1, 1.2, 1.33
    entropy = np.array([[1.0, 3.0, 2.5, 2.9]])
    assert flags(entropy, POLICIES["running_mean"]).tolist() == [[0, 1, 1, 1]]
    assert flags(entropy, POLICIES["mean + 1 sd"]).tolist() == [[0, 1, 0, 0]]
    assert flags(entropy, POLICIES["ema"]).tolist() == [[0, 1, 1, 1]]


def drift_rows(back: float, images: int = 20) -> list[Any]:
    """Six layers: early 0, middle 2-3, deep 4-5. Grounded words stay away; hallucinated ones return by ``back``."""
    rows = []
    for image in range(images):
        for label, deep in (("grounded", 0.6), ("hallucinated", 0.6 + back), ("other", 0.6)):
            noise = np.array([1.0, 0.8, 0.6, 0.6, deep, deep]) + 0.01 * RNG.normal(size=6)
            measures: dict[str, Any] = {"contrast": 0.2 + 0.01 * RNG.normal()}
            for name, sign in (("bhattacharyya", 1.0), ("jensen_shannon", -1.0), ("hellinger", -1.0)):
                offset = 0.0 if sign > 0 else 1.0
                measures[f"{name}_noise"] = (offset + sign * noise).tolist()
                measures[f"{name}_anchors"] = [offset + sign * 0.5] * 6
            rows.append(row(f"i{image}", label, measures))
    return rows


@pytest.mark.parametrize("similarity", ["bhattacharyya", "jensen_shannon", "hellinger"])
def test_drift_finds_words_that_fall_back(similarity: str) -> None:
    diagnostic = Drift(early="0", middle="2-3", deep="4-5", similarity=similarity, resamples=1000)
    found = diagnostic.analyse(drift_rows(0.2)).numbers
    assert found["regression/hallucinated-grounded"].value == pytest.approx(0.2, abs=0.02)
    assert found["regression/hallucinated-grounded"].p < 0.01
    assert found["regression/grounded"].value == pytest.approx(0.0, abs=0.02)
    assert found["preference/hallucinated"].value == pytest.approx(0.3, abs=0.02)
    assert found["auroc/regression"].value > 0.99


def test_drift_finds_nothing_where_there_is_nothing() -> None:
    found = Drift(early="0", middle="2-3", deep="4-5", resamples=300).analyse(drift_rows(0.0)).numbers
    assert found["regression/hallucinated-grounded"].low < 0 < found["regression/hallucinated-grounded"].high


def test_drift_measures_maps_against_the_object() -> None:
    diagnostic = Drift(early="0", middle="1", deep="2", top=0.25)
    covered = np.array([1.0, 0.5, 0.0, 0.25])
    maps = np.array([[0.1, 0.2, 0.6, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    found = diagnostic._on_object(maps, covered)
    assert found["area"] == 0.4375
    assert found["inside"] == 0.5
    assert found["mass"] == pytest.approx([0.225, 0.775, 0.4375])
    assert found["hit"] == [0.0, 1.0, 1.0]
    assert found["pointing"] == [0.0, 1.0, 1.0]
    assert found["anchor_hit"] == 1.0  # the middle gained on the first patch
    twice = {key: value * 2 if isinstance(value, list) else value for key, value in found.items()}
    samples = [
        sample(f"i{n}", tuple(drift_rows(0.1, 1)), objects=[{"position": 0, "word": "cat", **twice}]) for n in "ab"
    ]
    study = Drift(early="0", middle="2-3", deep="4-5", resamples=100).study(samples)
    assert study.data["objects"]["n"] == 2
    assert study.numbers["objects/chance_hit"].value == 0.5
    assert study.numbers["objects/anchor_hit"].value == 1.0


def credit_samples(slope: float, images: int = 60) -> list[Any]:
    samples = []
    for image in range(images):
        entropy = 2.0 + RNG.random()
        label = "hallucinated" if RNG.random() < 0.5 + slope * (entropy - 2.5) else "grounded"
        weights = RNG.random(16)
        samples.append(
            sample(
                f"i{image}",
                (row(f"i{image}", label, {}),),
                entropy=entropy,
                image_tokens=36,
                norms=[2.0, 3.0],
                plain_norms=[2.0, 2.0],
                plain_entropy=entropy - 0.25,
                grid=[4, 4],
                map=(weights / weights.sum()).tolist(),
            )
        )
    return samples


def test_tables_of_few_samples_have_all_their_columns() -> None:
    for table in Credit(resamples=100).study(credit_samples(0.0, images=2)).tables:
        assert {len(line) for line in table.rows} <= {len(table.columns)}


def test_credit_correlates_samples_and_bins() -> None:
    samples = credit_samples(-0.9)
    found = Credit(bins=10, resamples=300).study(samples)
    entropy = np.array([item.measures["entropy"] for item in samples])
    wrong = np.array([item.rows[0].label.value == "hallucinated" for item in samples], dtype=float)
    assert found.numbers["r/caption"].value == pytest.approx(pearsonr(entropy, wrong).statistic)
    assert found.numbers["r/caption"].high < 0
    order = np.argsort(entropy)
    bins = [np.array(part) for part in np.array_split(order, 10)]
    expected = pearsonr([entropy[part].mean() for part in bins], [wrong[part].mean() for part in bins])
    assert found.numbers["binned_r/caption"].value == pytest.approx(expected.statistic)
    assert found.numbers["binned_r/caption"].p == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.numbers["binned_r/caption"].n == 10
    assert [item["value"] for item in found.data["norms"]["ratio"]] == [1.0, 1.5]
    norms = next(table for table in found.tables if table.name == "norms")
    assert norms.rows[-1][3].value == pytest.approx(0.25)


def test_binned_correlation_of_constants_is_undefined() -> None:
    parts = [np.array([0]), np.array([1]), np.array([2])]
    found = binned_correlation(np.array([1.0, 2.0, 3.0]), np.zeros(3), parts)
    assert math.isnan(found.value)
    assert found.n == 3


def test_examples_are_the_lowest_and_the_highest() -> None:
    samples = credit_samples(0.0, images=9)
    picked = chosen(samples, 4)
    entropies = sorted(item.measures["entropy"] for item in samples)
    assert [item.measures["entropy"] for item in picked] == [*entropies[:2], *entropies[-2:]]
    assert len(chosen(samples, 1)) == 1
    assert chosen(samples, 0) == []
    assert len(chosen(samples[:3], 6)) == 3


class Pictures(Words):
    def samples(self) -> list[Sample]:
        return [Sample(id=f"i{n}/caption", image_id=f"i{n}", task="caption", prompt="") for n in range(60)]

    def images(self, sample: Sample) -> list[Image.Image]:
        return [Image.new("RGB", (16, 16), (90, 120, 60))]


def test_figures_are_drawn_and_drawn_the_same(tmp_path: Path) -> None:
    heads = [[1, 0], [0, 2], [1, 1], [2, 2]]
    studies = {
        Entropy(resamples=100): [sample("i0", tuple(entropy_rows(0.2, 6)), abnormal_heads=heads)],
        Drift(early="0", middle="2-3", deep="4-5", resamples=100): [sample("i0", tuple(drift_rows(0.1, 6)))],
        Credit(resamples=100): credit_samples(0.3, 30),
    }
    for diagnostic, samples in studies.items():
        found = diagnostic.study(samples)
        first = [*diagnostic.draw(found, tmp_path / "a"), *diagnostic.illustrate(samples, Pictures(), tmp_path / "a")]
        assert len(first) >= 3
        for path in first:
            with Image.open(path) as picture:
                assert picture.width > 500
                assert np.asarray(picture.convert("L")).std() > 5
    diagnostic.draw(found, tmp_path / "b")
    for name in ("credit_caption.png", "credit_caption.svg", "credit_norms.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert overlays([], Pictures(), tmp_path, count=3, top=0.1) == []


def test_figures_without_hallucinations_are_drawn(tmp_path: Path) -> None:
    rows = tuple(item for item in entropy_rows(0.2, 6) if item.label.value != "hallucinated")
    diagnostic = Entropy(resamples=100)
    assert len(diagnostic.draw(diagnostic.study([sample("i0", rows)]), tmp_path)) == 4
    falling = tuple(item for item in drift_rows(0.2, 6) if item.label.value != "hallucinated")
    drift = Drift(early="0", middle="2-3", deep="4-5", resamples=100)
    found = drift.study([sample("i0", falling)])
    assert len(drift.draw(found, tmp_path)) == 3
    assert "Only 0 hallucinated words: the test says little; use more samples." in found.notes
