"""A sample that fails: the run stops, or records the failure, goes on, and counts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mitigate.errors import ConfigError, DataError
from mitigate.records import RunRecord, read_samples
from mitigate.runner import compare, run, single
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, FakeModel, install, resolved

QUIET = Console(quiet=True)


class Fails(FakeLoaded):
    """Fails on the questions it is told to fail on."""

    def __init__(self, *prompts: str, error: Exception | None = None) -> None:
        super().__init__()
        self.prompts, self.error = prompts, error or RuntimeError("no such thing")

    def inputs(self, prompts: list[str], images: Any) -> Any:
        if set(self.prompts).intersection(prompts):
            raise self.error
        return super().inputs(prompts, images)


def failed(folder: Path) -> dict[str, str]:
    return {record.id: record.error for record in read_samples(folder) if record.error is not None}


def asked(prompt: str) -> set[str]:
    return {sample.id for sample in FakeBenchmark().samples() if sample.prompt == prompt}


def test_a_failure_stops_the_run_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr, Fails("Is there a cup?"))
    with pytest.raises(RuntimeError, match="no such thing"):
        run(resolved(), tmp_path / "r", console=QUIET)
    assert failed(tmp_path / "r") == {}
    assert RunRecord.read(tmp_path / "r").status == "failed"


def test_a_skipped_failure_is_recorded_and_the_others_of_its_batch_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch.setattr, Fails("Is there a cup?"))
    record = run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)
    culprits = asked("Is there a cup?")
    assert set(failed(tmp_path / "r")) == culprits
    assert all(reason.startswith("RuntimeError: no such thing") for reason in failed(tmp_path / "r").values())
    assert (record.status, record.samples, record.failures) == ("finished", 24, len(culprits))
    assert 0 < len(culprits) < 18
    install(monkeypatch.setattr, FakeLoaded())
    run(resolved(), tmp_path / "good", console=QUIET)
    good = {record.id: record.answer for record in read_samples(tmp_path / "good")}
    answered = {record.id: record.answer for record in read_samples(tmp_path / "r") if record.error is None}
    assert answered == {key: answer for key, answer in good.items() if key not in culprits}


def test_the_same_command_tries_failed_samples_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr, Fails("Is there a cup?"))
    run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)
    mended = FakeLoaded()
    install(monkeypatch.setattr, mended)
    record = run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)
    assert record.failures == 0
    assert failed(tmp_path / "r") == {}
    run(resolved(), tmp_path / "good", console=QUIET)
    good, again = ([one.answer for one in read_samples(tmp_path / name)] for name in ("good", "r"))
    assert again == good


def test_a_picture_that_cannot_be_read_is_a_failure_of_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch.setattr, FakeLoaded())
    drawn = FakeBenchmark.images

    def images(self: FakeBenchmark, sample: Any) -> Any:
        if sample.image_id == "img-2":
            raise ValueError("img-2.jpg is broken")
        return drawn(self, sample)

    compare([resolved()], tmp_path / "good", console=QUIET)
    forget()
    monkeypatch.setattr(FakeBenchmark, "images", images)
    with pytest.raises(ValueError, match=r"img-2\.jpg is broken"):
        run(resolved(), tmp_path / "stopped", console=QUIET)
    assert read_samples(tmp_path / "stopped") == []  # it is known before anything is answered
    with pytest.raises(DataError, match="'img-2' cannot be read any more"):
        run(resolved(on_error="skip"), tmp_path / "good" / "none", console=QUIET)
    runs = [resolved(on_error="skip", trainer__num_workers=workers) for workers in (0, 2)]
    assert compare(runs[:1], tmp_path / "c", console=QUIET) is not None  # with a report
    record = run(runs[1], tmp_path / "c" / "none", console=QUIET)
    assert (record.failures, record.unreadable) == (4, ["img-2"])
    reasons = failed(tmp_path / "c" / "none")
    assert set(reasons) == {sample.id for sample in FakeBenchmark().samples() if sample.image_id == "img-2"}
    assert all(reason.startswith("ValueError: img-2.jpg is broken") for reason in reasons.values())
    forget()
    monkeypatch.setattr(FakeBenchmark, "images", drawn)  # mended: the same command answers what is missing
    record = run(runs[0], tmp_path / "c" / "none", console=QUIET)
    whole = RunRecord.read(tmp_path / "good" / "none")
    assert (record.failures, record.unreadable, record.data_hash) == (0, [], whole.data_hash)
    assert record.metrics == whole.metrics
    forget()
    monkeypatch.setattr(FakeBenchmark, "images", lambda self, sample: [drawn(self, sample)[0].resize((8, 8))])
    with pytest.raises(DataError, match="other data or pictures"):
        run(runs[0], tmp_path / "c" / "none", console=QUIET)
    forget()


def forget() -> None:
    """Let pictures be read again, as another process would."""
    single._pictures.cache_clear()
    single._data_hash.cache_clear()


def test_what_failed_for_one_stack_is_left_out_of_all_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch.setattr, FakeLoaded())
    stacks = ("none", "turned")
    whole = compare([resolved(stack) for stack in stacks], tmp_path / "whole", console=QUIET)
    replies = FakeModel.generate

    def generate(self: FakeModel, *, input_ids: Any, turn: int = 0, **kwargs: Any) -> Any:
        if turn and 60 in input_ids[:, 1]:  # the method cannot cope with the red of img-2
            raise RuntimeError("too red")
        return replies(self, input_ids=input_ids, turn=turn, **kwargs)

    monkeypatch.setattr(FakeModel, "generate", generate)
    runs = [resolved(stack, on_error="skip", trainer__batch_size=8) for stack in stacks]
    made = compare(runs, tmp_path / "c", console=QUIET)
    assert whole is not None
    assert made is not None
    data: Mapping[str, Any] = made.data
    failures = {stack: data["stacks"][stack]["failures"] for stack in stacks}
    assert failures == {"none": 0, "turned": 4}
    assert data["left_out"] == sorted(sample.id for sample in FakeBenchmark().samples() if "img-2/" in sample.id)
    assert data["n_images"] == whole.data["n_images"] - 1
    assert data["n_samples"] == whole.data["n_samples"] - 4
    assert any("left out" in note for note in data["notes"])
    for stack in stacks:
        noted = any("failed" in note for note in data["stacks"][stack]["notes"])
        assert noted == bool(failures[stack])


@pytest.mark.parametrize("error", [ConfigError("methods.turn.period=0 must be more"), KeyboardInterrupt()])
def test_what_is_no_samples_fault_is_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    install(monkeypatch.setattr, Fails("Describe.", error=error))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)


def test_a_run_in_which_everything_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {sample.prompt for sample in FakeBenchmark().samples()}
    install(monkeypatch.setattr, Fails(*prompts))
    with pytest.raises(DataError, match=r"all 24 samples failed; the first one, .*: RuntimeError: no such thing"):
        run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)


def test_a_full_disk_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr, FakeLoaded())

    def full(*_: Any) -> None:
        raise DataError("cannot write: no space left on device")

    monkeypatch.setattr("mitigate.records.RecordWriter.extend", full)
    with pytest.raises(DataError, match="no space left"):
        run(resolved(on_error="skip"), tmp_path / "r", console=QUIET)


def test_where_answers_count_in_groups_the_group_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBenchmark, "grouped", True)
    culprits = asked("Is there a tree?")
    groups = {key.split("/")[0] for key in culprits}
    install(monkeypatch.setattr, Fails("Is there a tree?"))
    made = compare([resolved(on_error="skip")], tmp_path / "c", console=QUIET)
    assert made is not None
    assert 0 < len(groups) < 6
    assert made.data["left_out"] == sorted(groups)
    assert made.data["n_images"] == 6 - len(groups)
    assert made.data["stacks"]["none"]["failures"] == len(culprits)
