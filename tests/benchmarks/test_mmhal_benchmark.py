"""MMHal-Bench from its file to its score, with a judge behind a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mitigate.benchmarks.base import Sample, Span, check_samples
from mitigate.benchmarks.mmhal import Mmhal
from mitigate.errors import ConfigError, DataError
from mitigate.judges import CACHE
from mitigate.metrics.base import values
from mitigate.metrics.mmhal import TYPES
from mitigate.records import RecordWriter, RunRecord, SampleRecord
from mitigate.runner.results import summarise
from mitigate.runner.stored import read_run
from tests.judges.server import endpoint, failure, said

TEMPLATE = "See {image_content}. {question} It is: {gt_answer}\nThey say: {model_answer} {keep} {}"
NOWHERE = "http://127.0.0.1:9/v1"


def rows() -> list[dict[str, Any]]:
    return [
        {
            "question_type": TYPES[index % 8],
            "question_topic": "vehicle",
            "image_id": f"id{index}",
            "image_src": f"https://c1.staticflickr.com/3/{index}_o.jpg",
            "image_content": ["Car", f"Thing {index}"],
            "question": f"Question {index}?",
            "gt_answer": f"Answer {index}.",
            "model_answer": "",
        }
        for index in range(96)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "mmhal"
    (folder / "images").mkdir(parents=True)
    (folder / "response_template.json").write_text(json.dumps(rows(), indent=2))
    Image.new("RGB", (9, 7)).save(folder / "images" / "0_o.jpg")
    (tmp_path / "template.txt").write_text(TEMPLATE)
    return folder


@pytest.fixture
def make(data: Path) -> Callable[..., Mmhal]:
    def build(**parameters: Any) -> Mmhal:
        given = {"judge_url": NOWHERE, "judge_model": "judge", "template": str(data.parent / "template.txt")}
        return Mmhal(**{**given, "data_dir": str(data.parent), "judge_retries": 0, **parameters})

    return build


def answered(sample: Sample, text: str = "A car.") -> SampleRecord:
    parts: dict[str, Any] = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt", "meta")}
    return SampleRecord(**parts, text=text, tokens=1, finished=True)


def test_samples_are_the_questions(make: Callable[..., Mmhal]) -> None:
    samples = make().samples()
    check_samples(samples)
    assert [sample.id for sample in samples] == [str(index) for index in range(96)]
    assert samples[11].meta == {
        "type": "counting",
        "question": "Question 11?",
        "gt_answer": "Answer 11.",
        "image_content": ["Car", "Thing 11"],
    }
    assert (samples[11].task, samples[11].prompt, samples[11].image_id) == ("open", "Question 11?", "11_o.jpg")
    assert make().images(samples[0])[0].size == (9, 7)
    assert len(make(limit=5).samples()) == 5
    assert make(prompt="{question} Briefly.").samples()[0].prompt == "Question 0? Briefly."
    assert make(answer_tokens=7).max_new_tokens(samples[0]) == 7


def test_answers_are_judged_scored_and_shown(make: Callable[..., Mmhal], tmp_path: Path) -> None:
    ratings = {"0": "Rating: 6", "1": "Rating: 2", "2": "nothing"}

    def judge(_: int, body: dict[str, Any]) -> Any:
        index = body["messages"][0]["content"].split("Thing ")[1].split(".")[0]
        return said(ratings[index])

    with endpoint(judge) as server:
        benchmark = make(judge_url=server.url, limit=3)
        records = [answered(sample, "{question} $& \\1") for sample in benchmark.samples()]
        graded = benchmark.graded(records, tmp_path)
        assert sorted(server.asked)[0] == (
            "See Car, Thing 0. Question 0? It is: Answer 0.\nThey say: {question} $& \\1 {keep} {}"
        )
        assert [request.body["temperature"] for request in server.requests] == [0.0] * 3
    assert [record.meta["judge_reply"] for record in graded] == list(ratings.values())
    assert {record.meta["judge"] for record in graded} == {"judge-2026-01-01"}
    counts = benchmark.counts(graded)
    found = values(counts, benchmark.metrics())
    assert found["mmhal/score"] == pytest.approx(8 / 3)
    assert found["mmhal/hallucination_rate"] == pytest.approx(2 / 3)
    assert (found["mmhal/attribute/score"], found["mmhal/adversarial/score"]) == (6.0, 2.0)
    assert any("1 of 3 replies" in line for line in benchmark.warnings(counts))
    assert [benchmark.correct(record) for record in graded] == [True, False, False]
    assert [benchmark.errors(record) for record in graded] == [0.0, 1.0, 1.0]
    assert benchmark.marked(graded[0], "A car.") == [Span("A car.", "correct")]
    assert benchmark.marked(graded[1], "A car.") == [Span("A car.", "hallucinated")]
    assert benchmark.breakdowns(graded[1]) == {"type": "adversarial"}
    # The verdicts are kept: nobody is asked again.
    assert make(limit=3).graded(records, tmp_path) == graded


def test_before_the_judge_nothing_is_right_or_wrong(make: Callable[..., Mmhal]) -> None:
    benchmark = make()
    sample = benchmark.samples()[0]
    assert benchmark.correct(answered(sample)) is None
    assert benchmark.marked(sample, "A car.") == [Span("A car.")]
    with pytest.raises(DataError, match="judge_reply"):
        benchmark.counts([answered(sample)])


def test_a_judge_that_fails_keeps_what_it_said(make: Callable[..., Mmhal], tmp_path: Path) -> None:
    with endpoint(lambda number, _: said("Rating: 5") if number < 2 else failure(500)) as server:
        benchmark = make(judge_url=server.url, limit=6)
        with pytest.raises(DataError, match="verdicts given so far are kept"):
            benchmark.graded([answered(sample) for sample in benchmark.samples()], tmp_path)
    assert len((tmp_path / CACHE).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"judge_url": None}, r"mmhal: give benchmark\.judge_url"),
        ({"judge_model": None}, r"mmhal: give benchmark\.judge_url"),
        ({"judge_url": "nowhere"}, "judge_url='nowhere'"),
        ({"judge_retries": -1}, "judge_retries=-1"),
        ({"template": None}, r"benchmark\.template=FILE"),
        ({"template": "/nowhere/template.txt"}, "cannot be read"),
        ({"prompt": "Well?"}, r"benchmark\.prompt="),
        ({"answer_tokens": 0}, r"benchmark\.answer_tokens="),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    make: Callable[..., Mmhal], parameters: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**parameters)


@pytest.mark.parametrize("field", ["image_content", "question", "gt_answer", "model_answer"])
def test_a_template_without_a_field_is_refused(make: Callable[..., Mmhal], tmp_path: Path, field: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEMPLATE.replace(f"{{{field}}}", ""))
    with pytest.raises(ConfigError, match=rf"short\.txt has no \{{{field}\}}"):
        make(template=str(path))


@pytest.mark.parametrize(
    ("row", "changes", "says"),
    [
        (3, {"question_type": "other"}, "question 3 should be of the type 'counting'"),
        (3, {"question": ""}, "question must be text"),
        (3, {"gt_answer": None}, "gt_answer must be text"),
        (3, {"image_src": 5}, "image_src must be text"),
        (3, {"image_content": "Car"}, "image_content must be a list"),
    ],
)
def test_damaged_rows_are_refused_by_line(
    make: Callable[..., Mmhal], data: Path, row: int, changes: dict[str, Any], says: str
) -> None:
    content = rows()
    content[row] |= changes
    (data / "response_template.json").write_text(json.dumps(content, indent=2))
    with pytest.raises(DataError, match=rf"response_template\.json:\d+: {says}"):
        make().samples()


@pytest.mark.parametrize("kept", [95, 8])
def test_a_wrong_number_of_questions_is_refused(make: Callable[..., Mmhal], data: Path, kept: int) -> None:
    (data / "response_template.json").write_text(json.dumps(rows()[:kept]))
    with pytest.raises(DataError, match=f"{kept} questions, not 96"):
        make(limit=4).samples()


def test_missing_data_is_named_with_the_remedy(make: Callable[..., Mmhal], data: Path) -> None:
    (data / "response_template.json").unlink()
    with pytest.raises(DataError, match=r"(?s)response_template\.json does not exist.*huggingface"):
        make().samples()


def test_a_comparison_says_who_judged(make: Callable[..., Mmhal], tmp_path: Path) -> None:
    runs = []
    with endpoint(lambda number, _: said(f"Rating: {number}", f"judge-{number}")) as server:
        benchmark = make(judge_url=server.url, limit=2)
        for stack in ("none", "other"):
            folder = tmp_path / stack
            config = {
                "benchmark": {"name": "mmhal", **benchmark.params()},
                "model": {"name": "toy", "path": "toy"},
                "methods": {"other": {}} if stack == "other" else {},
                "trainer": {"batch_size": 1},
                "seed": 0,
            }
            record = RunRecord(status="finished", stack=stack, samples=2, config=config)
            with RecordWriter(folder) as writer:
                writer.extend(answered(sample) for sample in benchmark.samples())
            record.write(folder)
            runs.append(read_run(folder))
        comparison = summarise("two", runs)
        assert len(server.requests) == 2  # the stacks say the same, so the verdicts are the same
    assert comparison["judges"] == ["judge-0", "judge-1"]
    assert "Several judges graded the answers, and they need not agree: judge-0, judge-1." in comparison["notes"]
    assert comparison["stacks"]["other"]["differences"]["mmhal/score"]["value"] == 0.0
    assert set(comparison["breakdowns"]["type"]) == {"adversarial", "attribute"}
