"""Boxes against patches, by hand and against the drawn pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mitigate.benchmarks.testbed import Testbed
from mitigate.core.layout import ImageSpan
from mitigate.diagnostics.places import coverage, whole_raster


def test_coverage_by_hand() -> None:
    # two by two patches; the box covers the left half of the top right patch
    assert coverage([(0.5, 0.0, 0.75, 0.5)], (2, 2)).tolist() == [0.0, 0.5, 0.0, 0.0]
    assert coverage([(0.0, 0.0, 1.0, 1.0)], (2, 3)).tolist() == [1.0] * 6
    assert coverage([(0.25, 0.25, 0.75, 0.75)], (2, 2)).tolist() == [0.25] * 4
    assert coverage([], (2, 2)).tolist() == [0.0] * 4


def test_coverage_takes_the_larger_of_two_boxes() -> None:
    assert coverage([(0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.25, 1.0)], (1, 1)).tolist() == [0.5]


@pytest.mark.parametrize("index", range(5))
def test_the_testbeds_boxes_are_where_the_things_are_drawn(index: int) -> None:
    benchmark = Testbed(limit=5, tasks=("chair",))
    sample = benchmark.samples()[index]
    pixels = np.asarray(benchmark.images(sample)[0], dtype=float)
    boxes = benchmark.boxes(sample)
    assert set(sample.meta["objects"]) <= set(boxes)
    inside = np.zeros((64, 64), dtype=bool)
    for (box,) in boxes.values():
        left, top, right, bottom = (round(64 * edge) for edge in box)
        assert right - left == bottom - top <= 20
        inside[top:bottom, left:right] = True
    # colour, not grey: the ground is grey with noise
    bright = np.abs(pixels - np.median(pixels)).max(-1) > 90
    assert bright.any()
    assert not (bright & ~inside).any()
    assert inside.mean() < 0.7


def test_only_one_square_picture_in_one_raster_has_places() -> None:
    span = ImageSpan(0, torch.arange(4), (2, 2), 4)
    square, wide = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))
    assert whole_raster([span], [square]) is span
    assert whole_raster([span], [wide]) is None
    assert whole_raster([span, span], [square]) is None
    assert whole_raster([ImageSpan(0, torch.arange(4), None, 4)], [square]) is None
    assert whole_raster([], []) is None
