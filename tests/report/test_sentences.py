from __future__ import annotations

from typing import Any

import pytest

from mitigate.report.latex import latex
from mitigate.report.sentences import beside, sentences
from tests.report.worlds import difference, interval, made_comparison


@pytest.fixture
def comparison() -> dict[str, Any]:
    return made_comparison()


def test_what_differs_beyond_its_interval_is_said_with_its_size(comparison: dict[str, Any]) -> None:
    first, second, context = sentences(comparison)
    assert first == (
        "CHAIR_i is 30.0 % [25.0, 35.0] with none. Better: good (−10.0 [−15.0, −2.0], Holm p = 0.020). "
        "No difference beyond the 95 % interval: unsure; the smallest difference this sample could have shown "
        "(power 80 %) is 2.8 percentage points."
    )
    assert "Worse: good (−20.0 [−30.0, −10.0], Holm p = 0.020)." in second
    assert second.endswith("Exactly the same in every resample: unsure.")
    assert context == "What else moved beyond its interval: Length −2.0 words (good)."


def test_nothing_found_is_said_with_what_could_have_been_seen(comparison: dict[str, Any]) -> None:
    comparison["stacks"]["good"]["differences"]["chair_i"] = {**difference(-0.01, -0.04, 0.02), "mde": 0.043}
    first = sentences(comparison)[0]
    assert "Better" not in first
    assert first.endswith(
        "No stack changed it beyond the 95 % interval of the difference; the smallest difference this sample could "
        "have shown (power 80 %) is 2.8 to 4.3 percentage points, by stack."
    )


def test_a_difference_without_interval_is_not_called_small(comparison: dict[str, Any]) -> None:
    unknown = {**difference(1.0, 0.0, 0.0), **interval(1.0, None, None), "caution": "only 1 images count"}
    comparison["stacks"]["unsure"]["differences"]["chair_i"] = unknown
    first = sentences(comparison)[0]
    assert first.endswith("Holm p = 0.020). Nothing can be said about unsure: the difference has no interval.")
    comparison["stacks"]["good"]["differences"]["chair_i"] = difference(0.01, -0.03, 0.04)
    assert "No difference beyond the 95 % interval: good; " in sentences(comparison)[0]


def test_intervals_of_few_pictures_are_not_relied_on(comparison: dict[str, Any]) -> None:
    for name, changed in (("good", 4), ("unsure", 0)):
        comparison["stacks"][name]["differences"]["chair_i"] |= {"changed": changed, "caution": "only a few"}
    assert sentences(comparison)[0].endswith(
        " Too few pictures count or changed, so interval and smallest difference are too small: good."
    )
    assert "Too few pictures count or changed, so intervals are too narrow: good." in latex(comparison)


def test_a_difference_that_correction_takes_back_is_called_so(comparison: dict[str, Any]) -> None:
    item = comparison["stacks"]["good"]["differences"]["chair_i"]
    item["p_holm"] = 0.2
    assert "Corrected for comparing several stacks (Holm), good may be chance" in sentences(comparison)[0]
    item["p_holm"] = 0.0001
    assert "Holm p < 0.001" in sentences(comparison)[0]
    assert "may be chance" not in sentences(comparison)[0]


def test_without_a_comparison_the_values_are_said(comparison: dict[str, Any]) -> None:
    comparison["stacks"] = {"good": {**comparison["stacks"]["good"], "differences": {}}}
    comparison["baseline"] = None
    assert sentences(comparison)[0] == "CHAIR_i is 20.0 % [15.0, 25.0] with good."
    comparison["stacks"]["good"]["metrics"]["chair_i"] = interval(None, None, None)
    assert sentences(comparison)[0] == "CHAIR_i is undefined with good."


def test_what_a_metric_may_have_been_bought_with_stands_beside_it(comparison: dict[str, Any]) -> None:
    metrics = comparison["metrics"]
    metrics["recall"] = {**metrics["pope/adversarial/f1"], "title": "Recall"}
    metrics["chair_s"] = {**metrics["chair_i"], "title": "CHAIR_s"}
    for data in comparison["stacks"].values():
        data["metrics"] |= {name: interval(0.5, 0.4, 0.6) for name in ("recall", "chair_s")}
    comparison["stacks"]["good"]["differences"]["recall"] = difference(-0.1, -0.15, -0.05)
    assert beside(comparison, "chair_i") == ["recall", "length"]
    assert beside(comparison, "pope/adversarial/f1") == ["pope/adversarial/yes_rate"]
    assert "Recall −10.0 percentage points (good); Length −2.0 words (good)" in sentences(comparison)[2]
    comparison["headline"] = ["chair_i", "recall"]  # it has a table of its own then
    assert beside(comparison, "chair_i") == ["length"]


def test_failures_are_counted(comparison: dict[str, Any]) -> None:
    comparison["stacks"]["unsure"]["failures"] = 2
    assert sentences(comparison)[-1] == "Samples that failed: 2 with unsure."
