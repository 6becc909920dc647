"""The HallusionBench benchmark reads the official file, and grades by itself or with a judge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.base import Sample, Span
from mitigate.benchmarks.hallusionbench import HallusionBench
from mitigate.benchmarks.mme import Mme
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.records import RecordWriter, RunRecord, SampleRecord
from mitigate.runner.results import summarise
from mitigate.runner.sample_table import SampleTables
from mitigate.runner.stored import read_run
from tests.benchmarks.official_yes_no import hallusionbench_rows, write_hallusionbench, write_mme
from tests.judges.server import Answer, endpoint, said


def answered(sample: Sample, text: str, **meta: str) -> SampleRecord:
    parts = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt")}
    return SampleRecord(text=text, tokens=1, finished=True, meta={**sample.meta, **meta}, **parts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_hallusionbench(tmp_path)
    return tmp_path


def test_the_file_is_read(root: Path) -> None:
    benchmark = HallusionBench(data_dir=str(root))
    samples = benchmark.samples()
    rows = hallusionbench_rows()
    assert [sample.id for sample in samples] == [
        "_".join(row[key] for key in ("category", "subcategory", "set_id", "figure_id", "question_id")) for row in rows
    ]
    assert [sample.prompt for sample in samples] == [row["question"] for row in rows]
    assert [sample.meta["label"] for sample in samples] == [("no", "yes")[int(row["gt_answer"])] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        files = benchmark.image_files(sample)
        assert [path.relative_to(root / "hallusionbench" / "hallusion_bench") for path in files] == [
            Path(row["filename"]) for row in [row] if row["filename"]
        ]
        assert [image.size for image in benchmark.images(sample)] == [(8, 6)] * len(files)
        assert benchmark.max_new_tokens(sample) is None


def test_sets_are_the_unit(root: Path) -> None:
    samples = HallusionBench(data_dir=str(root), limit=2).samples()
    clusters = [HallusionBench().cluster(answered(sample, "Yes")) for sample in samples]
    assert list(dict.fromkeys(clusters)) == ["VD_illusion_0", "VD_math_3"]
    assert len(samples) == 10
    counts = HallusionBench().counts([answered(sample, "Yes") for sample in samples])
    assert counts.images == ("VD_illusion_0", "VD_math_3")


def test_right_answers_are_right_everywhere(root: Path) -> None:
    benchmark = HallusionBench(data_dir=str(root), prompt="{question} Answer yes or no.")
    samples = benchmark.samples()
    assert samples[0].prompt == "Is illusion 0 so? Answer yes or no."
    records = [answered(sample, f"**{sample.meta['label'].title()}**.") for sample in samples]
    result = values(benchmark.counts(records), benchmark.metrics())
    assert {result[f"hallusionbench/{name}"] for name in ("aAcc", "qAcc", "fAcc", "easy_aAcc", "hard_aAcc")} == {1.0}
    assert result["hallusionbench/yes_diff"] == 0.0
    assert set(benchmark.headline) <= set(result)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"category": "VX"}, "category must be one of VD, VS, not 'VX'"),
        ({"gt_answer": "2"}, "gt_answer must be one of 0, 1, not '2'"),
        ({"visual_input": "3"}, "visual_input must be one of 0, 1, 2, not '3'"),
        ({"question": None}, "question must be text, not None"),
        ({"set_id": "../1"}, "set_id must be letters and digits, not '../1'"),
        ({"question_id": "0"}, "VD_illusion_0_0_0 is there twice"),
    ],
)
def test_damaged_rows_are_refused_with_their_line(root: Path, change: dict[str, Any], complaint: str) -> None:
    path = root / "hallusionbench" / "HallusionBench.json"
    rows = hallusionbench_rows()
    rows[1] = {**rows[1], **change}
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    with pytest.raises(DataError) as refusal:
        HallusionBench(data_dir=str(root), limit=1).samples()
    assert f"{path}:3: " in str(refusal.value)
    assert complaint in str(refusal.value)


def test_numbers_serve_as_well_as_text_and_missing_keys_are_refused(root: Path) -> None:
    path = root / "hallusionbench" / "HallusionBench.json"
    expected = HallusionBench(data_dir=str(root)).samples()
    rows = [{**row, "gt_answer": int(row["gt_answer"]), "set_id": int(row["set_id"])} for row in hallusionbench_rows()]
    path.write_text(json.dumps(rows))
    assert HallusionBench(data_dir=str(root)).samples() == expected
    del rows[0]["gt_answer_details"]
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"HallusionBench\.json:1: the key 'gt_answer_details' is missing"):
        HallusionBench(data_dir=str(root)).samples()
    path.unlink()
    with pytest.raises(DataError, match="mitigate data fetch hallusionbench"):
        HallusionBench(data_dir=str(root)).samples()


@pytest.mark.parametrize(
    ("option", "value"), [("grader", "vote"), ("prompt", "?"), ("answer_tokens", 0), ("judge_retries", -1)]
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"benchmark.{option}="):
        HallusionBench(**{option: value})


def test_a_judge_sees_question_reference_and_reply_and_is_asked_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")

    def verdict(_: int, body: dict[str, Any]) -> Answer:
        content = body["messages"][-1]["content"]
        return said("Incorrect." if "answer:It is {so}\n" in content else "The answer is correct.")

    with endpoint(verdict) as server:
        benchmark = HallusionBench(
            data_dir=str(root), grader="judge", judge_url=server.url, judge_model="gpt-4", limit=1
        )
        texts = ["It is {so}", "It is not", "Sure", ""]
        records = [answered(sample, text) for sample, text in zip(benchmark.samples(), texts, strict=True)]
        assert benchmark.marked(records[0], "x") == [Span("x")]
        graded = benchmark.graded(records, tmp_path / "run")
        assert benchmark.graded(records, tmp_path / "run") == graded
        asked = next(text for text in server.asked if "{so}" in text)
        assert len(server.asked) == 4
    assert (tmp_path / "run" / "judgements.jsonl").is_file()
    assert asked.startswith("Imagine you are an intelligent teacher. ")
    assert asked.endswith(
        "\n\n Question:Is illusion 0 so?\nReference answer: It is so.\nPrediction answer:It is {so}\nOutput:"
    )
    assert [benchmark.correct(record) for record in graded] == [False, True, True, True]
    assert [span.kind for span in benchmark.marked(graded[0], "x")] == ["hallucinated"]
    assert values(benchmark.counts(graded), benchmark.metrics())["hallusionbench/aAcc"] == 0.75


def test_exact_needs_no_judge_and_a_judge_needs_an_address(root: Path, tmp_path: Path) -> None:
    records = [answered(sample, "Yes") for sample in HallusionBench(data_dir=str(root)).samples()]
    assert HallusionBench().graded(records, tmp_path) == records
    with pytest.raises(ConfigError, match="judge_url"):  # before anything runs
        HallusionBench(grader="judge", judge_model="gpt-4")


@pytest.mark.parametrize(
    ("benchmark", "failing", "left_out", "kept"),
    [
        (Mme(tasks=("OCR", "count")), "count/0001.jpg/1", "count/0001.jpg", 6),
        (HallusionBench(), "VS_chart_0_1_0", "VS_chart_0", 10),
    ],
    ids=["mme", "hallusionbench"],
)
def test_where_one_answer_fails_the_others_of_its_pair_or_set_are_left_out(
    root: Path, benchmark: Mme | HallusionBench, failing: str, left_out: str, kept: int
) -> None:
    write_mme(root, ("OCR", "count"))
    benchmark = dataclasses.replace(benchmark, data_dir=str(root))
    answers = [answered(sample, "Yes") for sample in benchmark.samples()]
    answers = [dataclasses.replace(each, error="boom") if each.id == failing else each for each in answers]
    with RecordWriter(root / "run") as writer:
        writer.extend(answers)
    config = {
        "benchmark": {"name": benchmark.name, **benchmark.params()},
        "model": {"name": "toy", "path": "toy"},
        "methods": {},
        "trainer": {"batch_size": 1},
        "seed": 0,
    }
    RunRecord(status="finished", stack="none", samples=len(answers), config=config).write(root / "run")
    stored = read_run(root / "run")
    comparison = summarise("one", [stored])
    assert (comparison["left_out"], comparison["n_samples"]) == ([left_out], kept)
    assert comparison["stacks"]["none"]["failures"] == 1
    assert comparison["notes"][0].startswith("1 group of answers is left out")
    assert SampleTables([stored], None).missing == 0  # a question that is asked without a picture misses none


def test_what_a_report_shows(root: Path) -> None:
    benchmark = HallusionBench(data_dir=str(root))
    samples = {sample.id: sample for sample in benchmark.samples()}
    blind, edited = samples["VS_chart_0_0_0"], samples["VD_math_3_2_0"]
    assert benchmark.breakdowns(answered(blind, "")) == {
        "category": "VS",
        "subcategory": "VS chart",
        "picture": "none",
    }
    assert benchmark.breakdowns(answered(edited, ""))["picture"] == "edited"
    assert benchmark.marked(blind, "I cannot tell") == [Span("I cannot tell", "correct")]
    assert benchmark.marked(edited, "I cannot tell") == [Span("I cannot tell", "hallucinated")]
    assert benchmark.marked(edited, "") == []
    assert benchmark.errors(answered(edited, "Yes")) == 1.0
