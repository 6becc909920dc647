"""The folder of a run or comparison: writable, of one kind, and used by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mitigate.errors import ConfigError, DataError
from mitigate.records import sample_files

LOCK: Final = ".lock"
_OPEN: set[int] = set()


@contextmanager
def claim(directory: Path, *, given: bool = False) -> Iterator[None]:
    """Make a folder, see that it can be written, and keep other processes out of it.

    The lock is the operating system's: it ends with the process, however that ends. Processes that help this one
    must not claim the folder (`mitigate.processes`). A folder that was made here and is empty in the end is removed.

    Parameters
    ----------
    directory
        Folder of the run or comparison.
    given
        Whether it lies there already, so that another name is no remedy.

    Raises
    ------
    ConfigError
        If it cannot be made or written, or another process works in it.
    """
    busy = "wait for it" if given else "wait for it, or give this run its own name (name=...)"
    elsewhere = "copy it to where you may write" if given else "choose another folder (runs_dir=...) or name (name=...)"
    missing = [path for path in (directory, *directory.parents) if not _exists(path)]
    handle: int | None = None
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = _lock(directory / LOCK)
        except BlockingIOError:
            raise ConfigError(f"another process is working in {directory}; {busy}") from None
        except OSError as error:
            raise ConfigError(f"cannot write to {directory}: {error.strerror or error}; {elsewhere}") from None
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (directory / LOCK).unlink()
            _OPEN.discard(handle)
            os.close(handle)
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # only an empty one can be removed


def refuse_comparison(run_dir: Path) -> None:
    """Refuse to put a single run into the folder of a comparison.

    Raises
    ------
    ConfigError
        Naming the remedy.
    """
    if (run_dir / "comparison.json").exists() or any(run_dir.glob("*/record.json")):
        raise ConfigError(f"{run_dir} holds a comparison or a sweep; give this run its own name (name=...)")


def refuse_run(directory: Path) -> None:
    """Refuse to put a comparison into the folder of a single run.

    Raises
    ------
    ConfigError
        Naming the remedy.
    """
    if (directory / "record.json").exists() or sample_files(directory):
        raise ConfigError(f"{directory} holds a single run; give this comparison its own name (name=...)")


def refuse_orphans(run_dir: Path) -> None:
    """Refuse answers of which nothing says what was asked.

    Raises
    ------
    DataError
        If there are samples, but the configuration or the record of their run is missing.
    """
    gone = [name for name in ("config.json", "record.json") if not (run_dir / name).exists()]
    if gone and sample_files(run_dir):
        raise DataError(
            f"{run_dir} has answers but no {' and no '.join(gone)}, so nothing tells which run they belong to; "
            f"delete {run_dir} to run it again"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered: making it says what is wrong
        return True


def _lock(path: Path) -> int:
    """Open a file and lock it; `BlockingIOError` if somebody else has."""
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:  # a file system without locks
            return handle
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                _OPEN.add(handle)
                return handle
        os.close(handle)  # its owner has just removed this file: lock the new one


def _forget_in_child() -> None:
    """Close the locks in a forked child: a loader's process that outlives a killed run must not hold them."""
    for handle in _OPEN:
        with suppress(OSError):
            os.close(handle)
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
