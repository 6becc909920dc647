from __future__ import annotations

import math
from typing import Any

import pytest

from mitigate.report.html import render
from mitigate.report.plots import cost_plot, difference_plot, ticks
from mitigate.report.samples import Choice
from tests.report.worlds import made_comparison, stack

NOTHING = Choice(shown=[], total=0)


@pytest.fixture
def comparison() -> dict[str, Any]:
    return made_comparison()


def test_numbers_and_names_stand_beside_the_difference_plot(comparison: dict[str, Any]) -> None:
    long = "a_stack_whose_name_is_very_long"
    comparison["stacks"][long] = comparison["stacks"]["good"]
    plot = difference_plot(comparison, "chair_i")
    assert plot is not None
    shown = plot["rows"][-1]["name"]
    assert shown.endswith("…")
    right = max(tick["x"] for tick in plot["ticks"])
    assert min(tick["x"] for tick in plot["ticks"]) >= 10 * len(shown)
    assert all(right <= 640 - 10 * len(row["text"]) for row in plot["rows"])
    assert f"<title>{long}</title>" in render(comparison, NOTHING)


def test_labels_of_the_cost_plot_cover_no_point_and_no_label(comparison: dict[str, Any]) -> None:
    for index in range(3):  # points that nearly coincide
        comparison["stacks"][f"close{index}"] = stack(0.2 + 0.003 * index, 3.0 + 0.05 * index, {})
        comparison["stacks"][f"cheap{index}"] = stack(0.25 + 0.003 * index, 0.5 + 0.03 * index, {})
    plot = cost_plot(comparison)
    assert plot is not None
    boxes = []
    for point in plot["points"]:
        wide = 10 * len(point["stack"])
        left = point["label_x"] if point["side"] == "start" else point["label_x"] - wide
        boxes.append((left, point["label_y"] - 9, left + wide, point["label_y"] + 9))
    for index, (left, upper, right, lower) in enumerate(boxes):
        assert left >= 52  # the numbers of the axis are there
        assert right <= 640
        for point in plot["points"]:
            assert not (left < point["x"] + 5 and point["x"] - 5 < right and upper < point["y"] < lower)
        for other in boxes[:index]:
            assert not (left < other[2] and other[0] < right and upper < other[3] and other[1] < lower)


def test_the_difference_plot_puts_intervals_on_the_right_side_of_zero(comparison: dict[str, Any]) -> None:
    plot = difference_plot(comparison, "chair_i")
    assert plot is not None
    good, unsure = plot["rows"]
    assert good["low"] < good["x"] < good["high"] < plot["zero"]
    assert unsure["low"] < plot["zero"] < unsure["high"]
    assert (good["sure"], good["tone"], unsure["sure"], unsure["tone"]) == (True, "better", False, "same")
    html = render(comparison, NOTHING)
    assert html.count('class="hollow"') == 2  # unsure, in both plots


def test_the_cost_plot_has_one_labelled_point_per_stack_inside_the_frame(comparison: dict[str, Any]) -> None:
    plot = cost_plot(comparison)
    assert plot is not None
    points = {point["stack"]: point for point in plot["points"]}
    assert points["none"]["x"] < points["good"]["x"] < points["unsure"]["x"]
    assert points["good"]["y"] > points["none"]["y"]  # fewer hallucinations are lower, and SVG counts downwards
    for point in points.values():
        assert plot["left"] <= point["x"] <= plot["right"]
        assert plot["top"] <= point["high"] <= point["y"] <= point["low"] <= plot["bottom"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-0.3, 7.2), (-1e-4, 2e-4), (0.0, 12345.0), (-3.0, -2.0)])
def test_ticks_are_round_ordered_and_cover_the_range(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks == sorted(set(marks))
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low
    assert marks[-1] >= high
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)
