from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from mitigate.core.method import Tags
from mitigate.errors import ConfigError
from mitigate.records import read_samples
from mitigate.runner import run
from mitigate.runner.batches import generate_arguments, plan_batches
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, FakeMethod, install, resolved


def test_batches_are_cut_from_the_full_list_and_never_mix_tasks_or_limits() -> None:
    benchmark = FakeBenchmark(limit=5)
    batches = plan_batches(benchmark, benchmark.samples(), 4, 12)
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [len(batch.samples) for batch in batches] == [4, 1, 4, 4, 4, 3]
    for batch in batches:
        assert {(sample.task, batch.max_new_tokens) for sample in batch.samples} in ({("caption", 12)}, {("yes_no", 2)})
    ids = [sample.id for batch in batches for sample in batch.samples]
    assert sorted(ids) == sorted(sample.id for sample in benchmark.samples())


def test_a_samples_own_limit_only_lowers_the_configured_one() -> None:
    benchmark = FakeBenchmark(limit=1)
    limits = {
        batch.samples[0].task: batch.max_new_tokens for batch in plan_batches(benchmark, benchmark.samples(), 4, 1)
    }
    assert limits == {"caption": 1, "yes_no": 1}


def test_missing_samples_of_a_batch() -> None:
    benchmark = FakeBenchmark(limit=2)
    batch = plan_batches(benchmark, benchmark.samples(), 4, 12)[0]
    assert [sample.id for sample in batch.missing({"img-0/caption"})] == ["img-1/caption"]


def test_arguments_of_generate_leave_out_what_does_not_apply() -> None:
    greedy = generate_arguments(resolved().config["decoding"])
    assert greedy == {"do_sample": False, "num_beams": 1}
    sampling = generate_arguments(
        resolved(decoding__do_sample=True, decoding__repetition_penalty=1.2).config["decoding"]
    )
    assert sampling == {
        "do_sample": True,
        "num_beams": 1,
        "repetition_penalty": 1.2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }


def test_a_batch_larger_than_the_samples_is_one_per_task() -> None:
    benchmark = FakeBenchmark(limit=2)
    batches = plan_batches(benchmark, benchmark.samples(), 1000, 12)
    assert [len(batch.samples) for batch in batches] == [2, 6]


class Single(FakeMethod):
    tags: ClassVar[Tags] = Tags(batch=False)


def test_a_method_for_single_samples_gets_them_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = FakeLoaded()
    install(monkeypatch.setattr, loaded)
    run(resolved("single", methods={"turn": Single()}), tmp_path / "r", console=Console(width=200))
    assert {call["rows"] for call in loaded.model.calls} == {1}
    assert capsys.readouterr().out.count("single: a method serves one sample at a time: batches of 1 instead of 4") == 1


class Small(FakeLoaded):
    """Has memory for so many samples at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def inputs(self, prompts: list[str], images: Any) -> Any:
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return super().inputs(prompts, images)


def test_out_of_memory_says_what_to_do_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr, Small(3))  # captions come in batches of 3, questions in batches of 4
    changes = {"images": 3, "trainer__batch_size": 4}
    with pytest.raises(ConfigError, match=r"out of memory with 4 samples at once; answers so far are kept\n.*skip"):
        run(resolved(**changes), tmp_path / "r", console=Console(quiet=True))
    assert len(read_samples(tmp_path / "r")) == 3
    record = run(resolved(**changes, on_error="skip"), tmp_path / "r", console=Console(quiet=True))
    assert (record.samples, record.failures) == (12, 0)
    install(monkeypatch.setattr, FakeLoaded())
    run(resolved(**changes), tmp_path / "roomy", console=Console(quiet=True))
    one_by_one, together = (read_samples(tmp_path / name) for name in ("r", "roomy"))
    assert [record.answer for record in one_by_one] == [record.answer for record in together]


def test_out_of_memory_with_one_sample_knows_other_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr, Small(0))
    with pytest.raises(ConfigError, match=r"with a single sample.*\nuse a device with more memory"):
        run(resolved(trainer__batch_size=1), tmp_path / "r", console=Console(quiet=True))
