"""Three windows of decoder layers, one above the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mitigate.core.layers import parse_layers
from mitigate.errors import ConfigError


@dataclass(frozen=True)
class Windows:
    """Early, middle and deep layers, ascending."""

    early: tuple[int, ...]
    mid: tuple[int, ...]
    deep: tuple[int, ...]


def layer_windows(depth: int, early: str, mid: str, deep: str, *, owner: str) -> Windows:
    """Return the windows of a decoder with L layers.

    Parameters
    ----------
    depth
        L.
    early, mid, deep
        Layer ranges as in `parse_layers`, or ``auto``: [0, .08 L), [.40 L, .65 L), [.70 L, L), rounded, at least one
        layer each; or ``final``: for ``deep`` the last 8 %, for ``mid`` the quarter right below ``deep``.
    owner
        Whose parameters they are, for errors: ``methods.NAME``.

    Raises
    ------
    ConfigError
        If a window cannot be read, or they overlap or are out of order.
    """

    def layers(window: str, text: str, named: Mapping[str, range]) -> tuple[int, ...]:
        return tuple(named[text]) if text in named else parse_layers(text, depth, name=f"{owner}.{window}")

    few, quarter = max(1, round(0.08 * depth)), max(1, round(0.25 * depth))
    start = min(round(0.70 * depth), depth - 1)
    top = layers("deep", deep, {"auto": range(start, depth), "final": range(depth - few, depth)})
    start, stop = round(0.40 * depth), round(0.65 * depth)
    below = range(max(0, top[0] - quarter), top[0])
    middle = layers("mid", mid, {"auto": range(start, stop), "final": below})
    bottom = layers("early", early, {"auto": range(few)})
    if not (middle and bottom[-1] < middle[0] and middle[-1] < top[0]):
        raise ConfigError(
            f"{owner}: early (layers {_span(bottom)}), mid ({_span(middle)}) and deep ({_span(top)}) must follow one"
            f" another without overlap; set them in this order within layers 0-{depth - 1}"
        )
    return Windows(bottom, middle, top)


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}-{layers[-1]}" if layers else "none"
