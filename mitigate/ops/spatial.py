"""Neighbourhoods on a raster of image patches."""

from __future__ import annotations

_SQUARE_3 = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0))
_SQUARE_5 = tuple((row, column) for row in range(-2, 3) for column in range(-2, 3) if (row, column) != (0, 0))

#: Name -> offsets ``(row, column)``: 8-connected, 4-connected, and all patches within two steps.
NEIGHBOURHOODS = {"8": _SQUARE_3, "4": ((-1, 0), (0, -1), (0, 1), (1, 0)), "radius2": _SQUARE_5}


def neighbours(patch: int, grid: tuple[int, int], kind: str) -> list[int]:
    """Return the raster indices of a patch's neighbours inside the grid, ascending.

    Parameters
    ----------
    patch
        Raster index (row times columns plus column).
    grid
        ``(rows, columns)``.
    kind
        Key of `NEIGHBOURHOODS`.
    """
    rows, columns = grid
    row, column = divmod(patch, columns)
    places = ((row + down, column + right) for down, right in NEIGHBOURHOODS[kind])
    return sorted(r * columns + c for r, c in places if 0 <= r < rows and 0 <= c < columns)


def interior(grid: tuple[int, int]) -> list[int]:
    """Return the raster indices of the patches that do not lie on the border; empty when a side is below 3."""
    rows, columns = grid
    return [row * columns + column for row in range(1, rows - 1) for column in range(1, columns - 1)]
