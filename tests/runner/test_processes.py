"""Several processes share the batches (that they write what one writes: test_ddp)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mitigate.errors import DataError
from mitigate.runner.batches import plan_batches
from mitigate.runner.module import BatchDataModule, cut_at_end
from mitigate.runner.processes import Watch
from tests.runner.fake_world import FakeBenchmark


def indices(rank: int, world: int, done: set[str]) -> list[int]:
    benchmark = FakeBenchmark(limit=6)
    data = BatchDataModule(benchmark, plan_batches(benchmark, benchmark.samples(), 4, 12), done, 0)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return [batch.index for batch, _ in data.predict_dataloader()]


def test_processes_share_the_batches_and_keep_their_share_when_resuming() -> None:
    assert [indices(rank, 2, set()) for rank in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5]]
    first = {f"img-{index}/caption" for index in range(4)}  # batch 0
    assert [indices(rank, 2, first) for rank in (0, 1)] == [[2, 4, 6], [1, 3, 5]]


def test_a_row_is_cut_at_its_first_end_token() -> None:
    assert cut_at_end([5, 1, 0, 1], {1}) == ([5, 1], True)
    assert cut_at_end([5, 6], {1}) == ([5, 6], False)
    assert cut_at_end([5, 6], set()) == ([5, 6], False)


def test_a_process_notices_that_one_it_has_started_or_that_has_started_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, ended = Watch(tmp_path), [None, -9]
    started = [SimpleNamespace(poll=lambda code=code: code) for code in ended]
    launcher = SimpleNamespace(procs=started)
    trainer = SimpleNamespace(
        received_sigterm=False, world_size=2, global_rank=0, strategy=SimpleNamespace(launcher=launcher)
    )
    with pytest.raises(DataError, match="another process of this run has ended unexpectedly"):
        watch.check(trainer)
    launcher.procs = started[:1]
    watch.check(trainer)
    trainer.global_rank, launcher.procs = 1, []
    watch.check(trainer)
    monkeypatch.setattr("os.getppid", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        watch.check(trainer)
