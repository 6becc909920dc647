"""Finished runs as they lie on disk: what a comparison, a report and a tracker are made from. No model is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.errors import DataError, MitigateError
from mitigate.records import RunRecord, SampleRecord, read_samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from mitigate.benchmarks.base import Benchmark


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One stack's answers to one benchmark.

    Parameters
    ----------
    directory
        Folder of the run.
    stack
        Name of the stack.
    record
        What was asked for and what came out.
    benchmark
        The benchmark, built as it was for the run.
    answers
        Sample id -> record, graded (`Benchmark.graded`); those that failed are among them.
    """

    directory: Path
    stack: str
    record: RunRecord
    benchmark: Benchmark
    answers: Mapping[str, SampleRecord]

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the run's complete configuration."""
        return self.record.config

    @property
    def methods(self) -> Mapping[str, Any]:
        """Return the methods' parameters by key, in stack order."""
        return self.config.get("methods") or {}

    @property
    def seed(self) -> int:
        """Return the run's seed."""
        return int(self.config["seed"])

    @property
    def failures(self) -> int:
        """Return how many samples failed."""
        return sum(record.error is not None for record in self.answers.values())


def units_that_failed(benchmark: Benchmark, records: Iterable[SampleRecord]) -> frozenset[str]:
    """Return what has to be left out because a sample failed: the sample, or its cluster in a grouped benchmark."""
    return frozenset(unit(benchmark, record) for record in records if record.error is not None)


def unit(benchmark: Benchmark, record: SampleRecord) -> str:
    """Return the id of what counts or is left out as a whole with a record."""
    return benchmark.cluster(record) if benchmark.grouped else record.id


def graded_answers(
    benchmark: Benchmark, directory: Path, report: Callable[[int, int], None] | None = None
) -> dict[str, SampleRecord]:
    """Read a run's answers and have them graded; verdicts that are already in the folder are not asked for again.

    Raises
    ------
    DataError
        If records are damaged, or a judge that is still needed does not answer.
    """
    answers = {record.id: record for record in read_samples(directory)}
    answered = [record for record in answers.values() if record.error is None]
    return answers | {record.id: record for record in benchmark.graded(answered, directory, report)}


def benchmark_of(config: Mapping[str, Any]) -> Benchmark:
    """Build the benchmark of a recorded configuration.

    Raises
    ------
    UnknownName
        If nothing installed here brings it.
    ConfigError
        If it does not take the recorded parameters any more.
    """
    from mitigate.compose.schemas import check_value, native
    from mitigate.registry import benchmarks

    recorded = {key: value for key, value in config["benchmark"].items() if key != "name"}
    plugin = benchmarks().get(config["benchmark"]["name"])
    checked = {key: check_value(plugin, key, value, f"benchmark.{key}={value}") for key, value in recorded.items()}
    built: Benchmark = plugin(**native(plugin, checked))
    return built


def read_run(directory: Path) -> StoredRun:
    """Read the folder of a single run.

    Raises
    ------
    DataError
        If it holds no run, or the run is not finished.
    """
    directory = Path(directory)
    if not (directory / "record.json").is_file():
        raise DataError(f"{directory} holds no run: there is no record.json in it")
    record = RunRecord.read(directory)
    if record.status != "finished":
        raise DataError(f"the run in {directory} is not finished ({record.status}); the command that began it goes on")
    try:
        benchmark = benchmark_of(record.config)
    except MitigateError as error:
        raise DataError(f"{directory}: {error}") from None
    answers = graded_answers(benchmark, directory)
    if len(answers) != record.samples:
        raise DataError(f"{directory} has {len(answers)} of {record.samples} answers; run it again")
    return StoredRun(directory=directory, stack=record.stack, record=record, benchmark=benchmark, answers=answers)


def find_runs(paths: Sequence[Path]) -> list[StoredRun]:
    """Read runs and comparisons; the stacks of a comparison come in the order of its table.

    Parameters
    ----------
    paths
        Folders of single runs, and folders of comparisons.

    Raises
    ------
    DataError
        If a folder holds neither, a run is not finished or was named twice.
    """
    found: list[StoredRun] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path} is no folder; name the folder of a run or comparison")
        folders = [path] if (path / "record.json").exists() else _stacks(path)
        found += [read_run(folder) for folder in folders]
    seen: set[Path] = set()
    for run in found:
        if run.directory.resolve() in seen:
            raise DataError(f"{run.directory} is named twice; leave one out")
        seen.add(run.directory.resolve())
    return found


def _stacks(path: Path) -> list[Path]:
    """Return the run folders of a comparison, or of a folder of runs."""
    from mitigate.jsonfiles import read_object

    if (path / "comparison.json").exists():
        stacks = read_object(path / "comparison.json").get("stacks")
        if isinstance(stacks, dict):
            return [path / name for name in stacks]
    inside = sorted(folder.parent for folder in path.glob("*/record.json"))
    if not inside:
        raise DataError(f"{path} holds no run: there is neither a record.json nor a comparison.json in it")
    return inside
