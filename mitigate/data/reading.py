"""Reading data files: every damage is an error that names file and line; nothing is skipped or repaired."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL.Image import Image

_SPACE = " \t\r\n"
#: What JSON itself takes for white space; ``str.strip()`` would also eat characters that belong to a text.
_MARK = "\ufeff"

Row = tuple[int, dict[str, Any]]
"""Line on which an object begins, and the object."""

_watched: ContextVar[dict[str, str] | None] = ContextVar("watched", default=None)


@contextmanager
def watched() -> Iterator[dict[str, str]]:
    """Collect path -> sha256 of every data file that is read meanwhile, of the very bytes that were read."""
    found: dict[str, str] = {}
    token = _watched.set(found)
    try:
        yield found
    finally:
        _watched.reset(token)


def read_rows(path: Path) -> list[Row]:
    """Read objects from JSON lines, or from one JSON array of objects, with the line each begins on.

    A byte-order mark, Windows line ends and blank lines are accepted and mean nothing.

    Parameters
    ----------
    path
        A UTF-8 file.

    Raises
    ------
    DataError
        Naming file and line: if it is missing, empty, no UTF-8, truncated, no JSON, or holds anything but objects; if
        an object has a key twice, or a number JSON does not have (NaN, infinities).
    """
    return parse_rows(_bytes(Path(path)), str(path))


def parse_rows(data: bytes, name: str) -> list[Row]:
    """Read objects as `read_rows` does from bytes; ``name`` stands for the file in messages."""
    text = _text(data, name)
    start = len(text) - len(text.lstrip(_SPACE))
    if start == len(text):
        raise DataError(f"{name} is empty; it must hold JSON lines, or one JSON array of objects")
    if text[start] == "<":
        raise DataError(f"{name}:1: this is a web page, not data; download the raw file")
    return _array(text, start + 1, name) if text[start] == "[" else _lines(text, name)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read the lines of a UTF-8 text file with their numbers, without line ends and without blank ones.

    Raises
    ------
    DataError
        If the file is missing or no UTF-8.
    """
    lines = enumerate(_text(_bytes(Path(path)), str(path)).split("\n"), start=1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def read_document(path: Path, shrink: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a file that is one JSON value, such as annotations.

    Parameters
    ----------
    path
        A UTF-8 file.
    shrink
        What to keep of each object, called as soon as it is read: a large file then never is in memory as a whole.

    Raises
    ------
    DataError
        If it is missing, no UTF-8 or no JSON, with the line.
    """
    text = _text(_bytes(Path(path)), str(path))
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_hook=shrink)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_plain(error)}") from None


def open_image(path: Path) -> Image:
    """Open a picture as RGB, with all its pixels decoded.

    Raises
    ------
    DataError
        If it is missing, or cannot be decoded to the end.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; `mitigate data check NAME` lists the pictures that are missing"
        ) from None
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        reason = "no picture format is recognised" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{path} cannot be read as a picture ({reason}); get this file again") from None


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    seen = _watched.get()
    if seen is not None:
        seen[str(path)] = hashlib.sha256(data).hexdigest()
    return data


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is no UTF-8; save the file as UTF-8, or get it again"
        ) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write null or a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; keep one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _reason(error: json.JSONDecodeError) -> str:
    """Say what is wrong; JSON that just stops is what is left of a download or copy that broke off."""
    if not error.doc[error.pos :].strip(_SPACE) or error.msg.startswith("Unterminated string"):
        return "the JSON ends in the middle: the file is truncated; get it again"
    return f"no valid JSON ({error.msg}, column {error.colno})"


def _plain(error: Exception) -> str:
    return "the JSON is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _row(value: Any, name: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise DataError(f"{name}:{line}: expected a JSON object, but found {kind}")
    return value


def _lines(text: str, name: str) -> list[Row]:
    rows = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if stripped := line.strip(_SPACE):
            try:
                rows.append((number, _row(_DECODER.decode(stripped), name, number)))
            except json.JSONDecodeError as error:
                last = not any(later.strip(_SPACE) for later in lines[number:])
                reason = _reason(error) if last else f"no valid JSON ({error.msg}, column {error.colno})"
                raise DataError(f"{name}:{number}: {reason}; every line must be one JSON object") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}:{number}: {_plain(error)}") from None
    return rows


def _array(text: str, position: int, name: str) -> list[Row]:
    rows: list[Row] = []
    line, counted = 1, 0

    def place(at: int) -> int:  # lines are counted once, as the reading goes on
        nonlocal line, counted
        line += text.count("\n", counted, at)
        counted = at
        return line

    def skip(at: int) -> int:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        return at

    closed = False
    position = skip(position)
    if text.startswith("]", position):
        raise DataError(f"{name}: the array holds no rows")
    while not closed:
        start = place(position)
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: {_reason(error)}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{start}: {_plain(error)}") from None
        rows.append((start, _row(value, name, start)))
        position = skip(position)
        after = text[position : position + 1]
        if after not in (",", "]") or not after:
            what = f"found {after!r} after an object, not a comma" if after else "the array has no end: truncated"
            raise DataError(f"{name}:{place(position)}: {what}; get the file again")
        closed = after == "]"
        position = skip(position + 1)
    if position < len(text):
        raise DataError(f"{name}:{place(position)}: there is more after the end of the array")
    return rows
