"""The world of the testbed: objects, themes, pairs, and the scenes made of them.

A scene is a handful of objects on a 3 x 3 grid. In training, objects come with their partner and with the mates of
their theme; in validation and test the partners are separated, so that a model which describes what usually comes
along, instead of what is in the picture, is caught. Everything is drawn from named seeds: `scene("test", 7)` is the
same scene on every machine, and no scene has to be generated to get at another one.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Split = Literal["train", "validation", "test"]
"""The three splits. No composition (which object in which colour in which cell) occurs in two of them."""

SPLITS: Final[tuple[Split, ...]] = get_args(Split)

THEMES: Final[dict[str, tuple[tuple[str, str], tuple[str, str]]]] = {
    "kitchen": (("cup", "spoon"), ("pot", "knife")),
    "study": (("book", "pencil"), ("lamp", "desk")),
    "garden": (("tree", "bird"), ("flower", "fence")),
    "beach": (("boat", "fish"), ("bucket", "crab")),
    "street": (("car", "cone"), ("house", "key")),
    "club": (("ball", "racket"), ("drum", "guitar")),
}
"""Theme -> its two pairs. A theme has four mates; each of them has exactly one partner."""

OBJECTS: Final[tuple[str, ...]] = tuple(name for pairs in THEMES.values() for pair in pairs for name in pair)
"""All object classes in theme order, which is also the order in which captions name them."""

PARTNER: Final[dict[str, str]] = {
    name: other for pairs in THEMES.values() for pair in pairs for name, other in (pair, pair[::-1])
}
THEME_OF: Final[dict[str, str]] = {name: theme for theme, pairs in THEMES.items() for pair in pairs for name in pair}

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (222, 48, 44),
    "green": (46, 176, 66),
    "blue": (58, 104, 232),
    "yellow": (238, 208, 48),
    "purple": (168, 70, 206),
    "white": (238, 238, 238),
}
"""Colour word -> RGB, 0..255."""

ROWS: Final[tuple[str, ...]] = ("top", "middle", "bottom")
COLUMNS: Final[tuple[str, ...]] = ("left", "center", "right")
PLACES: Final[tuple[str, ...]] = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
"""The words of the nine cells in reading order."""

MIN_OBJECTS: Final = 2
MAX_OBJECTS: Final = 8
WORLD_SEED: Final = 20

Flaw = Literal["none", "faint", "occluded", "small"]
"""What makes an object harder to see."""

FLAW_RATE: Final = 0.15

TOGETHER: Final[dict[Split, float]] = {"train": 0.95, "validation": 0.0, "test": 0.0}
"""Probability that an object's partner is in the scene too."""

THEME_BIAS: Final[dict[Split, float]] = {"train": 0.8, "validation": 0.4, "test": 0.4}
"""Probability that the next object is taken from the scene's own theme, while it still has some to give."""

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object in a scene.

    Attributes
    ----------
    name, color
        Words of `OBJECTS` and `COLORS`.
    row, col
        Cell, 0..2 each, from the top left.
    size
        Side of the drawn glyph in pixels.
    dx, dy
        Offset of the glyph from its cell's top left corner in pixels.
    contrast
        Share of the way from the background to the colour, 0..1.
    flaw
        What makes it harder to see.
    """

    name: str
    color: str
    row: int
    col: int
    size: int
    dx: int
    dy: int
    contrast: float = 1.0
    flaw: Flaw = "none"

    @property
    def place(self) -> str:
        """Words of the cell, such as ``top left``."""
        return f"{ROWS[self.row]} {COLUMNS[self.col]}"


@dataclass(frozen=True)
class Scene:
    """A scene with its exact ground truth.

    Attributes
    ----------
    id
        ``<split>-<index>``; together with the world seed it determines everything else.
    split, theme
        Where it belongs, and the theme most of its objects come from.
    things
        Its objects in theme order; each class at most once.
    background
        Grey level 0..255 of the empty picture.
    noise_seed
        Seed of the pixel noise.
    """

    id: str
    split: Split
    theme: str
    things: tuple[Thing, ...]
    background: int
    noise_seed: int

    @cached_property
    def objects(self) -> frozenset[str]:
        """Names of the objects in the scene."""
        return frozenset(thing.name for thing in self.things)

    @property
    def composition(self) -> str:
        """What is where in which colour, as text; splits never share one."""
        return ";".join(f"{t.name},{t.color},{t.row},{t.col}" for t in self.things)


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    # Only Random.random() is promised to give the same stream in every Python version; choice and shuffle are not.
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def _home_split(composition: str) -> Split:
    """Tell the only split a composition may occur in: six in eight go to training, one each to validation and test."""
    bucket = zlib.crc32(composition.encode()) % 8
    return "validation" if bucket == 6 else "test" if bucket == 7 else "train"


def _draw_names(rng: random.Random, theme: str, together: float, theme_bias: float) -> list[str]:
    count = MIN_OBJECTS + int(rng.random() * (MAX_OBJECTS - MIN_OBJECTS + 1))
    own = _shuffled(rng, THEMES[theme])
    others = _shuffled(rng, [pair for name, pairs in THEMES.items() if name != theme for pair in pairs])
    names: list[str] = []
    while len(names) < count:
        pair = own.pop() if own and (rng.random() < theme_bias or not others) else others.pop()
        first = int(rng.random() * 2)
        names.append(pair[first])
        if rng.random() < together and len(names) < MAX_OBJECTS:
            names.append(pair[1 - first])
    return names


def _place_thing(rng: random.Random, name: str, cell: int) -> Thing:
    flaw: Flaw = "none"
    contrast = 0.85 + 0.15 * rng.random()
    size = 16 + int(rng.random() * 5)
    if rng.random() < FLAW_RATE:
        flaw = _pick(rng, ("faint", "occluded", "small"))
        contrast = 0.45 + 0.15 * rng.random() if flaw == "faint" else contrast
        size = 13 + int(rng.random() * 2) if flaw == "small" else size
    room = 21 - size
    return Thing(
        name=name,
        color=_pick(rng, tuple(COLORS)),
        row=cell // 3,
        col=cell % 3,
        size=size,
        dx=int(rng.random() * (room + 1)),
        dy=int(rng.random() * (room + 1)),
        contrast=round(contrast, 3),
        flaw=flaw,
    )


def scene(
    split: Split,
    index: int,
    *,
    together: float | None = None,
    theme_bias: float | None = None,
    seed: int = WORLD_SEED,
) -> Scene:
    """Return the scene with this number in a split.

    Parameters
    ----------
    split
        Split whose namespace of seeds, and of compositions, the scene is taken from.
    index
        Any number >= 0; splits have no end.
    together
        Probability in 0..1 that partners come together; the split's own value (`TOGETHER`) by default.
    theme_bias
        Probability in 0..1 of staying within the theme; the split's own value (`THEME_BIAS`) by default.
    seed
        Seed of the world.

    Returns
    -------
    Scene
        The same one for the same arguments, everywhere.

    Raises
    ------
    ValueError
        If the split is unknown, the index negative or a probability outside 0..1.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; it must be one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index must not be negative, but is {index}")
    together = TOGETHER[split] if together is None else together
    theme_bias = THEME_BIAS[split] if theme_bias is None else theme_bias
    for name, value in (("together", together), ("theme_bias", theme_bias)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, but is {value}")
    rng = random.Random(f"mitigate-world/{seed}/{split}/{index}")
    while True:
        theme = _pick(rng, tuple(THEMES))
        names = sorted(_draw_names(rng, theme, together, theme_bias), key=OBJECTS.index)
        cells = _shuffled(rng, range(9))
        things = tuple(_place_thing(rng, name, cell) for name, cell in zip(names, cells, strict=False))
        made = Scene(
            id=f"{split}-{index}",
            split=split,
            theme=theme,
            things=things,
            background=int(20 + rng.random() * 40),
            noise_seed=int(rng.random() * 2**31),
        )
        if _home_split(made.composition) == split:
            return made


def scenes(split: Split, count: int, *, start: int = 0, seed: int = WORLD_SEED) -> Iterator[Scene]:
    """Yield the scenes ``start .. start + count - 1`` of a split with the split's own co-occurrence.

    Raises
    ------
    ValueError
        As `scene` does.
    """
    for index in range(start, start + count):
        yield scene(split, index, seed=seed)


def is_related(name: str, present: frozenset[str]) -> bool:
    """Whether an object is the partner or a theme-mate of something present."""
    return any(THEME_OF[other] == THEME_OF[name] for other in present if other != name)
