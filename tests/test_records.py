"""Records survive crashes, odd characters and odd numbers, and refuse what cannot be right."""

from __future__ import annotations

import enum
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitigate.errors import DataError
from mitigate.jsonfiles import content_hash, number, read_json, to_json, write_json
from mitigate.metrics.base import Interval
from mitigate.records import RecordWriter, RunRecord, SampleRecord, finished_ids, natural_key, read_samples


def record(name: str = "a", **changes: Any) -> SampleRecord:
    made = SampleRecord(id=name, image_id="img", task="caption", prompt="Say.", text="A cup.", tokens=3, finished=True)
    return replace(made, **changes)


def write(run_dir: Path, *records: SampleRecord, rank: int = 0) -> Path:
    with RecordWriter(run_dir, rank) as writer:
        for item in records:
            writer.append(item)
    return writer.path


def no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
any_text = st.text(st.characters(exclude_categories=[]))  # lone surrogates too
records = st.builds(
    SampleRecord,
    id=any_text,
    image_id=any_text,
    task=st.sampled_from(["caption", "yes_no"]),
    prompt=any_text,
    text=any_text,
    tokens=st.integers(0),
    finished=st.booleans(),
    meta=st.dictionaries(st.text(), plain, max_size=4),
    telemetry=st.dictionaries(st.text(), st.dictionaries(st.text(), st.floats(), max_size=3), max_size=3),
    seconds=st.floats(),
    error=st.none() | any_text,
)


def strict_loads(text: str) -> Any:
    """Read JSON without Python's extensions."""

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(records)
def test_a_record_survives_its_line(item: SampleRecord) -> None:
    line = item.to_line()
    assert line.isascii()
    assert len(line.splitlines()) == 1
    strict_loads(line)
    assert repr(SampleRecord.from_line(line)) == repr(item)  # repr: NaN equals itself there


@settings(max_examples=25)
@given(st.lists(records.filter(lambda r: r.error is None), max_size=5, unique_by=lambda r: r.id), st.integers(1, 3))
def test_a_run_survives_its_files(items: list[SampleRecord], ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            write(Path(folder), *items[rank::ranks], rank=rank)
        found = read_samples(Path(folder))
        assert sorted(map(repr, found)) == sorted(map(repr, items))
        assert finished_ids(Path(folder)) == {item.id for item in items}


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1: "a"}, (1, 2), {1, 2}, [math.nan]])
def test_ground_truth_that_would_not_survive_is_refused(bad: Any) -> None:
    with pytest.raises(DataError):
        record(meta={"x": bad}).to_line()


@pytest.mark.parametrize("keep", [1, 20, -2, -1])
def test_a_torn_last_line_is_dropped_and_repaired(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, record("a"), record("b"))
    whole = path.read_bytes()
    last = whole.index(b"\n") + 1
    path.write_bytes(whole[:last] + whole[last:][:keep])
    assert [item.id for item in read_samples(tmp_path)] == ["a"]
    assert finished_ids(tmp_path) == {"a"}
    write(tmp_path, record("b"))
    assert path.read_bytes() == whole


def test_records_written_together_are_lines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", record("a"), record("b")).read_bytes()
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    with RecordWriter(tmp_path / "two") as writer:
        writer.extend([record("a"), record("b")])
        with pytest.raises(DataError):
            writer.extend([record("c"), record("d", meta={"x": math.nan})])
    assert writer.path.read_bytes() == one
    assert len(syncs) == 1


def test_a_torn_first_line_is_repaired_too(tmp_path: Path) -> None:
    path = write(tmp_path, record("a"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert read_samples(tmp_path) == []
    write(tmp_path, record("a"))
    assert path.read_bytes() == whole


def test_every_rank_may_have_a_torn_line(tmp_path: Path) -> None:
    for rank in range(2):
        path = write(tmp_path, record(f"r{rank}"), rank=rank)
        path.write_bytes(path.read_bytes() + b'{"id": "to')
    assert finished_ids(tmp_path) == {"r0", "r1"}


@pytest.mark.parametrize("damage", [b"{}", b"garbage", b"", b"\x00\x00", b"\xff\xfe", b"[1]", b"null"])
def test_other_damage_names_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = write(tmp_path, record("a"), record("b"))
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, second]) + b"\n")
    with pytest.raises(DataError, match=rf"{path.name}:2: "):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1.5}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"finished": 1}, "finished"),
        ({"text": None}, "text"),
        ({"meta": []}, "meta"),
        ({"telemetry": {"a": 1}}, "'a'"),
        ({"telemetry": {"a": {"x": "many"}}}, "many"),
        ({"seconds": True}, "number"),
        ({"error": 3}, "error"),
        ({"extra": 1}, "'extra' is unknown"),
    ],
)
def test_wrong_fields_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleRecord.from_line(json.dumps({**json.loads(record().to_line()), **change}))


def test_a_missing_field_is_refused_by_name() -> None:
    data = json.loads(record().to_line())
    del data["prompt"]
    with pytest.raises(DataError, match="'prompt' is missing"):
        SampleRecord.from_line(json.dumps(data))


def test_copies_made_by_padded_ranks_count_once_but_contradictions_are_refused(tmp_path: Path) -> None:
    write(tmp_path, record("a", seconds=1.0))
    write(tmp_path, record("a", seconds=2.0), rank=1)
    assert read_samples(tmp_path) == [record("a", seconds=1.0)]
    write(tmp_path, record("a", text="Something else."), rank=2)
    with pytest.raises(DataError, match=r"samples\.rank2\.jsonl:1.*'a'.*rank0\.jsonl:1"):
        read_samples(tmp_path)


def test_a_failed_sample_is_not_finished_and_a_later_answer_replaces_it(tmp_path: Path) -> None:
    failed = record("a", text="", error="out of memory")
    write(tmp_path, failed)
    assert read_samples(tmp_path) == [failed]
    assert finished_ids(tmp_path) == set()
    write(tmp_path, record("a"))
    assert read_samples(tmp_path) == [record("a")]
    write(tmp_path, failed, rank=1)
    assert read_samples(tmp_path) == [record("a")]


def test_records_come_in_natural_order_whichever_rank_wrote_them(tmp_path: Path) -> None:
    write(tmp_path, record("t-10"), record("t-9/b"), rank=10)
    write(tmp_path, record("t-9/a"), record("t-1"), rank=2)
    assert [item.id for item in read_samples(tmp_path)] == ["t-1", "t-9/a", "t-9/b", "t-10"]
    assert natural_key("a2") < natural_key("a10")
    assert read_samples(tmp_path / "nowhere") == []


def test_other_files_are_not_samples(tmp_path: Path) -> None:
    write(tmp_path, record("a"))
    (tmp_path / "samples.rank0.jsonl.bak").write_text("garbage\n")
    assert finished_ids(tmp_path) == {"a"}


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path)
    writer.append(record("a"))
    before = writer.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DataError, match="No space left on device\nfinished samples are kept"):
            writer.append(record("b"))
    assert writer.path.read_bytes() == before
    writer.append(record("c"))
    writer.close()
    assert [item.id for item in read_samples(tmp_path)] == ["a", "c"]


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from mitigate.records import RecordWriter, SampleRecord\n"
        "values = dict(id='a', image_id='i', task='caption', prompt='', text='t', tokens=1, finished=True)\n"
        "writer = RecordWriter(Path(sys.argv[1]))\n"
        "writer.append(SampleRecord(**values))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 9, -1))\n"
        "writer.append(SampleRecord(**values))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "File too large\nfinished samples are kept" in done.stderr
    assert (tmp_path / "samples.rank0.jsonl").read_bytes().endswith(b"}\n")
    assert len(read_samples(tmp_path)) == 1


def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from mitigate.records import RecordWriter, SampleRecord\n"
        "writer = RecordWriter(Path(sys.argv[1]))\n"
        "values = dict(id='a', image_id='i', task='caption', prompt='', text='é', tokens=1, finished=True)\n"
        "writer.append(SampleRecord(**values))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert [item.text for item in read_samples(tmp_path)] == ["é"]


class Colour(enum.Enum):
    RED = (1, 2)


def test_numbers_json_cannot_hold() -> None:
    assert to_json({"a": [math.nan, math.inf, -math.inf, 1.5, (True, None)]}) == {
        "a": [None, "inf", "-inf", 1.5, [True, None]]
    }
    assert to_json({"a": Colour.RED}) == {"a": [1, 2]}
    assert math.isnan(number(None))
    assert (number("inf"), number("-inf"), number(3)) == (math.inf, -math.inf, 3.0)
    for bad in ("nan", True, [], "3"):
        with pytest.raises(DataError):
            number(bad)
    with pytest.raises(DataError, match="set"):
        to_json({"a": {1}})
    with pytest.raises(DataError, match="key 1"):
        to_json({1: "a"})


def test_json_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": math.nan})
    strict_loads(path.read_text())
    with pytest.raises(DataError):
        write_json(path, {"a": object()})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DataError, match="No space left"):
            write_json(path, {"a": 1})
    assert read_json(path) == {"a": None}
    assert [item.name for item in path.parent.iterdir()] == ["x.json"]
    path.write_text("{")
    with pytest.raises(DataError, match=r"x\.json"):
        read_json(path)
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "none.json")


run_records = st.builds(
    RunRecord,
    status=st.sampled_from(["running", "finished", "failed"]),
    stack=st.text(),
    samples=st.integers(0),
    config=st.dictionaries(st.text(), plain, max_size=3),
    provenance=st.dictionaries(st.text(), st.text(), max_size=3),
    metrics=st.dictionaries(st.text(), st.builds(Interval, st.floats(), st.floats(), st.floats(), st.floats())),
    cost=st.dictionaries(st.text(), st.floats(), max_size=3),
    telemetry=st.dictionaries(st.text(), st.dictionaries(st.text(), st.floats(), max_size=2), max_size=2),
    versions=st.dictionaries(st.text(), st.text(), max_size=2),
    git=st.just({"sha": None, "dirty": None}) | st.just({"sha": "0f", "dirty": True}),
    data_hash=st.text(),
)


@settings(max_examples=30)
@given(run_records)
def test_a_run_record_survives_its_files(made: RunRecord) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder))
        for name in ("config.json", "record.json"):
            strict_loads((Path(folder) / name).read_text())
        assert repr(RunRecord.read(Path(folder))) == repr(made)


def test_a_run_record_of_another_shape_is_refused(tmp_path: Path) -> None:
    RunRecord(status="finished", stack="none").write(tmp_path)
    data = read_json(tmp_path / "record.json")
    write_json(tmp_path / "record.json", {**data, "surprise": 1})
    with pytest.raises(DataError, match=r"record\.json.*surprise"):
        RunRecord.read(tmp_path)
    write_json(tmp_path / "record.json", {"status": "finished"})
    with pytest.raises(DataError, match=r"record\.json"):
        RunRecord.read(tmp_path)


def test_hashes_depend_on_content_and_its_boundaries() -> None:
    assert content_hash([{"a": 1, "b": 2}]) == content_hash([{"b": 2, "a": 1}])
    assert len({content_hash(parts) for parts in ([b"ab"], [b"a", b"b"], [b"", b"ab"], ["ab"], [])}) == 5


def test_importing_the_evaluation_loads_no_heavy_library() -> None:
    script = (
        "import sys, mitigate.records, mitigate.statistics, mitigate.effects, mitigate.benchmarks.testbed\n"
        "mitigate.benchmarks.testbed.Testbed(limit=1).samples()\n"
        "heavy = {'torch', 'transformers', 'pytorch_lightning', 'wandb', 'scipy.stats', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
