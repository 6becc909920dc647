"""Whether a benchmark's data are there, are what they should be, and can be read."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mitigate.data.reading import open_image, read_lines, read_rows
from mitigate.errors import DataError, MitigateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from mitigate.benchmarks.base import Benchmark
    from mitigate.data.sources import Source

OK, MISSING, OLDER, ALTERED, UNPINNED, DAMAGED = "ok", "missing", "older", "altered", "unpinned", "damaged"


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What is found where a source belongs.

    Parameters
    ----------
    source
        What should be there.
    path
        Where.
    verdict
        ``ok`` (the pinned bytes, or a folder), ``unpinned`` (there, and nobody knows its sha256), ``missing``,
        ``older`` (a known other version), ``altered`` (other bytes), ``damaged`` (cannot be read, or the wrong number
        of rows).
    detail
        A few words for people.
    sha256
        Of the file that is there.
    """

    source: Source
    path: Path
    verdict: str
    detail: str = ""
    sha256: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether it has to be mended before the benchmark can be trusted."""
        if self.verdict == MISSING:
            return not self.source.optional
        return self.verdict not in (OK, UNPINNED)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures that a benchmark's samples need.

    Parameters
    ----------
    needed
        How many files.
    decoded
        Whether they were read to the end, or only looked for.
    problems
        One sentence for every picture that is missing or cannot be read.
    """

    needed: int
    decoded: bool
    problems: list[str] = field(default_factory=list)


def file_hash(path: Path) -> str:
    """Return the sha256 (hex) of a file.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def inspect(source: Source, folder: Path) -> FileState:
    """Look at one source of a benchmark whose data folder is given."""
    path = source.location(folder)
    if source.is_folder:
        return _folder(source, path)
    if not path.exists():
        return FileState(source=source, path=path, verdict=MISSING)
    try:
        found = file_hash(path)
        verdict, detail = _verdict(source, path, found)
    except DataError as error:
        return FileState(source=source, path=path, verdict=DAMAGED, detail=str(error).replace(f"{path}:", "line "))
    return FileState(source=source, path=path, verdict=verdict, detail=detail, sha256=found)


def _folder(source: Source, path: Path) -> FileState:
    """Look at a folder of pictures; which of them are needed, and whether they can be read, the samples say."""
    files = sum(1 for item in path.rglob("*") if item.is_file()) if path.is_dir() else 0
    if not files:
        return FileState(source=source, path=path, verdict=MISSING)
    if source.count is not None and files < source.count:
        return FileState(source=source, path=path, verdict=DAMAGED, detail=f"{files} of {source.count} files")
    return FileState(source=source, path=path, verdict=OK, detail=f"{files} files")


def _verdict(source: Source, path: Path, found: str) -> tuple[str, str]:
    if found == source.sha256:
        return OK, "" if source.count is None else f"{source.count} rows"
    if found in (known := dict(source.older)):
        return OLDER, known[found]
    rows = None if source.count is None else _rows(path)
    if source.sha256 is not None:
        shown = "" if rows in (None, source.count) else f"; {rows} rows, expected {source.count}"
        return ALTERED, f"sha256 {found[:16]}..., expected {source.sha256[:16]}...{shown}"
    if rows != source.count:
        return DAMAGED, f"{rows} rows, expected {source.count}"
    return UNPINNED, "" if rows is None else f"{rows} rows"


def _rows(path: Path) -> int:
    return len(read_lines(path) if path.suffix == ".txt" else read_rows(path))


def check_pictures(
    benchmark: Benchmark, *, decode: bool, report: Callable[[int, int], None] | None = None
) -> Pictures | str:
    """Look for every picture the benchmark's samples need.

    Parameters
    ----------
    benchmark
        With its settings.
    decode
        Whether to read every picture to the end, rather than only to look for it.
    report
        Called with how many pictures are done and how many there are.

    Returns
    -------
    Pictures | str
        What was found; or why the samples cannot be read, naming file and line.
    """
    from mitigate.benchmarks.base import Benchmark as Base
    from mitigate.benchmarks.base import check_samples

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # versions of files: `inspect` names them
            samples = benchmark.samples()
        check_samples(samples)
        if type(benchmark).image_files is Base.image_files:  # it draws its pictures
            return Pictures(needed=0, decoded=decode)
        files = list(dict.fromkeys(path for sample in samples for path in benchmark.image_files(sample)))
    except MitigateError as error:
        return str(error)
    return Pictures(needed=len(files), decoded=decode, problems=list(_problems(files, decode, report)))


def _problems(files: list[Path], decode: bool, report: Callable[[int, int], None] | None) -> Iterable[str]:
    for number, path in enumerate(files, start=1):
        if not path.is_file():
            yield f"{path} does not exist"
        elif decode:
            try:
                open_image(path)
            except DataError as error:
                yield str(error)
        if report is not None:
            report(number, len(files))


def as_json(state: FileState) -> dict[str, Any]:
    """Return a file's state as plain JSON."""
    return {
        "path": str(state.path),
        "verdict": state.verdict,
        "detail": state.detail,
        "sha256": state.sha256,
        "expected_sha256": state.source.sha256,
        "optional": state.source.optional,
        "url": state.source.url,
        "licence": state.source.licence,
        "instruction": state.source.instruction,
    }
