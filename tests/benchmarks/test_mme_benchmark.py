"""The MME benchmark reads the official tool's files and refuses damaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.base import Sample, Span
from mitigate.benchmarks.mme import Mme
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.metrics.mme import TASKS
from mitigate.records import SampleRecord
from tests.benchmarks.official_yes_no import mme_lines, write_mme


def answered(sample: Sample, text: str) -> SampleRecord:
    parts = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt", "meta")}
    return SampleRecord(text=text, tokens=1, finished=True, **parts)


def test_all_tasks_are_read_in_the_tools_order(tmp_path: Path) -> None:
    write_mme(tmp_path)
    benchmark = Mme(data_dir=str(tmp_path))
    samples = benchmark.samples()
    rows = [(task, *line.split("\t")) for task in TASKS for line in mme_lines(task, 2)]
    assert [(sample.id, sample.prompt, sample.meta) for sample in samples] == [
        (f"{task}/{picture}/{index % 2}", question, {"label": label.lower(), "mme": task})
        for index, (task, picture, question, label) in enumerate(rows)
    ]
    assert len({sample.image_id for sample in samples}) == 2 * len(TASKS)
    for sample in samples:
        (image,) = benchmark.images(sample)
        assert image.size == (8, 6)
    posters = next(sample for sample in samples if sample.meta["mme"] == "posters")
    assert benchmark.image_files(posters) == [tmp_path / "mme" / "images" / "posters" / "images" / "0000.jpg"]


def test_right_answers_score_2800(tmp_path: Path) -> None:
    write_mme(tmp_path)
    benchmark = Mme(data_dir=str(tmp_path))
    records = [answered(sample, sample.meta["label"].upper()) for sample in benchmark.samples()]
    result = values(benchmark.counts(records), benchmark.metrics())
    assert (result["mme/perception"], result["mme/cognition"], result["mme/hallucination"]) == (2000.0, 800.0, 800.0)
    assert all(benchmark.correct(record) for record in records)
    assert benchmark.warnings(benchmark.counts(records)) == []


def test_limit_counts_the_pictures_of_a_task(tmp_path: Path) -> None:
    write_mme(tmp_path, ("OCR", "count"), 3)
    options: dict[str, Any] = {"data_dir": str(tmp_path), "tasks": ["OCR", "count"]}
    assert [sample.image_id for sample in Mme(limit=1, **options).samples()] == [
        *["OCR/0000.jpg"] * 2,
        *["count/0000.jpg"] * 2,
    ]
    assert len(Mme(limit=9, **options).samples()) == 12
    assert Mme(prompt="Look. {question}", **options).samples()[0].prompt.startswith("Look. Is this a OCR 0?")


def test_a_results_file_serves_as_well(tmp_path: Path) -> None:
    folder = write_mme(tmp_path, ("color",), 1)
    plain = Mme(tasks=("color",), data_dir=str(tmp_path)).samples()
    lines = (folder / "color.txt").read_text().splitlines()
    (folder / "color.txt").write_bytes("\r\n".join(f"{line}\tno, never" for line in lines).encode())
    assert Mme(tasks=("color",), data_dir=str(tmp_path)).samples() == plain


@pytest.mark.parametrize(
    ("lines", "line", "complaint"),
    [
        (["a.jpg\tQ?\tYes"], 1, "a.jpg must have two questions"),
        (["a.jpg\tQ?\tYes", "b.jpg\tQ?\tNo"], 1, "a.jpg must have two questions"),
        (["a.jpg\tQ?\tYes", "a.jpg\tQ?\tPerhaps"], 2, "the answer must be Yes or No, not 'Perhaps'"),
        (["a.jpg\tQ?\tYes", "a.jpg Q? No"], 2, "1 fields"),
        (["a.jpg\tQ?\tYes\tno\tmore", "a.jpg\tQ?\tNo"], 1, "5 fields"),
        (["../a.jpg\tQ?\tYes", "../a.jpg\tQ?\tNo"], 1, "name of a picture"),
        (["a.jpg\tQ?\tYes", "a.jpg\tQ?\tNo"] * 2, 3, "a.jpg is there twice"),
    ],
)
@pytest.mark.parametrize("limit", [None, 1])
def test_damaged_files_are_refused_with_their_line(
    tmp_path: Path, lines: list[str], line: int, complaint: str, limit: int | None
) -> None:
    folder = write_mme(tmp_path, ("scene",), 0)
    (folder / "scene.txt").write_text("\n".join(lines))
    with pytest.raises(DataError) as refusal:
        Mme(tasks=("scene",), data_dir=str(tmp_path), limit=limit).samples()
    assert f"scene.txt:{line}: " in str(refusal.value)
    assert complaint in str(refusal.value)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    folder = write_mme(tmp_path, ("scene",), 0)
    with pytest.raises(DataError, match=r"scene\.txt is empty"):
        Mme(tasks=("scene",), data_dir=str(tmp_path)).samples()
    (folder / "scene.txt").unlink()
    with pytest.raises(DataError, match=r"scene\.txt does not exist\n.*Your_Results/scene\.txt"):
        Mme(tasks=("scene",), data_dir=str(tmp_path)).samples()


@pytest.mark.parametrize(
    ("option", "value"),
    [("tasks", ()), ("tasks", ("taste",)), ("tasks", ("OCR", "OCR")), ("prompt", "?"), ("answer_tokens", 0)],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"benchmark.{option}="):
        Mme(**{option: value})


def test_what_a_report_shows() -> None:
    sample = Sample(id="OCR/a/0", image_id="OCR/a", task="yes_no", prompt="?", meta={"label": "no", "mme": "OCR"})
    benchmark = Mme()
    assert benchmark.breakdowns(answered(sample, "No")) == {"task": "OCR"}
    assert benchmark.marked(sample, "None") == [Span("None", "correct")]
    assert benchmark.marked(sample, "It is no") == [Span("It is no", "hallucinated")]
    assert benchmark.marked(sample, "") == []
    assert benchmark.errors(answered(sample, "It is no")) == 1.0
    assert benchmark.max_new_tokens(sample) == 16
    assert benchmark.headline == ("mme/perception", "mme/cognition")
    assert Mme(tasks=("existence", "count", "position", "color")).headline == ("mme/hallucination",)
    assert Mme(tasks=("OCR",)).headline == ("mme/accuracy",)
    for tasks in (TASKS, TASKS[:4], ("OCR",)):
        chosen = Mme(tasks=tasks)
        assert set(chosen.headline) <= {metric.name for metric in chosen.metrics()}
