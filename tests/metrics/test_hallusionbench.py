"""HallusionBench: verdicts, groups and bias as the official script computes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks.hallusionbench import HallusionBench as HallusionBenchBenchmark
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.metrics.hallusionbench import (
    HallusionBench,
    exact_verdict,
    hallusionbench_counts,
    is_right,
    judge_verdict,
)
from mitigate.metrics.yes_no import parse
from mitigate.records import SampleRecord

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "hallusionbench.json").read_text("utf-8"))
SAYS = {"0": "Incorrect.", "1": "correct", "2": "unclear"}
EXACT = VECTORS["exact_match_variants"]
Row = dict[str, Any]


def built(grader: str = "judge") -> HallusionBenchBenchmark:
    return HallusionBenchBenchmark(grader=grader, judge_url="http://nobody/v1", judge_model="j")


def record(row: Row, text: str = "x", **meta: str) -> SampleRecord:
    names = [str(row[key]) for key in ("category", "subcategory", "set_id", "figure_id", "question_id")]
    truth = dict(zip(("category", "subcategory", "set", "figure", "question_id"), names, strict=True))
    label = "yes" if row["gt_answer"] == "1" else "no"
    return SampleRecord(
        id="_".join(names),
        image_id="_".join(names[:-1]),
        task="yes_no",
        prompt="?",
        text=text,
        tokens=1,
        finished=True,
        meta={**truth, "visual_input": row["visual_input"], "label": label, **meta},
    )


def judged(rows: Iterable[Row], key: str = "gpt4v_output_gpt_check") -> list[SampleRecord]:
    return [record(row, judge_reply=SAYS[row[key]]) for row in rows]


def numbers(records: list[SampleRecord], grader: str = "judge") -> dict[str, float]:
    benchmark = built(grader)
    result = values(benchmark.counts(records), benchmark.metrics())
    return {name.removeprefix("hallusionbench/"): value for name, value in result.items()}


@pytest.mark.parametrize("case", VECTORS["judge_parse"], ids=lambda case: repr(case["judge_reply"]))
def test_what_a_judge_says_is_read_as_the_script_reads_it(case: dict[str, str]) -> None:
    assert judge_verdict(case["judge_reply"]) == int(case["verdict"])


def test_not_correct_is_read_as_correct_too() -> None:
    assert judge_verdict("This is not correct") == 1
    assert judge_verdict("correct? no, INCORRECT") == 0


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in VECTORS["runs"].items()])
def test_judged_runs_give_the_official_numbers(run: dict[str, Any]) -> None:
    official = run["official"]
    result = numbers(judged(run["data"]))
    for name, value in official.get("leaderboard", {}).items():
        assert round(100 * result[name], 4) == pytest.approx(value, abs=1e-9)
    bias = official.get("yes_ratio_stats") or {}
    if "diff" in bias:
        assert result["yes_diff"] == pytest.approx(bias["diff"])
        assert result["fp_ratio"] == pytest.approx(bias["fp"])


def test_exact_reads_replies_as_one_word_and_nothing_else() -> None:
    found = [{"yes": "Yes", "no": "No", None: "Unknown"}[parse(row["model_prediction"])] for row in EXACT["data"]]
    assert found == EXACT["vlmevalkit_extracted"]
    records = [record(row, row["model_prediction"]) for row in EXACT["data"]]
    assert numbers(records, "exact")["unparsed_rate"] == pytest.approx(found.count("Unknown") / len(found))


def test_exact_agrees_with_another_toolkit_where_both_define_a_number() -> None:
    """Its accuracy figures per figure count those without a picture as well; the official ones, and ours, do not."""
    records = [record(row, row["model_prediction"]) for row in EXACT["data"]]
    for split in EXACT["vlmevalkit_percent"]:
        wanted = [] if split["split"] == "Overall" else split["split"].split("_")
        part = [item for item in records if [item.meta["category"], item.meta["subcategory"]][: len(wanted)] == wanted]
        result = numbers(part, "exact")
        assert 100 * result["aAcc"] == pytest.approx(split["aAcc"])
        assert 100 * result["qAcc"] == pytest.approx(split["qAcc"])
        if wanted[:1] == ["VD"]:
            assert 100 * result["fAcc"] == pytest.approx(split["fAcc"])


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("Yes.", "yes", 1),
        ("**no**", "yes", 0),
        ("I cannot tell", "no", 2),
        ("Yes and no", "no", 2),
        ("", "no", 0),
        ("...", "yes", 0),
    ],
)
def test_exact_verdicts(text: str, label: str, expected: int) -> None:
    assert exact_verdict(text, label) == expected


def test_not_knowing_is_right_only_where_the_picture_is_not_shown() -> None:
    shown = {"category": "VS", "figure": "1", "label": "yes"}
    for meta, right in ((shown, False), ({**shown, "figure": "0"}, True), ({**shown, "category": "VD"}, False)):
        assert is_right(meta, "I cannot tell", "exact") is right
        assert is_right({**meta, "judge_reply": "unclear"}, "?", "judge") is right


def test_sets_can_be_counted_together() -> None:
    tiny = VECTORS["runs"]["tiny"]["data"]
    more = [{**row, "set_id": "9", "gpt4v_output_gpt_check": "1"} for row in tiny]  # a second set of each subject
    records = judged([*tiny, *more])
    together = hallusionbench_counts([(item.meta, item.text) for item in records], "judge")
    apart = built().counts(records)
    assert len(apart.images) == 12
    assert together == {name: float(column.sum()) for name, column in apart.columns.items()}


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["VD", "VS"]),
        st.sampled_from(["0", "1"]),
        st.sampled_from(["0", "1", "2"]),
        st.sampled_from(["0", "1"]),
        st.sampled_from(["0", "1"]),
        st.sampled_from(["0", "1", "2"]),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[:4],
)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_numbers_are_those_of_the_definition_in_any_order(drawn: list[tuple[str, ...]], random: Any) -> None:
    rows = [
        {
            "category": category,
            "subcategory": "math",
            "set_id": set_id,
            "figure_id": figure,
            "question_id": question,
            # an edited picture is never the first; without a picture only in VS
            "visual_input": "2" if figure == "2" else "0" if (category, figure) == ("VS", "0") else "1",
            "gt_answer": gt,
            "verdict": verdict,
        }
        for category, set_id, figure, question, gt, verdict in drawn
    ]
    random.shuffle(rows)
    result = numbers(judged(rows, "verdict"))

    def right(row: Row) -> bool:
        blind = row["category"] == "VS" and row["figure_id"] == "0"
        return row["verdict"] == "1" or (blind and row["verdict"] == "2")

    def groups(kept: list[Row], last: str) -> float:
        keys = {(row["category"], row["set_id"], row[last]) for row in kept}
        whole = [all(right(row) for row in kept if (row["category"], row["set_id"], row[last]) == key) for key in keys]
        return sum(whole) / len(whole) if whole else 0.0

    wrong = [row for row in rows if not right(row)]
    assert result["aAcc"] == pytest.approx(1 - len(wrong) / len(rows))
    assert result["qAcc"] == pytest.approx(groups(rows, "question_id"))
    with_picture = [row for row in rows if row["visual_input"] != "0"]
    assert result["fAcc"] == pytest.approx(groups(with_picture, "figure_id"))
    assert result["easy_aAcc"] == pytest.approx(groups([r for r in rows if r["visual_input"] != "2"], "question_id"))
    assert result["hard_aAcc"] == pytest.approx(groups([r for r in rows if r["visual_input"] == "2"], "question_id"))
    said = sum(right(row) == (row["gt_answer"] == "1") for row in rows) / len(rows)
    assert result["yes_rate"] == pytest.approx(said)
    assert result["yes_diff"] == pytest.approx(said - sum(row["gt_answer"] == "1" for row in rows) / len(rows))
    false_yes = sum(row["gt_answer"] == "0" for row in wrong)
    assert result["fp_ratio"] == pytest.approx(false_yes / len(wrong) if wrong else 0.0)
    assert result["unparsed_rate"] == pytest.approx(sum(row["verdict"] == "2" for row in rows) / len(rows))


def test_what_the_script_cannot_divide_is_zero_with_a_warning() -> None:
    benchmark = built()
    tiny = VECTORS["runs"]["tiny"]["data"]
    perfect = benchmark.counts([record(row, judge_reply="correct") for row in tiny])
    assert values(perfect, benchmark.metrics())["hallusionbench/fp_ratio"] == 0.0
    assert [line.split(":")[0] for line in benchmark.warnings(perfect)] == ["hallusionbench/fp_ratio"]
    blind = benchmark.counts(judged(row for row in tiny if row["visual_input"] == "0"))
    named = [line.split(":")[0].removeprefix("hallusionbench/") for line in benchmark.warnings(blind)]
    assert named == ["fAcc", "hard_aAcc"]
    assert benchmark.warnings(benchmark.counts(judged(tiny))) == []
    assert HallusionBench().warnings({}) == []


def test_refusals() -> None:
    row = VECTORS["runs"]["tiny"]["data"][0]
    with pytest.raises(ConfigError, match="unknown grader 'vote'"):
        HallusionBench(grader="vote")
    with pytest.raises(DataError, match="no verdict of a judge"):
        built().counts([record(row)])
    stranger = SampleRecord(id="1", image_id="x", task="caption", prompt="", text="a cat", tokens=1, finished=True)
    assert HallusionBench().score_cluster([stranger], HallusionBenchBenchmark()) == {}
