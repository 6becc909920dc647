"""Reading: what is accepted, and that every damage is an error with file and line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from mitigate.data import open_image, read_document, read_lines, read_rows
from mitigate.data.reading import watched
from mitigate.errors import DataError

ONE, TWO = {"a": 1}, {"a": "x\u2028y"}
TEXT = '{"a": "x\u2028y"}'.encode()


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b'{"a":1}\n' + TEXT + b"\n", [(1, ONE), (2, TWO)]),
        (b'{"a":1}\n' + TEXT, [(1, ONE), (2, TWO)]),
        (b'\xef\xbb\xbf{"a":1}\r\n\r\n  ' + TEXT + b"\r\n", [(1, ONE), (3, TWO)]),
        (b'[\n  {\n    "a": 1\n  },\n  ' + TEXT + b"\n]\n", [(2, ONE), (5, TWO)]),
        (b'\xef\xbb\xbf\n[{"a":1},\r\n' + TEXT + b"]", [(2, ONE), (3, TWO)]),
    ],
    ids=["lines", "no last line end", "Windows", "pretty array", "array with mark"],
)
def test_objects_come_with_their_lines(tmp_path: Path, data: bytes, rows: object) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", " is empty; it must hold JSON lines, or one JSON array of objects"),
        (b" \r\n\n", " is empty; it must hold JSON lines, or one JSON array of objects"),
        (b"\n[ ]", ": the array holds no rows"),
        (b'{"a":1}\n{"a":', ":2: the JSON ends in the middle: the file is truncated; get it again"),
        (b'{"a":1}\n{"a":"b', ":2: the JSON ends in the middle: the file is truncated; get it again"),
        (b'{"a":1}\n{"a":\n{"a":1}', ":2: no valid JSON"),
        (b'{\n"a":1}', ":1: no valid JSON"),
        (b'[{"a":1},\n{"a":', ":2: the JSON ends in the middle"),
        (b'[{"a":1},\n{"a":1}\n', ":3: the array has no end: truncated"),
        (b'[{"a":1},\n', ":2: the JSON ends in the middle"),
        (b'[{"a":1},\n]', ":2: no valid JSON"),
        (b'[{"a":1}]\n\n{"a":1}', ":3: there is more after the end of the array"),
        (b'[{"a":1}\n{"a":1}]', ":2: found '{' after an object, not a comma"),
        (b'{"a":1}\n{"b":{"a":1,"a":2}}', ":2: an object has the key 'a' twice"),
        (b'[{"a":1},\n{"a":1,"a":1}]', ":2: an object has the key 'a' twice"),
        (b'{"a":1}\n{"a":NaN}', ":2: NaN is no number of JSON"),
        (b'[{"a":-Infinity}]', ":1: -Infinity is no number of JSON"),
        (b'{"a":1}\n{"a":"\xff"}', ":2: byte 0xff is no UTF-8"),
        (b'{"a":1}\n\n7', ":3: expected a JSON object, but found a number"),
        (b'[{"a":1},\n\n["a"]]', ":3: expected a JSON object, but found an array"),
        (b'{"a":1}{"a":2}', ":1: no valid JSON (Extra data, column 8)"),
        (b"<!DOCTYPE html>", ":1: this is a web page, not data"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ":1: no valid JSON"),
        (b'{"a":1}\n' + b'{"a":' * 100_000, ":2: the JSON is nested too deeply"),
        (b"[" + b'{"a":' * 100_000, ":1: the JSON is nested too deeply"),
    ],
)
def test_damage_names_file_and_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for read in (read_rows, read_lines, read_document):
        with pytest.raises(DataError, match=r"no\.json does not exist"):
            read(tmp_path / "no.json")
        with pytest.raises(DataError, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_lines_keep_everything_but_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "task.txt"
    path.write_bytes(b"\xef\xbb\xbf a\tb \r\n\n\xe2\x80\xa8c\n")
    assert read_lines(path) == [(1, " a\tb "), (3, "\u2028c")]
    path.write_bytes(b"a\n\xff")
    with pytest.raises(DataError, match=r"task\.txt:2: byte 0xff"):
        read_lines(path)


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text('{"images": [\n{"id": 1}]}')
    assert read_document(path) == {"images": [{"id": 1}]}
    for text, message in (('{"a": 1,\n', ":2: the JSON ends"), ('{\n"a" 1}', ":2: no valid"), ("[NaN]", ": NaN is no")):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            read_document(path)
        assert str(caught.value).startswith(f"{path}{message}")


def test_what_is_read_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'{"a":1}')
    with watched() as seen:
        read_rows(path)
    read_document(path)
    assert seen == {str(path): hashlib.sha256(b'{"a":1}').hexdigest()}
    with watched() as seen:
        pass
    assert seen == {}


def test_pictures_are_rgb_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = Image.effect_noise((64, 64), 50.0)
    picture.save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 5)) == (picture.getpixel((3, 5)),) * 3
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"no picture at all"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.png cannot be read as a picture"):
            open_image(path)
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        open_image(tmp_path / "b.png")
