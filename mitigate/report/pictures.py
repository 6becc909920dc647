"""Pictures inside the page: small copies as data addresses, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitigate.benchmarks.base import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

#: Longest side of a picture of the page.
LONGEST = 384
#: Pictures with a shorter longest side are enlarged by the browser without smoothing, and kept without loss.
PIXELATED = 192
#: Characters of all pictures of a page together.
BUDGET = 9_000_000
_QUALITY = 78


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page: its data address and its size."""

    url: str
    width: int
    height: int
    pixelated: bool


@dataclass
class Album:
    """The pictures of the shown samples.

    Parameters
    ----------
    pictures
        Picture id -> its thumbnails; nothing for those that could not be shown.
    unreadable
        Picture id -> why it could not be read.
    left_out
        How many were left out to keep the page small.
    """

    pictures: dict[str, list[Thumbnail]]
    unreadable: dict[str, str]
    left_out: int = 0


def collect(benchmark: Benchmark, records: Iterable[SampleRecord], *, budget: int = BUDGET) -> Album:
    """Make thumbnails of the pictures of some samples, each picture once.

    Parameters
    ----------
    benchmark
        Brings the pictures.
    records
        Samples in the order of the page.
    budget
        Characters all of them together may take.
    """
    album = Album({}, {})
    for record in records:
        if record.image_id in album.pictures or record.image_id in album.unreadable:
            continue
        album.pictures[record.image_id] = []
        if budget <= 0:
            album.left_out += 1
            continue
        sample = Sample(
            id=record.id, image_id=record.image_id, task=record.task, prompt=record.prompt, meta=record.meta
        )
        try:
            made = [thumbnail(picture) for picture in benchmark.images(sample)]
        except Exception as error:  # the page is worth having without its pictures
            del album.pictures[record.image_id]
            album.unreadable[record.image_id] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        album.pictures[record.image_id] = made
        budget -= sum(len(picture.url) for picture in made)
    return album


def thumbnail(picture: Image) -> Thumbnail:
    """Return a small copy: a PNG of a picture that is small already, otherwise a JPEG."""
    shown = picture.convert("RGB")
    small = max(shown.size) < PIXELATED
    if not small:
        shown.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    if small:
        shown.save(buffer, format="PNG", optimize=True)
    else:
        shown.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{'png' if small else 'jpeg'};base64,{data}", *shown.size, small)
