"""One comparison of fake stacks, tracked offline with W&B once for all tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mitigate.registry import benchmarks
from mitigate.runner import compare
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, install, resolved
from tests.trackers.reading import Logged, read_group

WANDB = {"name": "wandb", "mode": "offline", "project": "paper", "entity": None, "tags": ["draft"]}


@dataclass
class TrackedComparison:
    directory: Path
    data: dict[str, Any]
    logged: dict[str, Logged]


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackedComparison]:
    directory = tmp_path_factory.mktemp("tracked") / "three-stacks"
    runs = [resolved(tracker=WANDB), resolved("turned", tracker=WANDB), resolved("idle", methods={}, tracker=WANDB)]
    benchmarks().register("fake", FakeBenchmark)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        install(patch.setattr, FakeLoaded())
        compare(runs, directory, console=Console(quiet=True))
    data = json.loads((directory / "comparison.json").read_text())
    yield TrackedComparison(directory, data, read_group(directory))
    benchmarks().unregister("fake")
