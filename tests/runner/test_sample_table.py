"""The table of samples that a tracker gets: which samples and seed, what is written of truth and failures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from mitigate.runner import sample_table
from mitigate.runner.sample_table import SampleTables, truth
from tests.report.worlds import Run, Words, World


@dataclass(frozen=True)
class Asked(Run):
    benchmark: Words = field(default_factory=Words)


def runs(*seeds: int) -> list[Any]:
    """The runs of the report's small world, once per seed; answers of later seeds end in the seed."""
    made = [
        Asked(
            run.stack, {key: replace(record, text=f"{record.text}{seed or ''}") for key, record in run.answers.items()}
        )
        for seed in seeds
        for run in World().runs()
    ]
    return [replace(run, seed=seeds[index // 3]) for index, run in enumerate(made)]


def rows(found: list[Any], stack: str = "good") -> list[dict[str, Any]]:
    columns, cells = SampleTables(cast("Any", found), "none").of(stack)
    return [dict(zip(columns, row, strict=True)) for row in cells]


def test_no_more_samples_than_the_cap_and_the_telling_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_table.ROWS == 100
    assert len(rows(runs(0))) == 6
    assert list(rows(runs(0))[0])[len(sample_table.COLUMNS) :] == ["beta/l1_change", "beta/rows_edited", "beta/seconds"]
    monkeypatch.setattr(sample_table, "ROWS", 3)
    kept = rows(runs(0))
    assert {(row["sample"], row["became"]) for row in kept} == {
        ("p1/fixed", "fixed"), ("p2/broken", "broken"), ("p1/question", "fixed"),
    }  # fmt: skip
    assert [row["sample"] for row in rows(runs(0), "none")] == [row["sample"] for row in kept]


def test_of_several_seeds_the_first_one_is_shown() -> None:
    assert {row["seed"] for row in rows(runs(4, 7))} == {4}
    assert all(row["answer"].endswith("4") and row["baseline"].endswith("4") for row in rows(runs(4, 7)))


def test_a_failed_sample_says_so_and_nothing_in_it_is_hallucinated() -> None:
    found = runs(0)
    broken = replace(found[1].answers["p2/broken"], error="out of memory")
    found[1].answers["p2/broken"] = broken
    (row,) = [row for row in rows(found) if row["sample"] == "p2/broken"]
    assert (row["answer"], row["hallucinated"], row["became"]) == ("(failed: out of memory)", "", "failed")


def test_pictures_that_cannot_be_opened_are_missing_and_samples_without_one_are_not() -> None:
    for benchmark, missing in ((Words(), 0), (Words(broken=True), 5)):
        tables = SampleTables(cast("Any", [replace(run, benchmark=benchmark) for run in runs(0)]), "none")
        assert tables.missing == missing


def test_truth_is_one_short_line_without_what_is_empty() -> None:
    assert truth({"label": "no", "objects": ["a", "b"], "box": {"x": 1}, "none": None, "list": []}) == (
        'label: no; objects: a, b; box: {"x": 1}'
    )
    cut = truth({"objects": ["word"] * 200})
    assert len(cut) <= 300
    assert cut.endswith(" ...")
