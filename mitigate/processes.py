"""Which of the processes of one run this is: launchers tell it through the environment, before anything is loaded."""

from __future__ import annotations

import os
import socket
from typing import Final

#: Numbers that Lightning, torchrun and SLURM give a process; the first one has 0 wherever it has one.
_RANKS: Final = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
#: Its number on its own machine.
_LOCAL: Final = ("LOCAL_RANK", "SLURM_LOCALID")


def is_first_process() -> bool:
    """Say whether this process owns the run's files, shows its progress and tells its results."""
    return not any(map(_number, _RANKS))


def speaks() -> bool:
    """Say whether this process tells an error that no other one knows of yet.

    What is wrong with a command is wrong in all processes of a machine, so one of them says it. A process that the
    first one has started itself (by then, the command was right) fails for reasons of its own.
    """
    started_by_first = bool(_number("LOCAL_RANK")) and not any(key in os.environ for key in ("RANK", "SLURM_LOCALID"))
    return started_by_first or not any(map(_number, _LOCAL))


def local_rank() -> int:
    """Return this process's number on its machine."""
    return max(map(_number, _LOCAL))


def place() -> str:
    """Name this process for a message, such as ``process 3 on node7``."""
    number = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if _number(key)), "0")
    return f"process {number} on {socket.gethostname()}"


def _number(key: str) -> int:
    value = os.environ.get(key, "")
    return int(value) if value.isdecimal() else 0
