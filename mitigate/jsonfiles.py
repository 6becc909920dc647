"""JSON files that survive crashes and odd numbers.

JSON has no NaN and no infinity: an undefined number is written as ``null`` and an infinite one as ``"inf"`` or
``"-inf"``, and reading turns both back.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mitigate.errors import DataError


def to_json(value: Any) -> Any:
    """Return the value with every number JSON cannot hold replaced: NaN by ``None``, infinities by strings.

    Raises
    ------
    DataError
        If something in it is no plain data (numbers, text, enums, lists, dicts with text keys, dataclasses).
    """
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise DataError(f"a record cannot hold the key {bad[0]!r}: keys must be text")
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise DataError(f"a record cannot hold {type(value).__name__} {value!r:.60}: turn it into plain numbers or text")


def number(value: Any) -> float:
    """Read a number as `to_json` wrote it.

    Raises
    ------
    DataError
        If it is none.
    """
    if value is None:
        return math.nan
    if value in ("inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return float(value)
    raise DataError(f"expected a number but found {value!r:.60}")


def write_json(path: Path, value: Any) -> None:
    """Write what `to_json` takes; as `write_text`."""
    write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a crash, sees the old file or the new one, no mixture.

    Raises
    ------
    DataError
        If the disk refuses it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def append(file: io.FileIO, data: bytes) -> None:
    """Write to an unbuffered file and wait for the disk; a full one takes a part, and only then says what is wrong.

    Raises
    ------
    OSError
        As the disk says it; a part may be written.
    """
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def refused(path: Path, error: OSError) -> DataError:
    """Return what to tell a user whose disk did not take a file."""
    return DataError(
        f"cannot write {path}: {error.strerror or error}\n"
        "finished samples are kept; when that is mended (free space, permissions), the same command goes on"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    DataError
        If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run's folder.

    Raises
    ------
    DataError
        If it is missing, damaged or something else; with the remedy.
    """
    remedy = f"delete {path.parent} to run it again"
    try:
        data = read_json(path)
    except DataError as error:
        raise DataError(f"{error}\n{remedy}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds no JSON object\n{remedy}")
    return data


def content_hash(parts: Iterable[Any]) -> str:
    """Return the sha256 (hex) of a sequence of byte strings and JSON values; where one part ends matters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(to_json(part), sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
