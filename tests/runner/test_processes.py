"""Several processes share the batches; what they write together is what one process writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mitigate.records import read_samples, sample_files
from mitigate.runner import run
from mitigate.runner.batches import plan_batches
from mitigate.runner.module import BatchDataModule, cut_at_end
from tests.runner import fake_world
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, install, resolved


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


@pytest.mark.slow
def test_two_processes_write_the_records_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys; from rich.console import Console; from tests.runner.fake_world import *\n"
        "from mitigate.runner import run\n"
        "install(setattr, FakeLoaded())\n"
        "two = resolved('turned', trainer__devices=2, trainer__strategy='ddp')\n"
        "run(two, Path(sys.argv[1]), console=Console(quiet=True))\n"
    )
    (tmp_path / "two.py").write_text(script)
    command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path / "two")]
    paths = ":".join([str(Path(fake_world.__file__).parents[2]), *sys.path])
    subprocess.run(command, env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"}, check=True, timeout=120)
    assert len(sample_files(tmp_path / "two")) == 2
    install(monkeypatch.setattr, FakeLoaded())
    run(resolved("turned"), tmp_path / "one", console=Console(quiet=True))
    one, two = (read_samples(tmp_path / name) for name in ("one", "two"))
    assert [record.answer for record in two] == [record.answer for record in one]
    assert [record.telemetry for record in two] == [record.telemetry for record in one]
