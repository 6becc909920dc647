"""What a comparison leaves in W&B, read back from the offline runs and held against the files on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mitigate.cli import main
from mitigate.records import RunRecord, read_samples
from mitigate.trackers import wandb_file
from tests.runner.fake_world import FakeBenchmark
from tests.trackers.conftest import TrackedComparison
from tests.trackers.reading import Logged, read_group


def test_one_run_per_stack_in_one_group(tracked: TrackedComparison) -> None:
    assert set(tracked.logged) == {"none", "turned", "idle"}
    for stack, logged in tracked.logged.items():
        assert (logged.run.display_name, logged.run.run_group) == (stack, "three-stacks")
        assert (logged.run.project, list(logged.run.tags)) == ("paper", ["draft"])
        assert logged.folder.name.endswith(f"-{logged.run.run_id}")
        assert logged.exits == [0]
        assert "not evidence" in logged.run.notes
        assert ("only 6 images count: the interval is too narrow" in logged.run.notes) == (stack != "none")
    assert len({logged.run.run_id for logged in tracked.logged.values()}) == 3
    memory = json.loads((tracked.directory / "tracked.json").read_text())
    assert set(memory["wandb offline paper"]) == set(tracked.logged)


def test_the_config_is_the_records_with_seeds_versions_and_where_values_came_from(tracked: TrackedComparison) -> None:
    for stack, logged in tracked.logged.items():
        record = RunRecord.read(tracked.directory / stack)
        config = {key: value for key, value in logged.config.items() if key != "_wandb"}
        about = ("versions", "git", "data_hash", "prompt_hash", "weights", "created_at", "provenance")
        assert config == {**record.config, "seeds": [0], **{key: getattr(record, key) for key in about}}
    assert tracked.logged["turned"].config["provenance"] == {"methods.turn.period": "default"}


def expected_numbers(data: dict[str, Any], stack: str) -> dict[str, float | None]:
    """Every number of comparison.json that belongs in a run's summary, name by name."""
    own = data["stacks"][stack]
    numbers = {"n_images": data["n_images"], "n_samples": data["n_samples"], "failures": own["failures"]}
    for name, part in own["metrics"].items():
        numbers |= {name: part["value"], f"{name}/low": part["low"], f"{name}/high": part["high"]}
    for name, part in own["differences"].items():
        assert {"value", "low", "high", "p", "se", "effect_size", "mde", "excludes_zero"} <= set(part)
        assert ("p_holm" in part) == (name in data["headline"])
        numbers |= {f"difference/{name}/{key}": part[key] for key in set(part) - {"value", "undefined", "caution"}}
        numbers[f"difference/{name}"] = part["value"]
    numbers |= {f"mcnemar/{key}": value for key, value in (own["mcnemar"] or {}).items()}
    single = {key: value for key, value in own["effects"].items() if key not in ("idle", "methods")}
    numbers |= {f"effect/{key}": value for key, value in single.items()}
    numbers |= {f"cost/{key}": value for key, value in own["cost"].items() if key != "method_seconds"}
    numbers |= {f"cost/seconds/{key}": value for key, value in own["cost"]["method_seconds"].items()}
    for method, counters in own["effects"]["methods"].items():
        numbers |= {f"telemetry/{method}/{key}": value for key, value in counters.items()}
    return numbers


@pytest.mark.parametrize("stack", ["none", "turned", "idle"])
def test_the_summary_has_every_number_of_the_comparison_and_no_other(tracked: TrackedComparison, stack: str) -> None:
    expected = {key: float(value) for key, value in expected_numbers(tracked.data, stack).items() if value is not None}
    assert tracked.logged[stack].numbers == expected
    if stack == "turned":
        assert {"chair_i", "chair_i/low", "difference/chair_i/p_holm", "difference/chair_i/mde"} <= set(expected)
        assert expected["telemetry/turn/rows_edited"] == 4.0 * 24


def test_the_sample_table_shows_picture_question_both_answers_and_what_each_method_did(
    tracked: TrackedComparison,
) -> None:
    columns, rows = tracked.logged["turned"].table()
    fixed = ["picture", "sample", "seed", "category", "prompt", "truth", "baseline", "answer", "hallucinated", "became"]
    assert columns[:10] == fixed
    counters = columns[10:]
    assert counters == [
        f"turn/{key}" for key in ("extra_forwards", "l1_change", "rejections", "rows_edited", "seconds")
    ]
    answers = {record.id: record for record in read_samples(tracked.directory / "turned")}
    before = {record.id: record for record in read_samples(tracked.directory / "none")}
    assert {row[1] for row in rows} == set(answers)  # fewer than the cap: all of them
    seen = set()
    for row in rows:
        shown = dict(zip(columns, row, strict=True))
        record, plain = answers[shown["sample"]], before[shown["sample"]]
        assert (shown["prompt"], shown["answer"], shown["baseline"]) == (record.prompt, record.text, plain.text)
        spans = FakeBenchmark().marked(record, record.text)
        assert shown["hallucinated"] == ", ".join(span.text for span in spans if span.kind == "hallucinated")
        worse = (FakeBenchmark().errors(record) or 0) - (FakeBenchmark().errors(plain) or 0)
        became = "broken" if worse > 0 else "fixed" if worse < 0 else "changed"
        assert shown["became"] == ("same" if record.text == plain.text else became)
        assert (record.meta["label"] if record.task == "yes_no" else record.meta["objects"][0]) in shown["truth"]
        assert shown["turn/rows_edited"] == 4.0
        seen.add(shown["became"])
    assert {"same", "fixed", "broken"} <= seen


def test_the_baselines_table_has_no_other_answers_and_the_same_samples(tracked: TrackedComparison) -> None:
    columns, rows = tracked.logged["none"].table()
    shown = [dict(zip(columns, row, strict=True)) for row in rows]
    assert {(row["baseline"], row["became"]) for row in shown} == {(None, "")}
    assert [row["sample"] for row in shown] == [row[1] for row in tracked.logged["turned"].table()[1]]


def test_the_pictures_of_the_table_are_the_benchmarks(tracked: TrackedComparison) -> None:
    logged = tracked.logged["turned"]
    files = logged.artifact("run_table", "samples")
    samples = {sample.id: sample for sample in FakeBenchmark().samples()}
    for row in logged.table()[1]:
        with Image.open(files[row[0]["path"]]) as picture:
            (expected,) = FakeBenchmark().images(samples[row[1]])
            assert picture.convert("RGB").tobytes() == expected.tobytes()
    assert sum(path.endswith(".png") for path in files) == 6  # each one once


def digests(logged: Logged, kind: str) -> dict[str, str]:
    (found,) = [item for item in logged.artifacts.values() if item.type == kind]
    return {item.path: item.digest for item in found.manifest.contents}


def md5(path: Path) -> str:
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def test_records_and_report_are_artifacts(tracked: TrackedComparison) -> None:
    for stack, logged in tracked.logged.items():
        folder = tracked.directory / stack
        files = ("config.json", "record.json", "samples.rank0.jsonl")
        assert digests(logged, "records") == {name: md5(folder / name) for name in files}
        for name, path in logged.artifact("records").items():
            assert path.read_bytes() == (folder / name).read_bytes()
    report = {name: md5(tracked.directory / name) for name in ("comparison.json", "report.html")}
    assert digests(tracked.logged["none"], "report") == report
    kinds = [item.type for logged in tracked.logged.values() for item in logged.artifacts.values()]
    assert (kinds.count("report"), kinds.count("records")) == (1, 3)
    names = {item.name for logged in tracked.logged.values() for item in logged.artifacts.values()}
    assert "report-three-stacks" in names


def test_an_offline_run_that_is_cut_off_anywhere_is_not_whole(
    tracked: TrackedComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_file, "PATIENCE_SECONDS", 0.0)
    folder = tracked.logged["turned"].folder
    assert wandb_file.is_whole(folder)
    assert not wandb_file.is_whole(tmp_path)
    (log,) = folder.glob("*.wandb")
    data, cut = log.read_bytes(), tmp_path / "run-x.wandb"
    for length in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        assert not wandb_file.is_whole(tmp_path), length
    cut.write_bytes(data)
    assert wandb_file.is_whole(tmp_path)


def test_an_upload_finds_the_same_runs_and_logs_them_as_compare_did(
    tracked: TrackedComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tracked.directory, directory := tmp_path / "moved", ignore=shutil.ignore_patterns("wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["upload", str(directory), "tracker.mode=offline"]) == 0
    assert "nothing new for wandb offline paper" in capsys.readouterr().out
    assert not (directory / "wandb").exists()
    assert main(["upload", str(directory / "turned"), "tracker.mode=offline", "--force"]) == 0
    (uploaded,) = read_group(directory).values()
    before = tracked.logged["turned"]
    assert (uploaded.run.run_id, uploaded.run.run_group) == (before.run.run_id, before.run.run_group)
    assert uploaded.numbers == before.numbers
    assert uploaded.config == before.config
    assert [row[1:] for row in uploaded.table()[1]] == [row[1:] for row in before.table()[1]]
