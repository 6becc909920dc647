"""Records: what a run leaves on disk, one line per sample and one summary.

``run_dir/samples.rank<k>.jsonl`` is append-only, one file per process; ``config.json`` says what was asked for and
``record.json`` what came out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mitigate.errors import DataError
from mitigate.jsonfiles import append, number, read_object, refused, to_json, write_json
from mitigate.jsonfiles import content_hash as content_hash
from mitigate.metrics.base import Interval

if TYPE_CHECKING:
    from types import TracebackType

Telemetry = dict[str, dict[str, float]]
"""Method key, or ``bus``, -> counter -> amount."""

_SAMPLE_FILE = re.compile(r"samples\.rank(\d+)\.jsonl")


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One answered sample.

    Parameters
    ----------
    id, image_id, task, prompt, meta
        As in the benchmark's sample; ``meta`` carries the ground truth, so that scoring needs nothing else.
        Its numbers must be finite.
    text
        Raw reply.
    tokens
        Generated tokens, the end token included.
    finished
        Whether the model ended by itself before the limit.
    telemetry
        What the methods and the bus did for this sample.
    seconds
        Wall time of its batch divided by the batch size.
    error
        Why there is no reply; ``None`` normally.
    """

    id: str
    image_id: str
    task: str
    prompt: str
    text: str
    tokens: int
    finished: bool
    meta: dict[str, Any] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    def to_line(self) -> str:
        """Return the record as one line of ASCII JSON, without the line end.

        Raises
        ------
        DataError
            If ``meta`` holds a NaN or an infinity (ground truth must survive exactly) or anything that is not plain.
        """
        data = to_json(self)
        if data["meta"] != self.meta:
            raise DataError(f"sample {self.id!r}: meta must be plain JSON (lists, text keys) with finite numbers")
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read a record from its line.

        Raises
        ------
        DataError
            If it is no record.
        """
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(f"no valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise DataError("a record must be a JSON object")
        expected = {f.name for f in dataclasses.fields(cls)}
        if odd := sorted(expected.symmetric_difference(data)):
            raise DataError(f"the field {odd[0]!r} is {'missing' if odd[0] in expected else 'unknown'}")
        for names, kind in ((("id", "image_id", "task", "prompt", "text"), str), (("meta", "telemetry"), dict)):
            for name in names:
                if not isinstance(data[name], kind):
                    raise DataError(f"the field {name!r} must be {kind.__name__}, not {data[name]!r:.60}")
        if type(data["tokens"]) is not int or type(data["finished"]) is not bool:
            raise DataError("the field 'tokens' must be a whole number and 'finished' true or false")
        if not isinstance(data["error"], str | None):
            raise DataError("the field 'error' must be text or null")
        telemetry = _read_telemetry(data["telemetry"])
        return cls(**{**data, "telemetry": telemetry, "seconds": number(data["seconds"])})

    @property
    def answer(self) -> tuple[Any, ...]:
        """What makes two records of one sample the same: everything but measurements of the machine."""
        return (self.id, self.image_id, self.task, self.prompt, self.text, self.tokens, self.finished, self.meta)


def _read_telemetry(data: Mapping[str, Any]) -> Telemetry:
    if bad := [key for key, counters in data.items() if not isinstance(counters, dict)]:
        raise DataError(f"the telemetry of {bad[0]!r} must map counters to numbers")
    return {key: {name: number(amount) for name, amount in counters.items()} for key, counters in data.items()}


class RecordWriter:
    """Appends records to one process' file; they are on the disk before `append` or `extend` returns.

    Opening repairs a torn last line (a run that was killed while writing): the part is cut off, and its sample counts
    as not done.

    Parameters
    ----------
    run_dir
        Folder of the run; made if missing.
    rank
        Number of the process.

    Raises
    ------
    DataError
        If the file cannot be opened or repaired.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        run_dir = Path(run_dir)
        self.path = run_dir / f"samples.rank{rank}.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a failed write leaves nothing behind that a later one would flush.
            self._file = self.path.open("ab", buffering=0)
            whole = _whole_length(self.path)
            if whole < self._file.tell():
                self._file.truncate(whole)
                self._file.seek(whole)
        except OSError as error:
            raise refused(self.path, error) from error

    def append(self, record: SampleRecord) -> None:
        """Write one record; as `extend`."""
        self.extend([record])

    def extend(self, records: Iterable[SampleRecord]) -> None:
        """Write records, one line each, and wait for the disk once: for samples that were answered together.

        Raises
        ------
        DataError
            If a record cannot be written as JSON, or the disk refuses them; the file then is as before.
        """
        records = list(records)
        lines = b"".join(record.to_line().encode("ascii") + b"\n" for record in records)
        start = self._file.tell()
        try:
            append(self._file, lines)
        except OSError as error:
            self._file.truncate(start)
            self._file.seek(start)
            raise refused(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _whole_length(path: Path) -> int:
    """Return how many bytes of a file end with a complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def sample_files(run_dir: Path) -> list[Path]:
    """Return the sample files of a run by rank; none if the folder does not exist."""
    found = [(match, path) for path in Path(run_dir).glob("*") if (match := _SAMPLE_FILE.fullmatch(path.name))]
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in found)]


def read_samples(run_dir: Path) -> list[SampleRecord]:
    """Read all records of a run, whichever process wrote them, in natural order of their ids.

    A torn last line of a file is left out. A sample that failed and was answered later is the later record; a sample
    answered twice (ranks may be padded with copies) is the first one.

    Raises
    ------
    DataError
        Naming file and line, for a damaged line, and for two records of one sample that answer differently.
    """
    chosen: dict[str, tuple[SampleRecord, str]] = {}
    for path in sample_files(run_dir):
        # What follows the last line end is nothing, or a torn line.
        for index, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            where = f"{path}:{index}"
            try:
                record = SampleRecord.from_line(line.decode("utf-8"))
            except (DataError, UnicodeDecodeError) as error:
                raise DataError(f"{where}: {error}; delete the line, and its sample is run again") from None
            known = chosen.get(record.id)
            if known is None or (known[0].error is not None and record.error is None):
                chosen[record.id] = (record, where)
            elif record.error is None and known[0].answer != record.answer:
                raise DataError(f"{where}: sample {record.id!r} has another answer in {known[1]}; delete one of them")
    return [chosen[key][0] for key in sorted(chosen, key=natural_key)]


def finished_ids(run_dir: Path) -> set[str]:
    """Return the ids of the samples that need not be run again; a sample that failed is not among them.

    Raises
    ------
    DataError
        As `read_samples` does.
    """
    return {record.id for record in read_samples(run_dir) if record.error is None}


def natural_key(text: str) -> tuple[str, str]:
    """Sort key under which ``test-2`` comes before ``test-10``."""
    return re.sub(r"\d+", lambda match: match.group().zfill(20), text), text


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run: what was asked for, what came out, and everything needed to trace it.

    Parameters
    ----------
    status
        ``running``, ``finished`` or ``failed``.
    stack
        Name of the stack.
    samples
        Number of samples.
    failures
        How many of them failed; they are in no number.
    config, provenance
        Resolved configuration, and where each value came from.
    metrics
        Metric -> value with interval.
    cost
        Times and token counts.
    telemetry
        Sums over all samples (`mitigate.effects.totals`).
    versions, git
        Of the software.
    data_hash, prompt_hash
        Of the benchmark's samples and pictures, and of its prompts.
    unreadable
        Ids of pictures that could not be read; they are not in ``data_hash`` and may be mended.
    weights
        What identifies the checkpoint: ``sha256:...`` of its files or ``commit:...`` of the hub; empty where unknown.
    created_at
        ISO time, UTC, to the millisecond: it tells a run from another of the same stack.
    """

    status: str
    stack: str
    samples: int = 0
    failures: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Interval] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, str | bool | None] = field(default_factory=dict)
    data_hash: str = ""
    prompt_hash: str = ""
    unreadable: list[str] = field(default_factory=list)
    weights: str = ""
    created_at: str = ""

    def write(self, run_dir: Path) -> None:
        """Write ``config.json`` and ``record.json``.

        Raises
        ------
        DataError
            If the configuration holds something that is not plain data.
        """
        data = to_json(self)
        asked = {key: data.pop(key) for key in ("config", "provenance")}
        write_json(Path(run_dir) / "config.json", asked)
        write_json(Path(run_dir) / "record.json", data)

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If a file is missing, damaged or of another version.
        """
        path = Path(run_dir) / "record.json"
        data = {**read_object(Path(run_dir) / "config.json"), **read_object(path)}
        try:
            data["metrics"] = {
                name: Interval(**{part: number(value) for part, value in interval.items()})
                for name, interval in data["metrics"].items()
            }
            data["cost"] = {name: number(value) for name, value in data["cost"].items()}
            data["telemetry"] = _read_telemetry(data["telemetry"])
            return cls(**data)
        except (KeyError, TypeError, AttributeError, DataError) as error:
            raise DataError(
                f"{path} is no run record of this version: {error}; delete {run_dir} to run it again"
            ) from None
