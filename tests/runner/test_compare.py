from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from mitigate.core.facts import ModelFacts
from mitigate.core.method import Tags
from mitigate.errors import ConfigError, DataError, MitigateError
from mitigate.records import RunRecord, read_samples, sample_files
from mitigate.runner import compare, run
from mitigate.runner.comparison import Comparison
from mitigate.trackers.base import Tracker
from tests.runner import fake_world
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, FakeMethod, install, resolved


@pytest.fixture
def loaded() -> FakeLoaded:
    return FakeLoaded()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, loaded: FakeLoaded) -> list[str]:
    return install(monkeypatch.setattr, loaded)


def stacks(**changes: Any) -> list[Any]:
    return [resolved(**changes), resolved("turned", **changes)]


def quiet(directory: Path, runs: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    made = compare(runs or stacks(), directory, console=Console(quiet=True), **options)
    assert isinstance(made, Comparison)
    return dict(made.data)


def numbers(directory: Path) -> dict[str, Any]:
    """Return everything of comparison.json that must not depend on time or on interruptions."""
    data = json.loads((directory / "comparison.json").read_text())
    data.pop("name")
    for stack in data["stacks"].values():
        del stack["cost"], stack["record"]
    return data


def forget(run_dir: Path, keep: int) -> None:
    """Cut a run back to its first ``keep`` records, as if it had been killed then."""
    (path,) = sample_files(run_dir)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:keep]) + lines[keep][:17])
    record = json.loads((run_dir / "record.json").read_text())
    (run_dir / "record.json").write_text(json.dumps({**record, "status": "running"}))


def test_a_comparison_holds_metrics_differences_effects_and_cost(loads: list[str], tmp_path: Path) -> None:
    data = quiet(tmp_path / "c")
    assert data == json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert (data["baseline"], data["n_images"], data["n_samples"]) == ("none", 6, 24)
    turned = data["stacks"]["turned"]
    assert set(turned["metrics"]) == {metric.name for metric in FakeBenchmark().metrics()} == set(turned["differences"])
    for name in data["headline"]:
        difference, before = turned["differences"][name], data["stacks"]["none"]["metrics"][name]["value"]
        assert difference["value"] == pytest.approx(turned["metrics"][name]["value"] - before)
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert difference["p_holm"] == difference["p"]  # one stack: nothing to adjust
    assert turned["effects"]["rows_edited_share"] == pytest.approx(0.1)
    tokens = sum(record.tokens for record in read_samples(tmp_path / "c" / "turned"))
    assert turned["effects"]["extra_forwards_per_token"] == pytest.approx(3.0 * 24 / tokens)
    assert turned["effects"]["texts_changed"] > 0
    assert turned["cost"]["overhead"] > 0
    assert data["stacks"]["none"]["cost"]["overhead"] == 1.0
    assert data["stacks"]["none"]["differences"] == {}
    assert (tmp_path / "c" / "report.html").exists()
    for stack in ("none", "turned"):
        assert RunRecord.read(tmp_path / "c" / stack).status == "finished"
        assert {path.name for path in (tmp_path / "c" / stack).iterdir()} == {
            "config.json",
            "record.json",
            "samples.rank0.jsonl",
        }


def test_records_hold_the_reply_without_padding_and_the_telemetry(loads: list[str], tmp_path: Path) -> None:
    run(resolved("turned"), tmp_path / "r", console=Console(quiet=True))
    records = read_samples(tmp_path / "r")
    caption = next(record for record in records if record.task == "caption")
    assert (caption.tokens, caption.finished) == (10, True)
    assert caption.text.count(".") == 3
    assert caption.telemetry["turn"]["rows_edited"] == 4.0
    assert caption.meta["objects"]
    assert all(record.text in ("Yes", "No") and record.tokens == 2 for record in records if record.task == "yes_no")


def test_a_reply_that_reaches_the_limit_is_not_finished(loads: list[str], tmp_path: Path) -> None:
    run(resolved(decoding__max_new_tokens=5), tmp_path / "r", console=Console(quiet=True))
    caption = next(record for record in read_samples(tmp_path / "r") if record.task == "caption")
    assert (caption.tokens, caption.finished) == (5, False)


def test_the_model_is_loaded_once_and_warmed_up_for_every_stack(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path
) -> None:
    quiet(tmp_path / "c")
    assert loads == ["testbed"]
    per_stack = 2 + 5  # captions and questions of six pictures in batches of four
    assert len(loaded.model.calls) == 2 * (per_stack + 1)
    assert [call["max_new_tokens"] for call in loaded.model.calls[:2]] == [2, 12]
    assert loaded.model.attached == 0


def test_finished_stacks_are_not_run_again(loads: list[str], loaded: FakeLoaded, tmp_path: Path) -> None:
    quiet(tmp_path / "c")
    before = numbers(tmp_path / "c")
    loads.clear()
    loaded.model.calls.clear()
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    compare(stacks(), tmp_path / "c", console=console)
    assert loads == []
    assert loaded.model.calls == []
    assert numbers(tmp_path / "c") == before
    assert "none: finished" in console.export_text()


@pytest.mark.parametrize("keep", [0, 3, 9])
@pytest.mark.parametrize("sampling", [False, True])
def test_a_run_goes_on_with_the_same_batches_and_the_same_answers(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, keep: int, sampling: bool
) -> None:
    runs = stacks(decoding__do_sample=sampling)
    quiet(tmp_path / "c", runs)
    before = numbers(tmp_path / "c")
    answers = [record.answer for record in read_samples(tmp_path / "c" / "turned")]
    sizes = [call["rows"] for call in loaded.model.calls[8:]]
    loaded.model.calls.clear()
    forget(tmp_path / "c" / "turned", keep)
    quiet(tmp_path / "c", runs)
    assert numbers(tmp_path / "c") == before
    assert [record.answer for record in read_samples(tmp_path / "c" / "turned")] == answers
    if keep == 9:  # two caption batches and three of the first four questions are done: five question batches are left
        assert [call["rows"] for call in loaded.model.calls] == [4, *sizes[3:]]


def test_a_killed_comparison_ends_with_the_numbers_of_an_undisturbed_one(loads: list[str], tmp_path: Path) -> None:
    command = [sys.executable, fake_world.__file__, str(tmp_path / "killed"), "0.15"]
    child = subprocess.Popen(command, env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"})
    second = tmp_path / "killed" / "turned" / "samples.rank0.jsonl"
    deadline = time.monotonic() + 60
    while not (second.exists() and second.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed" / "comparison.json").exists()
    recorded = len(read_samples(tmp_path / "killed" / "turned"))
    assert 0 < recorded < 24
    quiet(tmp_path / "killed")
    quiet(tmp_path / "undisturbed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"decoding__max_new_tokens": 9}, "decoding.max_new_tokens was 12, now 9"),
        ({"trainer__batch_size": 2}, "trainer.batch_size was 4, now 2"),
        ({"methods": {"turn": FakeMethod(period=3)}}, "methods.turn.period was 2, now 3"),
    ],
)
def test_a_folder_with_another_run_is_refused_before_anything_runs(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    quiet(tmp_path / "c", [resolved("turned")])
    loaded.model.calls.clear()
    with pytest.raises(ConfigError, match="holds another run") as error:
        quiet(tmp_path / "c", [resolved("first", **changes), resolved("turned", **changes)])
    assert named in str(error.value)
    assert "delete" in str(error.value)
    assert loaded.model.calls == []


def test_the_order_of_methods_is_part_of_a_run(loads: list[str], tmp_path: Path) -> None:
    one, two = FakeMethod(period=2), FakeMethod(period=3)
    quiet(tmp_path / "c", [resolved("both", methods={"a": one, "b": two})])
    with pytest.raises(ConfigError, match="methods was"):
        quiet(tmp_path / "c", [resolved("both", methods={"b": two, "a": one})])


def test_places_and_devices_are_not_part_of_a_run(loads: list[str], loaded: FakeLoaded, tmp_path: Path) -> None:
    quiet(tmp_path / "c")
    loaded.model.calls.clear()
    quiet(tmp_path / "c", stacks(runs_dir="elsewhere", trainer__num_workers=1))
    assert loaded.model.calls == []


def test_a_new_version_of_a_method_is_another_run(
    loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(tmp_path / "c")
    monkeypatch.setattr(FakeMethod, "version", 2)
    with pytest.raises(ConfigError, match='method turn was "1", now "2"'):
        quiet(tmp_path / "c")


def test_changed_data_is_refused(loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mitigate.runner import single

    quiet(tmp_path / "c")
    monkeypatch.setattr(FakeBenchmark, "data_hash", lambda self, pictures: "other")
    single._data_hash.cache_clear()
    with pytest.raises(DataError, match="other data"):
        quiet(tmp_path / "c")
    single._data_hash.cache_clear()


def test_a_failure_is_passed_on_and_leaves_nothing_attached(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path
) -> None:
    loaded.model.fail_at, loaded.model.error = 3, MitigateError("broken method")
    with pytest.raises(MitigateError, match="broken method"):
        quiet(tmp_path / "c")
    assert loaded.model.attached == 0
    assert RunRecord.read(tmp_path / "c" / "none").status == "failed"
    assert len(read_samples(tmp_path / "c" / "none")) == 6  # two batches of captions
    loaded.model.fail_at = None
    quiet(tmp_path / "c")
    quiet(tmp_path / "undisturbed")
    assert numbers(tmp_path / "c") == numbers(tmp_path / "undisturbed")


def test_ctrl_c_detaches_says_how_to_go_on_and_is_passed_on(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded.model.fail_at, loaded.model.error = 3, KeyboardInterrupt()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        compare(stacks(), tmp_path / "c", console=Console(width=200))
    assert signal.getsignal(signal.SIGINT) is handler
    assert loaded.model.attached == 0
    out = capsys.readouterr().out
    assert "Interrupted" in out
    assert "the same command goes on" in out
    assert RunRecord.read(tmp_path / "c" / "none").status == "running"


def test_a_schedulers_signal_ends_the_run_as_ctrl_c_does(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning notes SIGTERM and goes on; a finished batch is kept, and the run ends before the next one."""
    plain = loaded.model.generate

    def generate(**kwargs: Any) -> Any:
        if len(loaded.model.calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(**kwargs)

    monkeypatch.setattr(loaded.model, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "c")
    assert len(loaded.model.calls) == 3
    assert len(read_samples(tmp_path / "c" / "none")) == 6  # the batch that ran was recorded
    monkeypatch.setattr(loaded.model, "generate", plain)
    quiet(tmp_path / "c")
    quiet(tmp_path / "undisturbed")
    assert numbers(tmp_path / "c") == numbers(tmp_path / "undisturbed")


class Gradient(FakeMethod):
    tags: ClassVar[Tags] = Tags(gradient=True, batch=False)


def test_inference_mode_is_off_and_batches_are_single_where_the_stack_asks_for_it(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path
) -> None:
    quiet(tmp_path / "c", [resolved(), resolved("g", methods={"turn": Gradient()})])
    none, single = loaded.model.calls[:8], loaded.model.calls[8:]
    assert {call["inference"] for call in none} == {True}
    assert {(call["inference"], call["rows"]) for call in single} == {(False, 1)}


def test_a_method_that_did_nothing_is_flagged(
    loads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [resolved(), resolved("idle", methods={"turn": FakeMethod(period=0)})]
    made = compare(runs, tmp_path / "c", console=Console(width=160))
    assert made is not None
    assert made.data["stacks"]["idle"]["effects"]["idle"] == ["turn"]
    out = capsys.readouterr().out
    assert "! idle: turn did nothing" in out
    assert "every reply is the same as with none" in out
    assert "not evidence about large models" in out
    assert "did nothing" in (tmp_path / "c" / "report.html").read_text()


def test_stacks_that_cannot_be_compared_are_refused(loads: list[str], tmp_path: Path) -> None:
    for runs, message in (
        ([], "nothing to compare"),
        ([resolved(), resolved()], "listed twice"),
        ([resolved(), resolved("turned", images=5)], "differ in benchmark or seed"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(runs, tmp_path / "c", console=Console(quiet=True))
    assert not (tmp_path / "c").exists()


def test_a_geometry_that_is_not_the_models_is_refused(loads: list[str], loaded: FakeLoaded, tmp_path: Path) -> None:
    loaded.facts = ModelFacts(family="fake", layers=9, heads=2, kv_heads=2)
    with pytest.raises(ConfigError, match=r"model\.layers=4 is configured, but the loaded model has 9"):
        quiet(tmp_path / "c")


def test_without_a_baseline_there_are_no_differences(loads: list[str], tmp_path: Path) -> None:
    data = quiet(tmp_path / "c", [resolved("turned")])
    assert data["baseline"] is None
    assert data["stacks"]["turned"]["differences"] == {}


class Memory(Tracker):
    name = "memory"

    def __init__(self, fail: bool = False) -> None:
        super().__init__({}, Path())
        self.runs: list[dict[str, Any]] = []
        self.fail = fail

    def start(self, run: Any) -> None:
        self.runs.append({"run": run})

    def log(self, metrics: Any) -> None:
        if self.fail:
            raise OSError("no route to host")
        self.runs[-1]["metrics"] = dict(metrics)

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self.runs[-1][name] = (list(columns), [list(row) for row in rows])

    def finish(self, *, failed: bool = False) -> str | None:
        self.runs[-1]["failed"] = failed
        return f"runs/{len(self.runs)}"


def test_every_stack_is_tracked_once_in_one_group(loads: list[str], tmp_path: Path) -> None:
    tracker = Memory()
    quiet(tmp_path / "c", tracker=tracker)
    assert [(item["run"].name, item["run"].group) for item in tracker.runs] == [("none", "c"), ("turned", "c")]
    metrics = tracker.runs[1]["metrics"]
    for name in ("chair_i", "chair_i/low", "pope/mean/f1/high", "difference/chair_i", "cost/ms_per_token"):
        assert isinstance(metrics[name], float)
    assert metrics["telemetry/turn/rows_edited"] == 4.0 * 24
    header, rows = tracker.runs[1]["samples"]
    assert header[0] == "picture"
    assert len(rows) > 6
    quiet(tmp_path / "c", tracker=tracker)
    assert len(tracker.runs) == 2


def test_a_tracker_that_fails_loses_no_results(
    loads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Memory(fail=True)
    compare(stacks(), tmp_path / "c", console=Console(width=200), tracker=tracker)
    assert "Tracking with memory failed at stack none (OSError: no route to host)" in capsys.readouterr().out
    assert tracker.runs[0]["failed"] is True
    assert numbers(tmp_path / "c")["stacks"]["turned"]["metrics"]
    tracker.fail = False
    quiet(tmp_path / "c", tracker=tracker)
    assert len(tracker.runs) == 3  # the failed one, then both


def test_a_stack_that_is_tracked_again_is_the_same_run(loads: list[str], tmp_path: Path) -> None:
    tracker = Memory()
    quiet(tmp_path / "c", tracker=tracker)
    (tmp_path / "c" / "tracked.json").unlink()  # killed before it was remembered
    quiet(tmp_path / "c", tracker=tracker)
    ids = [item["run"].id for item in tracker.runs]
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2
    assert all(name.isalnum() for name in ids)


def test_a_single_run_is_tracked_too(loads: list[str], tmp_path: Path) -> None:
    tracker = Memory()
    record = run(resolved("turned"), tmp_path / "r", console=Console(quiet=True), tracker=tracker)
    assert record.status == "finished"
    assert tracker.runs[0]["metrics"]["chair_i"] == record.metrics["chair_i"].value
