from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mitigate.errors import ConfigError, DataError
from mitigate.registry import trackers
from mitigate.trackers import BUILTIN, wandb, wandb_file
from mitigate.trackers.base import TrackedRun, Tracker
from tests.trackers.reading import read_back, read_run

OFFLINE = {"name": "wandb", "mode": "offline", "project": "test", "entity": None, "tags": ["a"]}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = trackers().get("wandb")({**OFFLINE, "entity": "team"}, tmp_path)
    config = {"seed": 3, "methods": {}}
    tracker.start(TrackedRun(name="first", group="comparison", config=config, notes="a test bench", tags=("b",)))
    tracker.log({"pope/random/f1": 0.5, "pope/random/f1/low": 0.25})
    tracker.table("samples", ["picture", "reply"], [[Image.new("RGB", (8, 8)), "a <cat>"]])
    (tmp_path / "note.json").write_text("{}")
    tracker.artifact("notes", "records", {"seed-3/here.json": tmp_path / "note.json"})
    place = tracker.finish()
    assert place is not None
    return Path(place)


def test_an_offline_run_holds_group_config_summary_and_samples(offline: Path, tmp_path: Path) -> None:
    assert offline.parent == tmp_path / "wandb"
    assert offline.name.startswith("offline-run-")
    records = read_back(offline)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.display_name, run.project) == ("comparison", "first", "test")
    assert (run.entity, run.notes, list(run.tags)) == ("team", "a test bench", ["a", "b"])
    assert list(read_run(offline).artifact("records")) == ["seed-3/here.json"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 3
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["pope/random/f1"] == 0.5
    assert summary["pope/random/f1/low"] == 0.25
    (table,) = (offline / "files" / "media" / "table").iterdir()
    assert json.loads(table.read_text())["data"][0][1] == "a <cat>"
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]


def test_pictures_are_staged_beside_the_offline_run(offline: Path, tmp_path: Path) -> None:
    staged = [
        path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"
    ]
    assert staged


def test_nothing_about_the_machine_is_collected(offline: Path) -> None:
    assert not (offline / "files" / "wandb-metadata.json").exists()
    assert not (offline / "files" / "requirements.txt").exists()
    assert not any(record.WhichOneof("record_type") == "stats" for record in read_back(offline))


def test_a_wrong_mode_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracker.mode='of' must be one of offline"):
        trackers().get("wandb")({**OFFLINE, "mode": "of"}, tmp_path)


def test_a_failed_run_is_closed_as_failed(tmp_path: Path) -> None:
    tracker = trackers().get("wandb")(OFFLINE, tmp_path)
    assert tracker.finish() is None  # never started
    tracker.start(TrackedRun(name="first", group="comparison", config={}))
    place = tracker.finish(failed=True)
    exits = [r.exit.exit_code for r in read_back(Path(place)) if r.WhichOneof("record_type") == "exit"]
    assert exits == [1]


def test_an_offline_run_that_was_not_written_whole_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    seen: list[Path] = []
    monkeypatch.setattr(wandb, "is_whole", lambda folder: seen.append(folder))
    tracker = trackers().get("wandb")(OFFLINE, tmp_path)
    tracker.start(TrackedRun(name="first", group="comparison", config={}))
    with pytest.raises(DataError, match=r"could not write all of .*is the disk full"):
        tracker.finish()
    assert seen == list((tmp_path / "wandb").glob("offline-run-*"))


def test_records_are_read_across_blocks_and_padding() -> None:
    block, log = 32768, b":W&B\xe1\xbe\x01"
    # ends 3 bytes before the block does: too few for a header, so they are filled
    first = b"a" * (block - len(log) - 7 - 3)
    log += struct.pack("<IHB", 0, len(first), 1) + first + b"\0" * 3
    # over three blocks: its first, middle and last piece
    pieces = [b"b" * (block - 7), b"c" * (block - 7), b"d" * 9]
    log += b"".join(
        struct.pack("<IHB", 0, len(piece), kind) + piece for kind, piece in zip((2, 3, 4), pieces, strict=True)
    )
    log += struct.pack("<IHB", 0, 1, 1) + b"e"
    assert list(wandb_file.records(log)) == [first, b"".join(pieces), b"e"]
    assert list(wandb_file.records(log[:-1])) == [first, b"".join(pieces)]
    assert list(wandb_file.records(b"????" + log[4:])) == []


def test_the_none_tracker_imports_no_wandb() -> None:
    code = (
        "import sys; from pathlib import Path; from mitigate.registry import trackers\n"
        "from mitigate.trackers.base import TrackedRun\n"
        "import mitigate.runner.comparison\n"
        "tracker = trackers().get('none')({'name': 'none'}, Path('.'))\n"
        "tracker.start(TrackedRun(name='a', group='b', config={}))\n"
        "tracker.log({'a': 1.0}); tracker.table('t', [], [])\n"
        "assert tracker.finish() is None\n"
        "heavy = {'wandb', 'torch', 'transformers', 'pytorch_lightning'}\n"
        "loaded = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nobody has logged in; returns where W&B would look for passwords."""
    from wandb.sdk import wandb_setup

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    settings = SimpleNamespace(
        mode="online", api_key=None, identity_token_file=None, base_url="https://api.wandb.example"
    )
    monkeypatch.setattr(wandb_setup, "singleton", lambda: SimpleNamespace(settings=settings))
    return tmp_path / "netrc"


@pytest.mark.parametrize("mode", [None, "online"])
def test_online_runs_without_a_login_are_refused_before_anything_runs(
    nobody: Path, tmp_path: Path, mode: str | None
) -> None:
    make = trackers().get("wandb")
    with pytest.raises(ConfigError, match=r"(?s)`wandb login`.*tracker=offline"):
        make({**OFFLINE, "mode": mode}, tmp_path)
    nobody.write_text("machine other.example login user password secret")
    nobody.chmod(0o600)
    with pytest.raises(ConfigError, match="wandb login"):
        make({**OFFLINE, "mode": mode}, tmp_path)
    nobody.write_text("machine api.wandb.example login user password secret")
    make({**OFFLINE, "mode": mode}, tmp_path)


def test_a_key_or_the_users_own_offline_mode_is_as_good_as_a_login(
    nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk import wandb_setup

    settings: Any = wandb_setup.singleton().settings
    monkeypatch.setattr(settings, "api_key", "k")
    trackers().get("wandb")({**OFFLINE, "mode": None}, tmp_path)
    monkeypatch.setattr(settings, "api_key", None)
    monkeypatch.setattr(settings, "mode", "offline")
    trackers().get("wandb")({**OFFLINE, "mode": None}, tmp_path)


def test_tracking_again_after_a_kill_leaves_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    killed = tmp_path / "wandb" / "offline-run-20260101_000000-ab12cd34"
    other = tmp_path / "wandb" / "offline-run-20260101_000000-ffff0000"
    for folder in (killed, other):
        folder.mkdir(parents=True)
        (folder / "run.wandb").write_bytes(b":W&B")  # torn
    tracker = trackers().get("wandb")(OFFLINE, tmp_path)
    tracker.start(TrackedRun(id="ab12cd34", name="first", group="comparison", config={}))
    place = tracker.finish()
    assert place is not None
    left = {path.name for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert left == {other.name, Path(place).name}
    assert place.endswith("-ab12cd34")
    assert place != str(killed)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_trackers_carry_their_registered_name(name: str) -> None:
    plugin = trackers().get(name)
    assert issubclass(plugin, Tracker)
    assert plugin.name == name
    assert plugin.summary


def test_the_base_class_says_what_is_missing(tmp_path: Path) -> None:
    tracker = Tracker({}, tmp_path)
    for call in (
        lambda: tracker.start(TrackedRun(name="a", group="b", config={})),
        lambda: tracker.log({}),
        lambda: tracker.table("t", [], []),
        tracker.finish,
    ):
        with pytest.raises(NotImplementedError, match="Tracker does not define"):
            call()


def test_photographs_are_shrunk_and_one_picture_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker, photograph = trackers().get("wandb")(OFFLINE, tmp_path), Image.new("RGB", (1024, 600))
    tracker.start(TrackedRun(id="ab12", name="first", group="comparison", config={}))
    tracker.table("samples", ["picture"], [[photograph], [photograph]])
    files = read_run(Path(tracker.finish())).artifact("run_table")
    (stored,) = [path for name, path in files.items() if name.endswith(".jpg")]
    with Image.open(stored) as picture:
        assert picture.size == (512, 300)
