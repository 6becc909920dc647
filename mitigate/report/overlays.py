"""Pictures with something drawn over their patches: heat maps and marks on the raster of a picture's tokens.

The ground is the picture as the model saw it, after the processor's resizing and cropping; the patch raster covers
exactly that. Shapes: N patches of a raster of ``rows x columns``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: Ends and middles of the heat map's colours, dark to bright (as in "inferno"; readable in grey, too).
_STOPS: Final = np.array(
    [(0, 0, 4), (58, 9, 99), (120, 28, 109), (187, 55, 84), (237, 105, 37), (252, 181, 25), (252, 255, 164)], float
)
#: Side of a drawn picture in pixels.
SIDE: Final = 384
_STRIP, _GAP = 26, 10


def seen_picture(pixels: Any, processor: Any) -> Picture | None:
    """Turn one image's model input back into a picture.

    Parameters
    ----------
    pixels
        ``[3, height, width]`` as the image processor made them.
    processor
        Its processor: knows mean and standard deviation of the colours.

    Returns
    -------
    Picture or None
        ``None`` where the input is no such raster.
    """
    shape: tuple[int, ...] = tuple(getattr(pixels, "shape", ()))
    if len(shape) != 3 or shape[0] != 3:
        return None
    image = getattr(processor, "image_processor", processor)
    values = np.moveaxis(pixels.detach().float().cpu().numpy(), 0, -1)
    if getattr(image, "do_normalize", True):
        values = values * np.asarray(image.image_std) + np.asarray(image.image_mean)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8), "RGB")


def heat(values: ArrayLike, grid: tuple[int, int], *, top: float | None = None) -> Picture:
    """Return a heat map with one pixel per patch, transparent where nothing is; ``[N]`` in raster order.

    Parameters
    ----------
    top
        Value of the brightest colour; the largest one by default.
    """
    numbers = np.nan_to_num(np.asarray(values, dtype=np.float64)).reshape(grid).clip(0.0, None)
    top = float(numbers.max()) if top is None else top
    level = (numbers / top).clip(0.0, 1.0) if top > 0 else np.zeros(grid)
    place = level * (len(_STOPS) - 1)
    below = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - below)[..., None]
    colour = _STOPS[below] * (1 - part) + _STOPS[below + 1] * part
    alpha = 40 + 180 * np.sqrt(level)
    return Image.fromarray(np.concatenate([colour, alpha[..., None]], -1).round().astype(np.uint8), "RGBA")


def over(picture: Picture, values: ArrayLike, grid: tuple[int, int], *, top: float | None = None) -> Picture:
    """Draw a heat map over a picture, enlarged to `SIDE`."""
    ground = enlarged(picture).convert("RGBA")
    layer = heat(values, grid, top=top).resize(ground.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(ground, layer).convert("RGB")


def marked(picture: Picture, chosen: ArrayLike, grid: tuple[int, int], colour: str = "#D55E00") -> Picture:
    """Frame the chosen patches of a picture, ``[N]`` bool, enlarged to `SIDE`; the others are darkened."""
    ground = enlarged(picture)
    mask: NDArray[np.bool_] = np.asarray(chosen, dtype=bool).reshape(grid)
    dark = Image.fromarray(np.where(mask, 0, 110).astype(np.uint8), "L").resize(ground.size, Image.Resampling.NEAREST)
    drawn = Image.composite(Image.new("RGB", ground.size), ground, dark)
    pen = ImageDraw.Draw(drawn)
    wide, high = ground.width / grid[1], ground.height / grid[0]
    for row, column in np.argwhere(mask):
        corner = (column * wide + 1, row * high + 1, (column + 1) * wide - 2, (row + 1) * high - 2)
        pen.rectangle(corner, outline=colour, width=2)
    return drawn


def enlarged(picture: Picture) -> Picture:
    """Return a picture whose longer side is `SIDE` pixels; small ones keep their pixels visible."""
    factor = SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    how = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.BICUBIC
    return picture.convert("RGB").resize(size, how)


def sheet(panels: Mapping[str, Picture] | Sequence[tuple[str, Picture]]) -> Picture:
    """Put pictures side by side, each with its title above."""
    items = list(panels.items()) if isinstance(panels, Mapping) else list(panels)
    font = ImageFont.load_default(size=14)
    width = sum(picture.width for _, picture in items) + _GAP * (len(items) + 1)
    height = max(picture.height for _, picture in items) + _STRIP + _GAP
    page = Image.new("RGB", (width, height), "white")
    pen, left = ImageDraw.Draw(page), _GAP
    for title, picture in items:
        pen.text((left, 5), _fitting(pen, title, picture.width, font), fill="black", font=font)
        page.paste(picture, (left, _STRIP))
        left += picture.width + _GAP
    return page


def _fitting(pen: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
