"""The drawn world: scenes, splits, pictures."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitigate.testbed.draw import NOISE, PICTURE_SIZE, SHAPES, draw, render
from mitigate.testbed.world import (
    COLORS,
    OBJECTS,
    PARTNER,
    SPLITS,
    THEME_OF,
    THEMES,
    is_related,
    scene,
    scenes,
)

splits = st.sampled_from(SPLITS)
indices = st.integers(min_value=0, max_value=10**9)


def test_there_are_enough_objects_in_pairs_and_themes() -> None:
    assert len(OBJECTS) >= 24
    assert len(set(OBJECTS)) == len(OBJECTS)
    assert set(SHAPES) == set(OBJECTS) == set(PARTNER) == set(THEME_OF)
    assert all(PARTNER[PARTNER[name]] == name != PARTNER[name] for name in OBJECTS)
    assert Counter(THEME_OF.values()) == dict.fromkeys(THEMES, 4)


@given(split=splits, index=indices)
@settings(max_examples=60, deadline=None)
def test_scenes_are_well_formed(split: str, index: int) -> None:
    made = scene(split, index)
    assert made.id == f"{split}-{index}"
    assert 2 <= len(made.things) <= 8
    assert len(made.objects) == len(made.things), "a class at most once"
    assert len({(thing.row, thing.col) for thing in made.things}) == len(made.things), "a cell at most once"
    assert [thing.name for thing in made.things] == sorted(made.objects, key=OBJECTS.index)
    for thing in made.things:
        assert thing.color in COLORS
        assert thing.dx + thing.size <= 21
        assert thing.dy + thing.size <= 21


@given(split=splits, index=indices)
@settings(max_examples=20, deadline=None)
def test_scenes_are_the_same_every_time(split: str, index: int) -> None:
    assert scene(split, index) == scene(split, index)
    assert scene(split, index) != scene(split, index, seed=1)
    assert render(scene(split, index)).tobytes() == render(scene(split, index)).tobytes()


def test_scenes_do_not_change_between_releases() -> None:
    made = scene("test", 1)
    assert made.composition == "pot,red,2,1;fish,green,1,0;house,green,1,1"
    assert made.noise_seed == 701414300


def test_no_two_splits_share_a_composition() -> None:
    seen = {split: {made.composition for made in scenes(split, 1500)} for split in SPLITS}
    # Two objects in a cell and a colour each: there are few such scenes, so by chance alone some would be shared.
    small = {
        split: {scene(split, index, together=0, theme_bias=1).composition for index in range(1500)} for split in SPLITS
    }
    for group in (seen, small):
        for first in SPLITS:
            for second in SPLITS:
                assert first == second or not group[first] & group[second]


def test_pairs_come_together_in_training_and_never_in_test() -> None:
    def share(split: str) -> float:
        held = [PARTNER[name] in made.objects for made in scenes(split, 500) for name in made.objects]
        return sum(held) / len(held)

    assert share("train") > 0.85
    assert share("validation") == 0.0
    assert share("test") == 0.0


def test_training_scenes_keep_to_their_theme() -> None:
    def share(bias: float) -> float:
        made = [scene("train", index, theme_bias=bias) for index in range(300)]
        return sum(THEME_OF[name] == one.theme for one in made for name in one.objects) / sum(
            len(one.objects) for one in made
        )

    assert share(0.9) > share(0.1) + 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exam", 0, {}), "unknown split 'exam'"),
        (("test", -1, {}), "index must not be negative"),
        (("test", 0, {"together": 1.5}), "together must be between 0 and 1"),
        (("test", 0, {"theme_bias": -0.1}), "theme_bias must be between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, int, dict[str, float]], message: str) -> None:
    split, index, options = arguments
    with pytest.raises(ValueError, match=message):
        scene(split, index, **options)


def test_related_means_partner_or_theme_mate() -> None:
    assert is_related("spoon", frozenset({"cup"}))
    assert is_related("knife", frozenset({"cup"}))
    assert not is_related("boat", frozenset({"cup"}))
    assert not is_related("cup", frozenset({"cup"}))


def test_pictures_have_the_right_form() -> None:
    picture = draw(scene("test", 0))
    assert picture.mode == "RGB"
    assert picture.size == (PICTURE_SIZE, PICTURE_SIZE)


def test_objects_are_drawn_where_and_as_the_scene_says() -> None:
    for made in scenes("test", 60):
        picture = render(made).astype(float)
        empty = {(row, col) for row in range(3) for col in range(3)} - {(t.row, t.col) for t in made.things}
        for row, col in empty:
            top, left = round(row * 64 / 3), round(col * 64 / 3)
            assert abs(picture[top + 1 : top + 20, left + 1 : left + 20].mean() - made.background) < 3
        for thing in made.things:
            top, left = round(thing.row * 64 / 3) + thing.dy, round(thing.col * 64 / 3) + thing.dx
            area = picture[top : top + thing.size, left : left + thing.size].reshape(-1, 3)
            brightest = area[np.argsort(np.abs(area - made.background).sum(1))[-10:]].mean(0)
            wanted = made.background + thing.contrast * (np.array(COLORS[thing.color]) - made.background)
            assert np.abs(brightest - wanted).max() < 40, (made.id, thing)
            around = np.ones((64, 64), dtype=bool)
            around[top : top + thing.size, left : left + thing.size] = False
            cell_top, cell_left = round(thing.row * 64 / 3), round(thing.col * 64 / 3)
            inside = np.zeros_like(around)
            inside[cell_top : cell_top + 21, cell_left : cell_left + 21] = True
            assert np.abs(picture[around & inside] - made.background).max(initial=0) < 6 * NOISE


def test_some_objects_are_harder_to_see() -> None:
    flaws = Counter(thing.flaw for made in scenes("test", 500) for thing in made.things)
    total = sum(flaws.values())
    assert 0.8 < flaws["none"] / total < 0.9
    assert all(flaws[flaw] > 0.03 * total for flaw in ("faint", "occluded", "small"))


def test_silhouettes_differ() -> None:
    from mitigate.testbed.draw import _mask

    masks = [_mask(name, 18) for name in OBJECTS]
    for first in range(len(masks)):
        for second in range(first):
            assert np.abs(masks[first] - masks[second]).mean() > 0.05, (OBJECTS[first], OBJECTS[second])


def test_world_and_language_need_no_torch() -> None:
    code = (
        "import sys, mitigate.testbed.world, mitigate.testbed.draw, mitigate.testbed.language;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
