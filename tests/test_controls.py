"""The testbed can tell a method that works from one that does not: its two controls on the test split."""

from __future__ import annotations

import json

import pytest

from mitigate.cli import main

SCENES = 150


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    arguments = [
        "compare",
        "stacks=[none,control_probe,control_random,locore]",
        "benchmark.tasks=[chair]",
        f"benchmark.limit={SCENES}",
        "tracker=none",
        f"runs_dir={folder}",
        "name=controls",
    ]
    assert main(arguments) == 0
    return json.loads((folder / "controls" / "comparison.json").read_text())["stacks"]


def test_positive_control_lowers_hallucination_by_a_third_at_no_loss_of_recall(stacks):
    plain, control = stacks["none"]["metrics"], stacks["control_probe"]
    assert control["metrics"]["chair_i"]["value"] <= plain["chair_i"]["value"] * 2 / 3
    assert control["differences"]["chair_i"]["high"] < 0
    assert control["metrics"]["recall"]["value"] >= plain["recall"]["value"]


def test_negative_control_changes_no_metric_beyond_its_interval(stacks):
    for name in ("chair_i", "chair_s", "recall"):
        difference = stacks["control_random"]["differences"][name]
        assert difference["low"] <= 0 <= difference["high"], name


def test_negative_control_edits_as_much_as_the_method_it_stands_for(stacks):
    """Both edit every attention row; the change per row is of the same size."""
    random, method = stacks["control_random"]["effects"], stacks["locore"]["effects"]
    assert random["rows_edited_share"] == pytest.approx(method["rows_edited_share"], rel=0.02)
    assert random["l1_per_row"] == pytest.approx(method["l1_per_row"], rel=0.25)
