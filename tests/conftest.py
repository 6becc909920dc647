"""Every test runs without a network, with fixed seeds, one thread per process, and no plugins of other packages."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mitigate.registry import methods
from tests.forking import Forks
from tests.toys import Chooser, Toy

# read by libraries when they are imported, so before any test module is
os.environ.update(
    HF_HUB_OFFLINE="1",
    MITIGATE_PLUGINS="none",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)
os.environ.pop("COLUMNS", None)

#: Importing this package changes transformers' tables; tests/plugins/test_pocket.py runs its tests and tidies up.
collect_ignore = ["plugins/mitigate-pocket/tests"]

# The same examples every time, and no deadline: a slow machine is no bug.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

_LOCAL = ("127.0.0.1", "::1", "localhost")
_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
        raise RuntimeError(f"a test tried to reach {address}: tests use no network")
    _connect(self, address)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    socket.socket.connect = _connect_locally  # type: ignore[method-assign]
    yield
    socket.socket.connect = _connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # what a library may fall back on
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Run commands in fresh processes that have the libraries loaded."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture
def toys() -> Iterator[None]:
    """Register the methods ``toy`` and ``chooser``."""
    for plugin in (Toy, Chooser):
        methods().register(plugin.name, plugin)
    yield
    for plugin in (Toy, Chooser):
        methods().unregister(plugin.name)
