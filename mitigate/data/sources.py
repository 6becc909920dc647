"""What a benchmark needs on disk, and where it is looked for."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mitigate.errors import DataError, MitigateError

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE = "MITIGATE_DATA"
FOLDER = "data"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or folder of pictures, a benchmark needs.

    Parameters
    ----------
    path
        Where it belongs, below the benchmark's data folder; a folder ends in ``/``. What several benchmarks share lies
        beside it: ``../coco/val2014/``.
    url
        Where it is downloaded from, pinned to a commit; ``None`` if the user must get it.
    sha256
        Of the file; ``None`` if it cannot be pinned.
    licence
        As its authors state it.
    instruction
        What to get from where and where to put it.
    count
        Rows of the file, or files of the folder, where known.
    optional
        Whether only some settings of the benchmark need it.
    older
        sha256 -> name of other known versions, so that they can be told from damage.
    """

    path: str
    url: str | None
    sha256: str | None
    licence: str
    instruction: str
    count: int | None
    optional: bool = False
    older: tuple[tuple[str, str], ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of pictures."""
        return self.path.endswith("/")

    def location(self, folder: Path) -> Path:
        """Return where it belongs, given the benchmark's data folder."""
        return Path(os.path.normpath(folder / self.path))


def data_root(data_dir: str | None) -> Path:
    """Return the folder of all data: the one given, or ``$MITIGATE_DATA``, or ``data``."""
    return Path(data_dir or os.environ.get(VARIABLE) or FOLDER).expanduser()


def data_folder(benchmark: str, data_dir: str | None) -> Path:
    """Return the folder of a benchmark's data; it need not exist.

    Parameters
    ----------
    benchmark
        Name of the benchmark, or of data that several share (``coco``).
    data_dir
        As for `data_root`.
    """
    return data_root(data_dir) / benchmark


def require_file(path: Path, benchmark: str) -> Path:
    """Return the path if there is such a file.

    Parameters
    ----------
    path
        A file of the benchmark.
    benchmark
        Whose sources say how to get it.

    Raises
    ------
    DataError
        If there is none; with the command that fetches it, or where to get it.
    """
    if path.is_file():
        return path
    raise DataError(f"{path} does not exist\n{_remedy(path, benchmark)}")


def _remedy(path: Path, benchmark: str) -> str:
    name = Path(os.path.normpath(path)).as_posix()
    for source in _sources(benchmark):
        ending = source.path.removeprefix("../")
        if f"/{name}".endswith(f"/{ending}") or (source.is_folder and f"/{ending}" in f"/{name}"):
            if source.url is None:
                return source.instruction
            root = name.removesuffix(f"{benchmark}/{ending}").rstrip("/")
            elsewhere = "" if Path(root) in (data_root(None), Path(name)) else f" --data {shlex.quote(root)}"
            return f"get it with: mitigate data fetch {benchmark}{elsewhere}"
    return f"get it with: mitigate data fetch {benchmark}"


def _sources(benchmark: str) -> Sequence[Source]:
    from mitigate.registry import benchmarks

    try:
        found: Sequence[Source] = benchmarks().get(benchmark).sources
    except MitigateError:  # not installed under this name: the plain remedy is left
        return ()
    return found
