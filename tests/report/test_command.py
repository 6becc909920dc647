"""``mitigate report`` on folders as runs leave them."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.testbed import Testbed
from mitigate.cli import main
from mitigate.records import RecordWriter, RunRecord, SampleRecord

FORMATS = ("html", "md", "csv", "tex")


def store(folder: Path, stack: str, *, changed: str = "", seed: int = 0, limit: int = 2, **more: Any) -> Path:
    """Write a run of the testbed's benchmark in which every caption is ``changed`` and every answer Yes."""
    benchmark = Testbed(limit=limit)
    samples = benchmark.samples()
    methods = {stack: {"name": stack, "gain": 0.5}} if changed else {}
    config = {
        "model": {"name": "small", "path": "small"},
        "benchmark": {"name": "testbed", **benchmark.params()},
        "decoding": {"max_new_tokens": 8},
        "trainer": {"batch_size": 4},
        "methods": methods,
        "seed": seed,
    }
    record = RunRecord(
        status="finished", stack=stack, samples=len(samples), config=config, data_hash="d4", prompt_hash="e5",
        weights="f6", versions={"torch": "9"}, git={"sha": None, "dirty": None}, created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    dataclasses.replace(record, **more).write(folder)
    with RecordWriter(folder) as writer:
        writer.extend(
            SampleRecord(
                id=sample.id,
                image_id=sample.image_id,
                task=sample.task,
                prompt=sample.prompt,
                text=(changed or "The cat at top is red.") if sample.task == "caption" else "Yes",
                tokens=4,
                finished=True,
                meta=sample.meta,
                telemetry={stack: {"tokens_changed": 1.0}} if changed else {},
                seconds=0.1,
            )
            for sample in samples
        )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(store(tmp_path / "a", "none")), str(store(tmp_path / "b", "good", changed="The dog."))]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") <= 2
    return message.replace("\n", " ")


def test_several_runs_become_one_report_in_every_format(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["report", *runs, "--out", str(out), "--format", ",".join(FORMATS), "--title", "Two <stacks>"]
    assert main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(f"report.{ending}" for ending in FORMATS)
    html = (out / "report.html").read_text()
    assert "<h1>Two &lt;stacks&gt;</h1>" in html
    assert "2 pictures" in html
    assert "data:image/png;base64," in html
    assert "tokens changed: 1" in html
    assert "not evidence about large models" in html
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert {row["stack"] for row in rows} == {"none", "good"}
    assert "file://" in capsys.readouterr().out


def test_one_run_has_a_report_in_its_own_folder(runs: list[str]) -> None:
    assert main(["report", runs[1], "--samples", "0"]) == 0
    html = (Path(runs[1]) / "report.html").read_text()
    assert "No samples are shown" in html
    assert "<img" not in html


def test_a_comparison_is_read_with_all_its_stacks_in_order(tmp_path: Path) -> None:
    for name, changed in (("none", ""), ("zeta", "The dog."), ("alpha", "The cat.")):
        store(tmp_path / "c" / name, name, changed=changed)
    stacks: dict[str, Any] = {"none": {}, "zeta": {}, "alpha": {}}
    (tmp_path / "c" / "comparison.json").write_text(json.dumps({"stacks": stacks}))
    assert main(["report", str(tmp_path / "c"), "--format", "md"]) == 0
    text = (tmp_path / "c" / "report.md").read_text()
    assert text.startswith("# c\n")
    assert text.index("| none |") < text.index("| zeta |") < text.index("| alpha |")


def test_seeds_of_a_stack_are_pooled_and_named(tmp_path: Path) -> None:
    folders = [
        str(store(tmp_path / f"{name}{seed}", name, changed=changed, seed=seed))
        for name, changed in (("none", ""), ("good", "The dog."))
        for seed in (0, 1)
    ]
    assert main(["report", *folders, "--out", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "good, seed 1" in html
    assert "<dt>seeds</dt><dd><code>0, 1</code></dd>" in html


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"data_hash": "dd"}, "the data's sha256: d4 in the first, dd in the second"),
        ({"prompt_hash": "ee"}, "the prompts' sha256: e5"),
        ({"weights": "ff"}, "the weights: f6"),
        ({"limit": 3}, "benchmark.limit: 2 in the first, 3 in the second"),
    ],
)
def test_runs_of_different_questions_or_models_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], named: str
) -> None:
    one, other = store(tmp_path / "a", "none"), store(tmp_path / "b", "good", changed="The dog.", **more)
    message = refused(capsys, str(one), str(other), "--out", str(tmp_path / "out"))
    assert named in message
    assert "report them separately" in message
    assert not (tmp_path / "out").exists()


def test_one_name_for_two_sets_of_methods_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = store(tmp_path / "a", "same"), store(tmp_path / "b", "same", changed="The dog.", seed=1)
    assert "both called 'same'" in refused(capsys, str(one), str(other), "--out", str(tmp_path / "out"))


def test_a_run_that_is_not_finished_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store(tmp_path / "a", "none", status="running")
    assert "is not finished" in refused(capsys, str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--format", "pdf"], "--format pdf is unknown"),
        (["RUN", "--format", ","], "--format needs some of"),
        (["RUN", "--samples", "-3"], "must be a whole number"),
        (["RUN", "--sample", "3"], "has no option '--sample'"),
        (["RUN", "RUN"], "--out DIR"),
        (["RUN", "RUN", "--out", "x"], "is named twice"),
        (["RUN/record.json"], "is no folder"),
        (["."], "holds no run"),
        (["--title", "x"], "needs the folder"),
        (["RUN", "--out", "RUN/record.json"], "is a file; name a folder"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    folder = store(tmp_path / "a" / "run", "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert message in refused(capsys, *(item.replace("RUN", str(folder)) for item in arguments))


def test_help_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "--samples N" in capsys.readouterr().out
    assert main(["report"]) == 2
