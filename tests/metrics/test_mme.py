"""MME: replies are read, and scores computed, as the official tool does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks.mme import Mme as MmeBenchmark
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.metrics.mme import TASKS, TOTALS, Mme, mme_metrics, parse, picture_counts
from mitigate.records import SampleRecord

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "mme.json").read_text("utf-8"))
RUNS = [pytest.param(run, id=name) for name, run in VECTORS["runs"].items()]


def record(task: str, picture: str, position: int, text: str, label: str) -> SampleRecord:
    return SampleRecord(
        id=f"{task}/{picture}/{position}",
        image_id=f"{task}/{picture}",
        task="yes_no",
        prompt="?",
        text=text,
        tokens=1,
        finished=True,
        meta={"label": label, "mme": task},
    )


def records_of(rows: dict[str, list[list[str]]]) -> list[SampleRecord]:
    return [
        record(task, picture, index % 2, text, label.lower())
        for task, lines in rows.items()
        for index, (picture, _, label, text) in enumerate(lines)
    ]


def pair(task: str, picture: str, first: str, second: str) -> list[SampleRecord]:
    return [record(task, picture, 0, first, "yes"), record(task, picture, 1, second, "no")]


def numbers(records: list[SampleRecord], tasks: tuple[str, ...] = TASKS) -> dict[str, float]:
    benchmark = MmeBenchmark(tasks=tasks)
    return values(benchmark.counts(records), benchmark.metrics())


@pytest.mark.parametrize("case", VECTORS["parse"], ids=lambda case: repr(case["raw"]))
def test_replies_are_read_as_the_tool_reads_them(case: dict[str, str]) -> None:
    assert (parse(case["raw"]) or "other") == case["official"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  Yes", None),
        ("None", "no"),
        ("**Yes**", None),
        ("*Yes*", "yes"),
        ("No.", "no"),
        ("no yes", "no"),
        ("\nYes", "yes"),
        ("\tNo", "no"),
        ("\n\nYes", None),
        ("Y\tes", None),
        ("No\tit is not", "no"),
        ("Not", "no"),
        ("noye", "no"),
        ("I know", None),
    ],
)
def test_four_characters_decide(text: str, answer: str | None) -> None:
    assert parse(text) == answer


@given(st.text())
def test_the_line_end_of_the_tools_file_changes_nothing(text: str) -> None:
    assert parse(text) == parse(text + "\n")
    assert parse(text) in ("yes", "no", None)


@pytest.mark.parametrize("run", RUNS)
def test_whole_runs_score_as_the_tool_says(run: dict[str, Any]) -> None:
    official = run["official"]
    result = numbers(records_of(run["rows"]))
    if official["error"] is None:
        assert result["mme/perception"] == pytest.approx(official["totals"]["Perception"], abs=1e-9)
        assert result["mme/cognition"] == pytest.approx(official["totals"]["Cognition"], abs=1e-9)
    for task, score in official["scores"].items():
        assert result[f"mme/{task}/score"] == pytest.approx(score, abs=1e-9)
        assert result[f"mme/{task}/acc"] == pytest.approx(official["per_task"][task]["acc"])
        assert 100 * (result[f"mme/{task}/acc"] + result[f"mme/{task}/acc_plus"]) == pytest.approx(score)
    parts = TOTALS["hallucination"]
    assert result["mme/hallucination"] == pytest.approx(sum(result[f"mme/{task}/score"] for task in parts))
    assert result["mme/total"] == pytest.approx(result["mme/perception"] + result["mme/cognition"])


REPLIES = st.sampled_from(["Yes", "no", "Maybe", "yes, it is", "", "Now", "**No**"])


@given(
    st.lists(st.tuples(st.sampled_from(TASKS[:4]), REPLIES, REPLIES), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_scores_are_those_of_the_definition_in_any_order(rows: list[tuple[str, str, str]], random: Any) -> None:
    def read(text: str) -> str:
        return next((word for word in ("yes", "no") if word in text.lower()[:4]), "other")

    records = [
        item for index, (task, *texts) in enumerate(rows) for item in pair(task, f"{index}.jpg", texts[0], texts[1])
    ]
    random.shuffle(records)
    result = numbers(records, TASKS[:4])
    for task in TASKS[:4]:
        right = [(read(a) == "yes") + (read(b) == "no") for name, a, b in rows if name == task]
        if right:
            score = 100 * (sum(right) / (2 * len(right)) + right.count(2) / len(right))
            assert result[f"mme/{task}/score"] == pytest.approx(score)
        else:
            assert math.isnan(result[f"mme/{task}/score"])
    every = [read(text) for _, *texts in rows for text in texts]
    assert result["mme/unparsed_rate"] == pytest.approx(every.count("other") / len(every))
    assert result["mme/yes_rate"] == pytest.approx(every.count("yes") / len(every))


def test_totals_need_all_their_tasks() -> None:
    def names(tasks: tuple[str, ...]) -> set[str]:
        return {metric.name.removeprefix("mme/") for metric in mme_metrics(tasks)} & set(TOTALS)

    assert names(TASKS) == set(TOTALS)
    assert names(TOTALS["hallucination"]) == {"hallucination"}
    assert names(("OCR",)) == set()
    assert math.isnan(numbers(pair("existence", "a.jpg", "Yes", "No"))["mme/perception"])


def test_a_task_without_any_yes_or_no_scores_zero_and_says_so() -> None:
    records = pair("existence", "a.jpg", "Maybe", "") + pair("count", "a.jpg", "Maybe", "No")
    benchmark = MmeBenchmark(tasks=("existence", "count"))
    counts = benchmark.counts(records)
    assert values(counts, benchmark.metrics())["mme/existence/score"] == 0.0
    (warning,) = benchmark.warnings(counts)
    assert warning.startswith("mme: no reply begins with yes or no in existence: scored 0")


def test_replies_that_break_the_tools_files_are_counted() -> None:
    replies = ["Yes\tit is", "No\n", "No\r\n", "Yes", "Yes, it is", "No\u2028"]
    records = [item for n in range(3) for item in pair("count", f"{n}.jpg", *replies[2 * n : 2 * n + 2])]
    benchmark = MmeBenchmark(tasks=("count",))
    (warning,) = benchmark.warnings(benchmark.counts(records))
    assert warning.startswith("mme: 3 of 6 replies hold a tab or line end")


def test_a_picture_needs_both_answers() -> None:
    benchmark = MmeBenchmark(tasks=("count",))
    with pytest.raises(DataError, match=r"count/a\.jpg needs both its answers, but has 1"):
        benchmark.counts(pair("count", "a.jpg", "Yes", "No")[:1])
    with pytest.raises(DataError, match="'existence'; scored are count"):
        benchmark.counts(pair("existence", "a.jpg", "Yes", "No"))
    with pytest.raises(ConfigError, match="unknown MME task 'taste'"):
        Mme(tasks=("taste",))


def test_a_resample_of_pictures_scores_like_the_pictures_themselves() -> None:
    """The columns are counts per picture, so that a weighted sum is a run in which pictures come several times."""
    rows = [("Yes", "No"), ("Yes", "Yes"), ("Maybe", "No"), ("no", "yes")]
    weights = np.array([2, 0, 1, 3])
    records = [item for index, texts in enumerate(rows) for item in pair("color", f"{index}.jpg", *texts)]
    benchmark = MmeBenchmark(tasks=("color",))
    counts = benchmark.counts(records)
    score = next(metric for metric in benchmark.metrics() if metric.name == "mme/color/score")
    drawn = float(score.compute(weights @ counts.matrix(score)))
    repeated = [index for index, weight in enumerate(weights) for _ in range(weight)]
    copies = [item for n, index in enumerate(repeated) for item in pair("color", f"copy{n}.jpg", *rows[index])]
    assert drawn == pytest.approx(numbers(copies, ("color",))["mme/color/score"])


def test_other_answers_are_not_counted() -> None:
    stranger = SampleRecord(id="1", image_id="x", task="caption", prompt="", text="a cat", tokens=1, finished=True)
    assert Mme().score_cluster([stranger], MmeBenchmark()) == {}
    assert picture_counts("OCR", [("Yes, it is", "yes"), ("No", "no")])["mme/words"] == 4.0
