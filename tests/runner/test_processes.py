"""Several processes share the batches (that they write what one writes: test_ddp)."""

from __future__ import annotations

from types import SimpleNamespace

from mitigate.runner.batches import plan_batches
from mitigate.runner.module import BatchDataModule, cut_at_end
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
