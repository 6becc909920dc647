"""Pictures of COCO 2014 with what its annotations say about them."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from mitigate.data import data_folder, read_document, read_lines, require_file
from mitigate.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

DEFAULT_PICTURES: Final = 500
SPLITS: Final = ("val2014", "train2014")

_ENTRY: Final = re.compile(r"(?:.*[/\\])?(?:COCO_(?:train|val)2014_)?0*([1-9]\d*)(?:\.jpg)?")
_KEPT: Final = ("id", "image_id", "category_id", "caption", "name", "file_name", "images", "annotations", "categories")


@dataclass(frozen=True)
class Picture:
    """A picture of COCO 2014.

    Parameters
    ----------
    id
        As in the annotations.
    file
        Its file below the folder of COCO, such as ``val2014/COCO_val2014_000000000042.jpg``.
    categories
        Names of the categories that are segmented in it, sorted; empty if nobody asked for them.
    captions
        Its reference captions.
    """

    id: int
    file: str
    categories: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """One annotation file: picture -> file name, and picture -> its segmented categories or its captions."""

    files: Mapping[int, str]
    notes: Mapping[int, Sequence[str]]


def pictures(
    benchmark: str, data_dir: str | None, manifest: str | None, limit: int | None, *, segmented: bool
) -> list[Picture]:
    """Return the pictures of a list, or the default ones.

    The default pictures are those of val2014 whose ids, written in decimal, have the smallest sha256: an order that
    anybody can compute and that depends on nothing but the ids.

    Parameters
    ----------
    benchmark
        Who asks, for the errors.
    data_dir
        As for `mitigate.data.data_folder`.
    manifest
        File of ids or file names, one a line; ``None`` for the default pictures.
    limit
        How many, from the first; without a manifest any number, `DEFAULT_PICTURES` if not given.
    segmented
        Whether to read the segmented categories, too.

    Raises
    ------
    DataError
        If a file is missing or damaged, the list names a picture twice, or one that the annotations do not know.
    """
    folder = data_folder("coco", data_dir) / "annotations"
    kinds = ("instances", "captions") if segmented else ("captions",)
    known = {SPLITS[0]: [_read(folder, kind, SPLITS[0], benchmark) for kind in kinds]}
    if manifest is None:
        chosen = [(number, f"{folder}") for number in in_default_order(known[SPLITS[0]][0].files)]
        wanted = limit or DEFAULT_PICTURES
        if len(chosen) < wanted:
            warnings.warn(
                f"{folder} has annotations of {len(chosen)} pictures, not of {wanted}: these are not the pictures that "
                "others evaluate by default",
                stacklevel=2,
            )
        chosen = chosen[:wanted]
    else:
        chosen = _read_manifest(manifest)[:limit]
    if any(number not in known[SPLITS[0]][0].files for number, _ in chosen):
        known[SPLITS[1]] = [_read(folder, kind, SPLITS[1], benchmark) for kind in kinds]
    return [_picture(number, place, known, segmented=segmented) for number, place in chosen]


def other_names(number: str, file: str) -> tuple[str, ...]:
    """Return how else a predictions file may call a picture: its file, with and without ending, its id with zeros."""
    name, padded = file.rpartition("/")[2], number.zfill(12)
    return (name, name.removesuffix(".jpg"), padded, f"{padded}.jpg")


def in_default_order(ids: Iterable[int]) -> list[int]:
    """Return ids by the sha256 of their decimal form: an arbitrary order that everybody finds again."""
    return sorted(ids, key=lambda number: hashlib.sha256(str(number).encode("ascii")).digest())


def _picture(number: int, place: str, known: Mapping[str, Sequence[Annotations]], *, segmented: bool) -> Picture:
    for split, files in known.items():
        if all(number in each.files for each in files):
            categories = sorted(set(files[0].notes.get(number, ()))) if segmented else ()
            return Picture(
                number, f"{split}/{files[0].files[number]}", tuple(categories), tuple(files[-1].notes.get(number, ()))
            )
    raise DataError(
        f"{place}: the annotations of COCO 2014 do not know the picture {number}\n"
        "take it out of the list; without annotations everything said about it would count as hallucinated"
    )


def _read_manifest(path: str) -> list[tuple[int, str]]:
    """Return ids with their places (``file:line``)."""
    from pathlib import Path

    places: dict[int, str] = {}
    for line, text in read_lines(Path(path).expanduser()):
        entry, place = text.strip(), f"{path}:{line}"
        if entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise DataError(
                f"{place}: {entry!r:.60} is neither an id of COCO nor a file name such as COCO_val2014_*.jpg"
            )
        number = int(match.group(1))
        if number in places:
            raise DataError(f"{place}: the picture {number} is listed already, at {places[number]}; delete one")
        places[number] = place
    if not places:
        raise DataError(f"{path} lists no pictures; write one id or file name a line")
    return list(places.items())


def _read(folder: Path, kind: str, split: str, benchmark: str) -> Annotations:
    path = require_file(folder / f"{kind}_{split}.json", benchmark)
    stat = path.stat()
    return _read_once(path, kind, split, stat.st_mtime_ns, stat.st_size)


def _shrink(value: dict[str, Any]) -> dict[str, Any]:
    """Keep what is used: the outlines of objects are nine tenths of the file."""
    return {key: value[key] for key in _KEPT if key in value}


@lru_cache(maxsize=4)
def _read_once(path: Path, kind: str, split: str, changed: int, size: int) -> Annotations:
    """Read a file; once, because a benchmark's samples are asked for several times. Change and size tell versions."""
    del changed, size
    data = read_document(path, _shrink)
    parts = ("images", "annotations", "categories") if kind == "instances" else ("images", "annotations")
    for part in parts:
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise DataError(f"{path} has no list {part!r}; it must be {kind}_{split}.json as COCO publishes it")
    files: dict[int, str] = {}
    for row in data["images"]:
        number = _whole(row, "id", path, "images")
        if number in files:
            raise DataError(f"{path}: two pictures have the id {number}; get the file again")
        # The names follow from the ids, and files made by hand leave them out.
        files[number] = row.get("file_name", f"COCO_{split}_{number:012d}.jpg")
        if not isinstance(files[number], str) or "/" in files[number] or "\\" in files[number]:
            raise DataError(f"{path}: the file_name of picture {number} must be the name of a file")
    names = _categories(data["categories"], path) if kind == "instances" else {}
    notes: dict[int, list[str]] = {}
    for row in data["annotations"]:
        number = _whole(row, "image_id", path, "annotations")
        if number not in files:
            raise DataError(f"{path}: an annotation is about the picture {number}, which is not in the file's images")
        if kind == "captions":
            text = row.get("caption")
            if not isinstance(text, str):
                raise DataError(f"{path}: an annotation of picture {number} has no caption")
        else:
            category = _whole(row, "category_id", path, "annotations")
            if category not in names:
                raise DataError(f"{path}: an annotation of picture {number} has the unknown category_id {category}")
            text = names[category]
        notes.setdefault(number, []).append(text)
    return Annotations(files, notes)


def _categories(rows: Sequence[Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for row in rows:
        number = _whole(row, "id", path, "categories")
        if number in names or not isinstance(row.get("name"), str):
            raise DataError(f"{path}: the category {number} is there twice or has no name; get the file again")
        names[number] = row["name"]
    return names


def _whole(row: Any, key: str, path: Path, part: str) -> int:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{path}: an entry of {part!r} has no whole number as {key!r}; get the file again")
    return value
