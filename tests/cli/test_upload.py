"""``mitigate upload``: what is logged, what is not logged twice, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

from mitigate.cli import main
from mitigate.registry import benchmarks, trackers
from mitigate.runner import compare, run
from mitigate.runner.folder import claim
from mitigate.trackers.base import TrackedRun, Tracker
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, install, resolved

QUIET = Console(quiet=True)


class Kept(Tracker):
    """Keeps what it is given; fails once where it is told to."""

    name: ClassVar[str] = "kept"
    runs: ClassVar[list[dict[str, Any]]] = []
    failure: ClassVar[dict[str, BaseException]] = {}

    def start(self, run: TrackedRun) -> None:
        self.runs.append({"run": run, "artifacts": {}, "config": dict(self.config), "closed": None})

    def log(self, metrics: Any) -> None:
        self.runs[-1]["metrics"] = dict(metrics)

    def table(self, name: str, columns: Any, rows: Any) -> None:
        if error := self.failure.pop(self.runs[-1]["run"].name, None):
            raise error
        self.runs[-1][name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def artifact(self, name: str, kind: str, files: Any) -> None:
        self.runs[-1]["artifacts"][kind] = {inside: path.read_bytes() for inside, path in files.items()}

    def finish(self, *, failed: bool = False) -> str | None:
        self.runs[-1]["closed"] = "failed" if failed else "finished"
        return f"kept/{len(self.runs)}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A comparison, the same stack with another seed, a single run and one that was interrupted."""
    folder = tmp_path_factory.mktemp("made")
    benchmarks().register("fake", FakeBenchmark)
    trackers().register("kept", Kept)
    with pytest.MonkeyPatch.context() as patch:
        install(patch.setattr, FakeLoaded())
        for seed in (0, 1):
            pair = [resolved(stack, seed=seed, decoding__do_sample=True) for stack in ("none", "turned")]
            compare(pair, folder / f"seed-{seed}", console=QUIET)
        run(resolved("turned"), folder / "single", console=QUIET)
    shutil.copytree(folder / "single", folder / "broken-off")
    record = json.loads((folder / "broken-off" / "record.json").read_text())
    (folder / "broken-off" / "record.json").write_text(json.dumps({**record, "status": "running"}))
    yield folder
    benchmarks().unregister("fake")
    trackers().unregister("kept")


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Kept, "runs", [])
    monkeypatch.setattr(Kept, "failure", {})
    return Path(shutil.copytree(made, tmp_path / "runs"))


def upload(*arguments: str | Path) -> int:
    return main(["upload", *map(str, arguments), "tracker.name=kept"])


def names() -> list[tuple[str, str]]:
    return [(item["run"].group, item["run"].name) for item in Kept.runs]


def test_a_comparison_is_one_run_per_stack_with_the_numbers_that_were_written(runs: Path) -> None:
    reports = ("report.md", "report.csv", "report.tex")
    for name in (*reports, "none/judgements.jsonl"):
        (runs / "seed-0" / name).write_text(name)
    assert upload(runs / "seed-0", "tracker.project=paper", "tracker.tags=[a]") == 0
    assert names() == [("seed-0", "none"), ("seed-0", "turned")]
    data = json.loads((runs / "seed-0" / "comparison.json").read_text())
    turned = Kept.runs[1]
    assert turned["metrics"]["chair_i"] == data["stacks"]["turned"]["metrics"]["chair_i"]["value"]
    assert turned["metrics"]["difference/chair_i/low"] == data["stacks"]["turned"]["differences"]["chair_i"]["low"]
    assert (turned["config"]["project"], turned["config"]["tags"]) == ("paper", ["a"])
    assert set(turned["artifacts"]) == {"records"}
    report = Kept.runs[0]["artifacts"]["report"]
    assert set(report) == {"comparison.json", "report.html", *reports}
    assert report["comparison.json"] == (runs / "seed-0/comparison.json").read_bytes()
    assert Kept.runs[0]["artifacts"]["records"]["judgements.jsonl"] == b"none/judgements.jsonl"


def test_nothing_is_logged_twice_unless_it_is_forced_and_then_as_the_same_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upload(runs / "seed-0") == upload(runs / "seed-0") == 0
    assert len(Kept.runs) == 2
    assert "nothing new" in capsys.readouterr().out
    assert upload(runs / "seed-0", "tracker.project=other") == 0  # another place
    assert upload(runs / "seed-0", "--force") == 0
    ids = [item["run"].id for item in Kept.runs]
    assert ids[:2] == ids[4:]
    assert len(set(ids)) == 4


def test_a_stack_of_a_comparison_is_logged_as_such(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upload(runs / "seed-0" / "turned") == 0
    assert names() == [("seed-0", "turned")]
    assert "difference/chair_i" in Kept.runs[0]["metrics"]
    monkeypatch.chdir(runs / "seed-0" / "turned")
    assert upload(".") == 0
    assert len(Kept.runs) == 1
    assert upload(runs / "seed-0") == 0
    assert names()[1:] == [("seed-0", "none")]


def test_single_runs_and_folders_of_runs(runs: Path) -> None:
    assert upload(runs / "single") == 0
    assert names() == [("single", "turned")]
    recorded = json.loads((runs / "single" / "record.json").read_text())["metrics"]["chair_i"]["value"]
    assert Kept.runs[0]["metrics"]["chair_i"] == recorded
    assert set(Kept.runs[0]["artifacts"]["records"]) == {"config.json", "record.json", "samples.rank0.jsonl"}
    (runs / "sweep").mkdir()
    (runs / "single").rename(runs / "sweep" / "one")
    assert upload(runs / "sweep") == 0
    assert names()[1:] == [("one", "turned")]


def test_runs_of_several_seeds_become_one_run_per_stack(runs: Path) -> None:
    assert upload(runs / "seed-0", runs / "seed-1", "--group", "both") == 0
    assert names() == [("both", "none"), ("both", "turned")]
    turned = Kept.runs[1]
    assert turned["run"].config["seeds"] == [0, 1]
    assert set(turned["artifacts"]["records"]) == {
        f"seed-{seed}/{name}" for seed in (0, 1) for name in ("config.json", "record.json", "samples.rank0.jsonl")
    }
    data = json.loads((runs / "both" / "comparison.json").read_text())
    assert turned["metrics"]["difference/chair_i"] == data["stacks"]["turned"]["differences"]["chair_i"]["value"]
    assert set(Kept.runs[0]["artifacts"]["report"]) == {"comparison.json", "report.html"}
    assert upload(runs / "seed-0", runs / "seed-1", "--group", "both") == 0
    assert len(Kept.runs) == 2


def test_an_interrupted_upload_goes_on(runs: Path) -> None:
    Kept.failure["turned"] = KeyboardInterrupt()
    assert upload(runs / "seed-0") == 130
    assert [item["closed"] for item in Kept.runs] == ["finished", "failed"]
    assert upload(runs / "seed-0") == 0
    assert names()[2:] == [("seed-0", "turned")]
    assert Kept.runs[1]["run"].id == Kept.runs[2]["run"].id


def test_a_failed_upload_says_so_and_goes_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Kept.failure["turned"] = OSError("no route to host")
    assert upload(runs / "seed-0") == 1
    assert "failed at stack turned (OSError: no route to host)" in capsys.readouterr().out
    assert upload(runs / "seed-0") == 0
    assert names()[2:] == [("seed-0", "turned")]


def test_a_comparison_that_is_not_of_these_runs_is_made_anew(runs: Path) -> None:
    path = runs / "seed-0" / "comparison.json"
    data = json.loads(path.read_text())
    data["stacks"]["turned"]["record"]["created_at"] = "long ago"
    data["stacks"]["turned"]["metrics"]["chair_i"]["value"] = 0.123
    path.write_text(json.dumps(data))
    assert upload(runs / "seed-0") == 0
    assert Kept.runs[1]["metrics"]["chair_i"] != 0.123


def test_runs_of_one_second_are_told_apart(made: Path) -> None:
    folders = [path for path in made.rglob("record.json") if path.parent.name != "broken-off"]
    assert len({json.loads(path.read_text())["created_at"] for path in folders}) == len(folders) == 5


def test_what_lies_together_but_cannot_be_compared_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "seed-0" / "turned")
    shutil.copytree(runs / "single", runs / "seed-0" / "turned")
    assert upload(runs / "seed-0") == 2
    assert re.search(r"cannot be compared.*decoding\.do_sample", capsys.readouterr().err)
    assert Kept.runs == []


def test_a_folder_that_cannot_be_had_is_left_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claim(runs / "single"):
        assert upload(runs / "single") == 2
    assert capsys.readouterr().err.endswith("single; wait for it\n")  # another name is no remedy here
    (runs / "single" / ".lock").mkdir()
    assert upload(runs / "single") == 2
    assert capsys.readouterr().err.endswith("Is a directory; copy it to where you may write\n")
    assert Kept.runs == []


def test_pictures_that_are_not_here_are_left_out_and_counted(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(self: Any, sample: Any) -> Any:
        raise FileNotFoundError(sample.image_id)

    monkeypatch.setattr(FakeBenchmark, "images", gone)
    assert upload(runs / "seed-0") == 0
    assert "6 pictures could not be opened here" in capsys.readouterr().out
    assert {row["picture"] for row in Kept.runs[1]["samples"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "holds no run"),
        (["broken-off"], r"not finished \(running\)"),
        (["single", "--forse"], "no option '--forse'; did you mean '--force'"),
        (["single", "project=x"], "takes folders and tracker.KEY=VALUE; project=x is neither"),
        (["single", "tracker.projekt=x"], "did you mean 'project'"),
        (["single", "tracker.tags=x"], "tracker.tags=x: this value cannot be read"),
        (["single", "tracker.project"], "must be tracker.KEY=VALUE"),
        (["single", "tracker.project=a,b"], "with one value"),
        (["single", "tracker.name=kep"], "did you mean 'kept'"),
        (["single", "tracker.name=none"], "logs nowhere"),
        (["single", "tracker.name=wandb", "tracker.mode=on"], "tracker.mode='on' must be one of"),
        (["seed-0", "single", "--group", "g"], r"cannot be compared.*decoding\.do_sample"),
        (["seed-0", "--group", "a/b"], "plain name"),
        (["seed-0", "--group", "seed-1"], "holds runs already"),
        ([], "needs the folder of a run"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_in_one_line(
    runs: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (runs / "empty").mkdir()
    monkeypatch.chdir(runs if arguments[:1] != ["."] else runs / "empty")
    named = any(argument.startswith("tracker.name") for argument in arguments)
    assert main(["upload", *arguments, *([] if named else ["tracker.name=kept"])]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) <= 2
    assert re.search(message, error), error
    assert Kept.runs == []


def test_nobody_is_logged_in(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from wandb.sdk import wandb_setup

    monkeypatch.setenv("NETRC", os.devnull)
    settings = SimpleNamespace(mode="online", api_key=None, identity_token_file=None, base_url="https://w.example")
    monkeypatch.setattr(wandb_setup, "singleton", lambda: SimpleNamespace(settings=settings))
    path = runs / "single" / "config.json"
    record = json.loads(path.read_text())
    record["config"]["tracker"] |= {"name": "wandb", "mode": "offline"}  # how it ran says nothing about now
    path.write_text(json.dumps(record))
    for mode in (["tracker.mode=online"], []):
        assert main(["upload", str(runs / "single"), *mode]) == 2
        assert "wandb login" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", "--help"]) == 0
    assert "tracker.mode=MODE" in capsys.readouterr().out
    assert main(["upload"]) == 2
