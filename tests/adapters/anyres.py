"""Pictures cut into tiles, counted again from the rules: which resolution fits, and what of it is padding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from PIL import Image


def picture(height, width, seed=0):
    noise = np.random.default_rng((height, width, seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def cut(size, pinpoints, tile):
    """Rows and columns of tiles: of all resolutions the one that keeps most of the picture and wastes least."""

    def value(resolution):
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    height, width = max(pinpoints, key=value)
    return height // tile, width // tile


def window(size, rows, columns):
    """The rows and the columns of a raster in whose middle a picture lies, the other ones being padding."""
    shown_rows = min(rows, math.floor(Fraction(size[0] * columns, size[1])))
    shown_columns = min(columns, math.floor(Fraction(size[1] * rows, size[0])))
    above, left = (rows - shown_rows) // 2, (columns - shown_columns) // 2
    return range(above, rows - above), range(left, columns - left)


def embedded(model, inputs, mark):
    """Run a forward in which every patch carries its mark; returns what the decoder reads.

    ``mark`` gets the shape of each output of the projector and returns ``[tiles, patches, n]``, the first n features.
    """
    read = []

    def marked(module, args, output):
        marks = mark(output.shape)
        return torch.nn.functional.pad(marks, (0, output.shape[-1] - marks.shape[-1]))

    hooks = [
        model.model.multi_modal_projector.register_forward_hook(marked),
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return read[0]
