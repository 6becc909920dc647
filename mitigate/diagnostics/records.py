"""The records of a diagnostic run: one JSON line per sample with its token rows, append-only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

from mitigate.diagnostics.base import SampleRows, TokenRow
from mitigate.diagnostics.labels import Label
from mitigate.errors import DataError
from mitigate.jsonfiles import append, refused, to_json
from mitigate.records import natural_key

FILE: Final = "tokens.jsonl"
_DIGITS: Final = 6
_SAMPLE = ("id", "image_id", "task", "prompt", "text", "finished", "meta", "telemetry", "seconds", "measures")
_TOKEN = ("token", "text", "label", "first", "measures")


def to_line(sample: SampleRows) -> str:
    """Return a sample as one line of ASCII JSON; floats of measures keep six digits."""
    data: dict[str, Any] = {name: getattr(sample, name) for name in _SAMPLE}
    data["measures"] = rounded(sample.measures)
    data["tokens"] = [
        {
            "token": row.token,
            "text": row.text,
            "label": row.label.value,
            "first": row.first,
            "measures": rounded(row.measures),
        }
        for row in sample.rows
    ]
    return json.dumps(to_json(data), allow_nan=False)


def from_line(line: str) -> SampleRows:
    """Read what `to_line` wrote; undefined numbers stay ``None``.

    Raises
    ------
    DataError
        If it is no record of a diagnostic.
    """
    try:
        data = json.loads(line)
    except ValueError as error:
        raise DataError(f"no valid JSON ({error})") from None
    try:
        tokens = data["tokens"]
        rows = tuple(
            TokenRow(
                sample=data["id"],
                image_id=data["image_id"],
                task=data["task"],
                step=place,
                position=place,
                length=len(tokens),
                **{**{name: token[name] for name in _TOKEN}, "label": Label(token["label"])},
            )
            for place, token in enumerate(tokens)
        )
        return SampleRows(**{name: data[name] for name in _SAMPLE}, rows=rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"no record of a diagnostic ({type(error).__name__}: {error})") from None


def rounded(value: Any) -> Any:
    """Return measures with floats of six significant digits: a run holds millions of them."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def read(folder: Path) -> list[SampleRows]:
    """Read all samples of a folder in natural order; a torn last line is left out.

    Raises
    ------
    DataError
        Naming file and line, for a damaged line or a sample that occurs twice.
    """
    path = folder / FILE
    if not path.exists():
        return []
    found: dict[str, SampleRows] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            sample = from_line(line.decode("utf-8"))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{number}: {error}; delete the line, and its sample is run again") from None
        if sample.id in found:
            raise DataError(f"{path}:{number}: sample {sample.id!r} is there twice; delete one of the lines")
        found[sample.id] = sample
    return [found[key] for key in sorted(found, key=natural_key)]


class Writer:
    """Appends samples; they are on the disk before `extend` returns. Opening cuts off a torn last line.

    Raises
    ------
    DataError
        If the file cannot be opened or repaired.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise refused(self.path, error) from error

    def extend(self, samples: Iterable[SampleRows]) -> None:
        """Write samples of one batch.

        Raises
        ------
        DataError
            If the disk refuses them; the file then is as before.
        """
        lines = b"".join(to_line(sample).encode("ascii") + b"\n" for sample in samples)
        start = self.path.stat().st_size
        try:
            append(self._file, lines)
        except OSError as error:
            self._file.truncate(start)
            raise refused(self.path, error) from error

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()
