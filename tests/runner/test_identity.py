"""A folder belongs to one run: its settings, its weights, its code, its kind, and one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import mitigate.adapters
from mitigate.errors import ConfigError, DataError
from mitigate.records import RunRecord, read_samples
from mitigate.runner import compare, folder, run
from mitigate.runner.fingerprint import weights_before_loading, weights_of_loaded
from mitigate.runner.folder import claim
from tests.runner.fake_world import FakeLoaded, FakeMethod, install, resolved

QUIET = Console(quiet=True)


@pytest.fixture
def loaded() -> FakeLoaded:
    return FakeLoaded()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, loaded: FakeLoaded) -> list[str]:
    return install(monkeypatch.setattr, loaded)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (made / name).write_text(name)
    return made


def cut(run_dir: Path) -> None:
    """Make a finished run an unfinished one."""
    path = run_dir / "samples.rank0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_weights_are_another_run(
    loads: list[str], checkpoint: Path, tmp_path: Path, name: str, finished: bool
) -> None:
    one = resolved("turned", model__path=str(checkpoint))
    run(one, tmp_path / "r", console=QUIET)
    assert RunRecord.read(tmp_path / "r").weights.startswith("sha256:")
    if not finished:
        cut(tmp_path / "r")
    loads.clear()
    (checkpoint / "README.md").write_text("says the same in other words")
    if finished:
        run(one, tmp_path / "r", console=QUIET)
    (checkpoint / name).write_text("other")
    with pytest.raises(ConfigError, match=r"model fake: its weights or its processor's files have changed\n.*delete"):
        run(one, tmp_path / "r", console=QUIET)
    (tmp_path / "c").mkdir()
    (tmp_path / "r").rename(tmp_path / "c" / "turned")
    with pytest.raises(ConfigError, match="its weights"):
        compare([one], tmp_path / "c", console=QUIET)
    assert loads == []


def test_the_packaged_checkpoint_is_covered_with_everything_that_decides_a_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mitigate.runner import fingerprint

    seen: list[str] = []

    def remember(path: Path, size: int, modified: int) -> str:
        seen.append(path.name)
        return "x"

    monkeypatch.setattr(fingerprint, "_file_hash", remember)
    assert weights_before_loading({"path": "testbed"}).startswith("sha256:")
    for name in ("model.safetensors", "probe.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert name in seen
    assert "README.md" not in seen


def test_a_hub_model_is_known_by_its_commit(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    cached: list[Any] = [None]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: cached[0])
    loaded.model.config = SimpleNamespace(_commit_hash="aaa")
    one = resolved("turned", model__path="maker/model")
    run(one, tmp_path / "r", console=QUIET)
    assert RunRecord.read(tmp_path / "r").weights == "commit:aaa"
    run(one, tmp_path / "r", console=QUIET)  # nothing in the cache: the record counts
    cached[0] = "/cache/snapshots/bbb/config.json"
    with pytest.raises(ConfigError, match="its weights"):
        run(one, tmp_path / "r", console=QUIET)
    cached[0] = None
    cut(tmp_path / "r")
    loaded.model.config = SimpleNamespace(_commit_hash="bbb")
    calls = len(loaded.model.calls)
    with pytest.raises(ConfigError, match="its weights"):
        run(one, tmp_path / "r", console=QUIET)
    assert len(loaded.model.calls) == calls
    loaded.model.config = SimpleNamespace(_commit_hash="aaa")
    run(one, tmp_path / "r", console=QUIET)
    assert len(read_samples(tmp_path / "r")) == 24
    assert weights_of_loaded({"path": "maker/model"}, SimpleNamespace(model=object())) == ""  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Edited(FakeMethod):
    """A method whose source can be another one."""


def test_edited_code_of_a_plugin_is_another_run(
    loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitigate.runner import fingerprint

    source = tmp_path / "plugin.py"
    source.write_text("one")
    original = fingerprint.inspect.getsourcefile
    monkeypatch.setattr(
        fingerprint.inspect, "getsourcefile", lambda plugin: str(source) if plugin is Edited else original(plugin)
    )
    one = resolved("edited", methods={"turn": Edited()})
    run(one, tmp_path / "r", console=QUIET)
    run(one, tmp_path / "r", console=QUIET)
    source.write_text("two")
    with pytest.raises(ConfigError, match=r"method turn: its code has changed\ngive this one its own name .*delete"):
        run(one, tmp_path / "r", console=QUIET)


def test_folders_that_cannot_be_written_are_refused_before_a_model_is_loaded(loads: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (Path("/proc/nope/r"), tmp_path / "file", tmp_path / "file" / "r", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot write to .*runs_dir="):
            run(resolved(), place, console=QUIET)
        with pytest.raises(ConfigError, match=r"cannot write to .*name="):
            compare([resolved()], place, console=QUIET)
    assert loads == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_that_cannot_be_loaded_leaves_no_folder(
    loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, **_: Any) -> None:
        raise DataError("no such model")

    monkeypatch.setattr(mitigate.adapters, "load_model", fail)
    with pytest.raises(DataError, match="no such model"):
        run(resolved(), tmp_path / "runs" / "r", console=QUIET)
    with pytest.raises(DataError, match="no such model"):
        compare([resolved()], tmp_path / "runs" / "c", console=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(
    loads: list[str], loaded: FakeLoaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitigate import jsonfiles

    real, calls = jsonfiles.os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(jsonfiles.os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device\nfinished samples are kept.*the same command"):
            run(resolved(), tmp_path / "r", console=QUIET)
    assert 0 < len(read_samples(tmp_path / "r")) < 24
    run(resolved(), tmp_path / "r", console=QUIET)
    assert len(read_samples(tmp_path / "r")) == 24


def test_two_processes_do_not_work_in_one_folder(loads: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mitigate.runner.folder import claim\n"
        "with claim(Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        for start in (run, lambda one, place, **options: compare([one], place, **options)):
            with pytest.raises(ConfigError, match=r"another process is working in .*name="):
                start(resolved(), tmp_path / "r", console=QUIET)
        assert loads == []
    finally:
        child.kill()
        child.wait()
    run(resolved(), tmp_path / "r", console=QUIET)  # the lock ended with its process
    assert not (tmp_path / "r" / folder.LOCK).exists()


def test_a_loaders_process_that_outlives_a_killed_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from mitigate.runner.folder import claim\n"
        "with claim(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: os.write(1, b'0\\n'); time.sleep(60); os._exit(0)\n"
        "    os.write(1, b'%d\\n' % child); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = max(int(parent.stdout.readline()) for _ in range(2))  # the child has spoken: it has started
    parent.kill()
    parent.wait()
    try:
        with claim(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("gone", ["config.json", "record.json"])
def test_answers_of_nobody_are_not_adopted(loads: list[str], tmp_path: Path, gone: str) -> None:
    run(resolved(), tmp_path / "r", console=QUIET)
    (tmp_path / "r" / gone).unlink()
    with pytest.raises(DataError, match=rf"answers but no {gone}.*delete"):
        run(resolved(), tmp_path / "r", console=QUIET)


def test_runs_and_comparisons_do_not_share_a_folder(loads: list[str], tmp_path: Path) -> None:
    compare([resolved()], tmp_path / "c", console=QUIET)
    run(resolved(), tmp_path / "r", console=QUIET)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"holds a comparison or a sweep; .*name="):
            run(resolved(), tmp_path / "c", console=QUIET)
        (tmp_path / "c" / "comparison.json").unlink(missing_ok=True)  # one that was killed
    with pytest.raises(ConfigError, match=r"holds a single run; .*name="):
        compare([resolved()], tmp_path / "r", console=QUIET)


@pytest.mark.parametrize("name", ["config.json", "record.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', '{"versions": {}, "status": "finished"}'])
def test_damaged_records_name_the_remedy(loads: list[str], tmp_path: Path, name: str, content: str) -> None:
    run(resolved(), tmp_path / "r", console=QUIET)
    (tmp_path / "r" / name).write_text(content)
    with pytest.raises((DataError, ConfigError), match=r"delete .*r"):
        run(resolved(), tmp_path / "r", console=QUIET)


def test_damaged_memory_of_tracking_is_one_line(
    loads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.runner.test_compare import Memory

    tracker = Memory()
    for damage in ("{", "[]", '{"memory None None": 3}'):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / "tracked.json").write_text(damage)
        compare([resolved()], tmp_path / "c", console=Console(width=300), tracker=tracker)
        assert "tracked.json was damaged and is written anew" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "tracked.json").read_text())["memory None None"]
    assert len(tracker.runs) == 3
