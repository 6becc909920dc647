"""Drawing scenes: silhouettes in colour on a noisy grey ground, at run time and without any image file."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw

from mitigate.testbed.world import COLORS, Scene, Thing

if TYPE_CHECKING:
    from numpy.typing import NDArray

PICTURE_SIZE: Final = 64
"""Side of a picture in pixels."""

NOISE: Final = 7.0
"""Standard deviation of the pixel noise in grey levels."""

_OVERSAMPLING: Final = 8

Shape = tuple[str, tuple[float, ...]]
"""A primitive and its coordinates in percent of the glyph's side; a leading ``-`` cuts instead of painting."""

SHAPES: Final[dict[str, tuple[Shape, ...]]] = {
    "cup": (("ring", (50, 28, 98, 72)), ("poly", (4, 10, 72, 10, 64, 92, 12, 92))),
    "spoon": (("oval", (28, 0, 72, 48)), ("box", (43, 40, 57, 100))),
    "pot": (("box", (18, 36, 82, 92)), ("box", (0, 44, 100, 58)), ("box", (14, 18, 86, 28)), ("box", (42, 4, 58, 20))),
    "knife": (("poly", (36, 60, 36, 10, 50, 0, 68, 30, 68, 60)), ("box", (40, 66, 62, 100))),
    "book": (("poly", (0, 18, 46, 30, 46, 90, 0, 78)), ("poly", (100, 18, 54, 30, 54, 90, 100, 78))),
    "pencil": (("poly", (0, 100, 8, 70, 72, 4, 96, 28, 32, 92)), ("-poly", (60, 10, 66, 4, 98, 36, 92, 42))),
    "lamp": (("poly", (30, 4, 70, 4, 94, 48, 6, 48)), ("box", (44, 48, 56, 88)), ("box", (24, 86, 76, 98))),
    "desk": (
        ("box", (0, 24, 100, 40)),
        ("box", (4, 40, 16, 96)),
        ("box", (58, 40, 96, 96)),
        ("-box", (66, 50, 88, 58)),
        ("-box", (66, 74, 88, 82)),
    ),
    "tree": (("poly", (50, 0, 88, 42, 12, 42)), ("poly", (50, 22, 100, 76, 0, 76)), ("box", (42, 76, 58, 100))),
    "bird": (
        ("oval", (14, 30, 76, 72)),
        ("oval", (56, 12, 88, 44)),
        ("poly", (84, 22, 100, 30, 84, 36)),
        ("poly", (0, 34, 30, 44, 14, 62)),
        ("box", (38, 68, 44, 96)),
        ("box", (52, 68, 58, 96)),
    ),
    "flower": (
        ("oval", (32, 0, 68, 30)),
        ("oval", (32, 38, 68, 68)),
        ("oval", (10, 18, 44, 50)),
        ("oval", (56, 18, 90, 50)),
        ("-oval", (42, 26, 58, 42)),
        ("box", (46, 64, 54, 100)),
    ),
    "fence": (
        ("poly", (4, 20, 14, 4, 24, 20, 24, 96, 4, 96)),
        ("poly", (40, 20, 50, 4, 60, 20, 60, 96, 40, 96)),
        ("poly", (76, 20, 86, 4, 96, 20, 96, 96, 76, 96)),
        ("box", (0, 34, 100, 46)),
        ("box", (0, 66, 100, 78)),
    ),
    "boat": (
        ("poly", (0, 68, 100, 68, 80, 98, 20, 98)),
        ("poly", (46, 0, 46, 60, 6, 60)),
        ("poly", (56, 12, 56, 60, 90, 60)),
    ),
    "fish": (("oval", (22, 22, 100, 78)), ("poly", (0, 16, 36, 50, 0, 84)), ("-oval", (78, 38, 88, 48))),
    "bucket": (("arc", (12, 0, 88, 70)), ("poly", (6, 36, 94, 36, 78, 100, 22, 100))),
    "crab": (
        ("oval", (20, 44, 80, 86)),
        ("oval", (0, 8, 30, 38)),
        ("oval", (70, 8, 100, 38)),
        ("-poly", (15, 22, 8, 0, 24, 0)),
        ("-poly", (85, 22, 76, 0, 92, 0)),
        ("poly", (10, 34, 20, 34, 34, 54, 26, 58)),
        ("poly", (90, 34, 80, 34, 66, 54, 74, 58)),
        ("poly", (28, 80, 36, 84, 18, 100, 10, 98)),
        ("poly", (72, 80, 64, 84, 82, 100, 90, 98)),
    ),
    "car": (
        ("box", (0, 46, 100, 78)),
        ("poly", (22, 46, 34, 20, 70, 20, 84, 46)),
        ("oval", (10, 66, 38, 94)),
        ("oval", (62, 66, 90, 94)),
        ("-oval", (19, 75, 29, 85)),
        ("-oval", (71, 75, 81, 85)),
        ("-poly", (34, 44, 40, 28, 50, 28, 50, 44)),
    ),
    "cone": (
        ("poly", (44, 2, 56, 2, 66, 32, 34, 32)),
        ("poly", (31, 42, 69, 42, 80, 80, 20, 80)),
        ("box", (2, 84, 98, 98)),
    ),
    "house": (("poly", (50, 0, 100, 46, 0, 46)), ("box", (12, 46, 88, 98)), ("-box", (40, 62, 60, 98))),
    "key": (
        ("ring", (26, 0, 74, 46)),
        ("box", (44, 42, 56, 100)),
        ("box", (56, 66, 78, 76)),
        ("box", (56, 86, 78, 96)),
    ),
    "ball": (("oval", (4, 4, 96, 96)), ("-box", (4, 45, 96, 53)), ("-box", (46, 4, 54, 96))),
    "racket": (
        ("ring", (22, 0, 78, 64)),
        ("box", (46, 6, 54, 60)),
        ("box", (26, 28, 74, 36)),
        ("box", (43, 60, 57, 100)),
    ),
    "drum": (
        ("oval", (8, 6, 92, 38)),
        ("box", (8, 22, 92, 84)),
        ("oval", (8, 70, 92, 98)),
        ("-poly", (12, 46, 26, 80, 20, 46)),
        ("-poly", (36, 46, 50, 86, 44, 46)),
        ("-poly", (62, 46, 76, 82, 70, 46)),
        ("-arc", (8, 8, 92, 44)),
    ),
    "guitar": (
        ("oval", (0, 56, 52, 100)),
        ("oval", (18, 40, 58, 78)),
        ("-oval", (24, 60, 38, 74)),
        ("poly", (42, 50, 80, 12, 88, 20, 50, 58)),
        ("poly", (74, 10, 86, 0, 100, 14, 90, 26)),
    ),
}
"""Object class -> its silhouette."""


@lru_cache(maxsize=1024)
def _mask(name: str, size: int) -> NDArray[np.float32]:
    """Coverage of a glyph, `[size, size]`, 0..1."""
    side = size * _OVERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    stroke = max(1, round(side * 0.13))
    for kind, numbers in SHAPES[name]:
        ink = 0 if kind.startswith("-") else 255
        points = [value * (side - 1) / 100 for value in numbers]
        match kind.lstrip("-"):
            case "box":
                pen.rectangle(points, fill=ink)
            case "oval":
                pen.ellipse(points, fill=ink)
            case "ring":
                pen.ellipse(points, outline=ink, width=stroke)
            case "arc":
                pen.arc(points, 180, 360, fill=ink, width=stroke) if ink else pen.arc(points, 0, 180, width=stroke // 2)
            case _:
                pen.polygon(points, fill=ink)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0


def _paint(picture: NDArray[np.float32], thing: Thing, background: int) -> None:
    """Blend one object into `picture`, `[height, width, 3]`, in place."""
    mask = _mask(thing.name, thing.size)
    if thing.flaw == "occluded":
        # A bar of the background's brightness in front of a third of the object.
        mask = mask.copy()
        width = max(1, thing.size // 4)
        start = (thing.dx + thing.dy + thing.size) % (thing.size - width)
        mask[:, start : start + width] = 0.0
    left, top = _corner(thing)
    area = picture[top : top + thing.size, left : left + thing.size]
    mask = mask[: area.shape[0], : area.shape[1], None] * np.float32(thing.contrast)
    area += mask * (np.asarray(COLORS[thing.color], dtype=np.float32) - area)


def _corner(thing: Thing) -> tuple[int, int]:
    """Left and top pixel of an object."""
    return round(thing.col * PICTURE_SIZE / 3) + thing.dx, round(thing.row * PICTURE_SIZE / 3) + thing.dy


def box(thing: Thing) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of an object, as fractions of the picture."""
    left, top = _corner(thing)
    right, bottom = (min(start + thing.size, PICTURE_SIZE) for start in (left, top))
    return left / PICTURE_SIZE, top / PICTURE_SIZE, right / PICTURE_SIZE, bottom / PICTURE_SIZE


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene as an array.

    Returns
    -------
    ndarray
        `[64, 64, 3]`, RGB, 0..255; the same for the same scene.
    """
    # RandomState, because its stream is frozen: Generator's may change between numpy versions.
    noise = np.random.RandomState(scene.noise_seed).standard_normal((PICTURE_SIZE, PICTURE_SIZE, 3))
    picture = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), scene.background, dtype=np.float32)
    for thing in scene.things:
        _paint(picture, thing, scene.background)
    picture += noise.astype(np.float32) * np.float32(NOISE)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of 64 x 64 pixels; the same for the same scene."""
    return Image.fromarray(render(scene))
