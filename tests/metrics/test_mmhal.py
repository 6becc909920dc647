"""MMHal-Bench: ratings are read and averaged as the official script does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.metrics.base import ImageCounts, values
from mitigate.metrics.mmhal import TYPES, Mmhal, mmhal_counts, mmhal_metrics, rating

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "mmhal.json").read_text("utf-8"))


def score(replies: list[str]) -> dict[str, float]:
    rows = [(str(index), mmhal_counts(reply, TYPES[index % 8], length=2)) for index, reply in enumerate(replies)]
    metrics = mmhal_metrics()
    return values(ImageCounts.accumulate(rows, [column for metric in metrics for column in metric.columns]), metrics)


@pytest.mark.parametrize("case", VECTORS["parse"], ids=lambda case: case["judge_reply"][:40])
def test_ratings_are_read_as_the_official_script_reads_them(case: dict[str, Any]) -> None:
    assert rating(case["judge_reply"]) == case["score"]


def test_a_whole_run_prints_what_the_official_script_prints() -> None:
    run = VECTORS["run96"]
    assert [rating(reply) for reply in run["replies"]] == run["scores"]
    found = score(run["replies"])
    kinds = ",".join(str(round(found[f"mmhal/{kind}/score"], 2)) for kind in TYPES)
    assert run["printed"] == [
        f"Average score: {found['mmhal/score']:.2f}",
        f"Hallucination rate: {found['mmhal/hallucination_rate']:.2f}",
        f"Average score for each question type: {kinds}",
    ]
    assert found["mmhal/informativeness"] * 100 == pytest.approx(run["rlhfv_informativeness_percent"])
    assert (found["mmhal/unrated"], found["mmhal/words"]) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("rating: 4", 4),
        ("RATING: 4", 4),
        ("Rating: 4. I say it again: rating: 4", 4),
        ("Rating: 4, not Rating: 5", 0),
        ("**Rating**: 5", 0),
        ("Rating:  5", 0),
        ("Rating: 10", 1),
        ("Rating: 65", 6),
        ("Rating: 0", 0),
        ("Rating: -1", 0),
        ("Rating: 7", 0),
        ("Overrating: 3", 3),
        ("", 0),
    ],
)
def test_exactly_one_rating_counts(reply: str, expected: int) -> None:
    assert rating(reply) == expected


@given(st.lists(st.sampled_from(["Rating: 0", "rating: 6", "Rating: 3", "x", "rating: 1 rating: 2"]), min_size=1))
def test_averages_are_those_of_the_ratings(replies: list[str]) -> None:
    points = [{"Rating: 0": 0, "rating: 6": 6, "Rating: 3": 3}.get(reply, 0) for reply in replies]
    found = score(replies)
    assert found["mmhal/score"] == pytest.approx(sum(points) / len(points))
    assert found["mmhal/hallucination_rate"] == pytest.approx(sum(point < 3 for point in points) / len(points))
    informative = [point - 3 if point >= 3 else point for point in points]
    assert found["mmhal/informativeness"] == pytest.approx(sum(informative) / len(points) / 3)
    unrated = sum(reply in ("x", "rating: 1 rating: 2") for reply in replies)
    assert found["mmhal/unrated"] == pytest.approx(unrated / len(points))
    sums = {"mmhal/unrated": float(unrated), "mmhal/answers": float(len(points))}
    assert (f"{unrated} of {len(points)} replies" in " ".join(Mmhal().warnings(sums))) == bool(unrated)


def test_the_lowest_clean_rating_is_three() -> None:
    for points in range(7):
        assert mmhal_counts(f"Rating: {points}", "other")["mmhal/hallucinated"] == (points < 3)
