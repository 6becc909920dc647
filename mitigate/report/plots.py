"""Geometry of the report's plots; the template draws them as inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from mitigate.runner.table import number

WIDTH = 640.0
ROW = 34.0
#: Width of a character and height of a line of the largest text, that of small screens.
CHARACTER, LABEL = 10.0, 20.0
#: Longest name in full, and the widths of an interval's text and of its gap.
_NAME, _INTERVAL, _GAP = 18, 205.0, 16.0
#: Left and lower end of the cost plot's frame.
LEFT, BOTTOM = 52.0, 300.0


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers that cover a range: multiples of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9:  # nothing differs: one unit on either side
        low, high = low - 1.0, high + 1.0
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _label(value: float, marks: list[float], *, sign: bool = False) -> str:
    digits = 0 if all(float(mark).is_integer() for mark in marks) else (1 if len(marks) < 2 else _digits(marks))
    return number(value, digits, sign=sign and value != 0)


def _digits(marks: list[float]) -> int:
    return max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))


def difference_plot(comparison: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Lay out a metric's paired differences with intervals, one row per stack; ``None`` if there are none."""
    metric = comparison["metrics"][name]
    unit = 100.0 if metric["percent"] else 1.0
    rows = []
    for stack, data in comparison["stacks"].items():
        difference = data["differences"].get(name)
        if difference is None or None in (difference["value"], difference["low"], difference["high"]):
            continue
        value, low, high = (unit * difference[key] for key in ("value", "low", "high"))
        rows.append((stack, value, low, high, bool(difference["excludes_zero"])))
    if not rows:
        return None
    marks = ticks(min(0.0, *(row[2] for row in rows)), max(0.0, *(row[3] for row in rows)), wanted=4)
    names = {row[0]: _short(row[0]) for row in rows}
    # Names and numbers have columns of their own, where no line crosses them.
    left, right, top = CHARACTER * max(map(len, names.values())) + _GAP, WIDTH - _INTERVAL - _GAP, 10.0
    bottom = top + ROW * len(rows)

    def x(value: float) -> float:
        return round(left + (right - left) * (value - marks[0]) / (marks[-1] - marks[0]), 1)

    better = None if metric["higher_is_better"] is None else ("right" if metric["higher_is_better"] else "left")
    return {
        "title": metric["title"],
        "unit": "percentage points" if metric["percent"] else "",
        "better": better,
        "height": bottom + 24,
        "bottom": bottom,
        "zero": x(0.0),
        "ticks": [{"x": x(mark), "label": _label(mark, marks, sign=True)} for mark in marks],
        "rows": [
            {
                "stack": stack,
                "name": names[stack],
                "y": round(top + ROW * (index + 0.5), 1),
                "x": x(value),
                "low": x(low),
                "high": x(high),
                "sure": clear,
                "tone": _tone(metric, value, clear),
                "text": f"{number(value, sign=True)} [{number(low, sign=True)}, {number(high, sign=True)}]",
            }
            for index, (stack, value, low, high, clear) in enumerate(rows)
        ],
    }


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _tone(metric: Mapping[str, Any], value: float, clear: bool) -> str:
    if not clear or metric["higher_is_better"] is None:
        return "same"
    return "better" if (value > 0) == metric["higher_is_better"] else "worse"


def cost_plot(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lay out quality against cost: the first headline metric over milliseconds per token, one point per stack."""
    if not comparison["headline"]:
        return None
    name = comparison["headline"][0]
    metric = comparison["metrics"][name]
    unit = 100.0 if metric["percent"] else 1.0
    points = []
    for stack, data in comparison["stacks"].items():
        value, cost = data["metrics"][name], data["cost"]["ms_per_token"]
        if None not in (value["value"], value["low"], value["high"], cost):
            points.append((stack, cost, *(unit * value[key] for key in ("value", "low", "high"))))
    if len(points) < 2:
        return None
    x_marks = ticks(0.0, max(point[1] for point in points))
    y_marks = ticks(min(point[3] for point in points), max(point[4] for point in points))
    left, right, top, bottom = LEFT, WIDTH - 20.0, 14.0, BOTTOM

    def x(value: float) -> float:
        return round(left + (right - left) * (value - x_marks[0]) / (x_marks[-1] - x_marks[0]), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - y_marks[0]) / (y_marks[-1] - y_marks[0]), 1)

    dots = [
        {
            "stack": stack,
            "name": _short(stack),
            "x": x(cost),
            "y": y(value),
            "low": y(low),
            "high": y(high),
            "number": index + 1,
        }
        for index, (stack, cost, value, low, high) in enumerate(points)
    ]
    return {
        "title": metric["title"],
        "percent": metric["percent"],
        "better": None if metric["higher_is_better"] is None else ("up" if metric["higher_is_better"] else "down"),
        "height": bottom + 44,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "x_ticks": [{"x": x(mark), "label": _label(mark, x_marks)} for mark in x_marks],
        "y_ticks": [{"y": y(mark), "label": _label(mark, y_marks)} for mark in y_marks],
        "points": _spread(dots),
    }


def _spread(dots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every point a place for its label: the nearest one that covers no point, no interval and no other label."""
    boxes: list[_Box] = []
    for dot in dots:
        boxes.append((dot["x"] - 7, dot["y"] - 7, dot["x"] + 7, dot["y"] + 7))
        boxes.append((dot["x"] - 2, dot["high"], dot["x"] + 2, dot["low"]))
    placed = []
    for dot in sorted(dots, key=lambda item: (item["y"], item["x"])):
        wide = CHARACTER * len(dot["name"])
        choices = []
        for step, side in itertools.product((0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5), ("start", "end")):
            x = dot["x"] + (11 if side == "start" else -11)
            y = dot["y"] + 0.75 * LABEL * step
            box = (x if side == "start" else x - wide, y - LABEL / 2, x + wide if side == "start" else x, y + LABEL / 2)
            outside = box[0] < LEFT or box[2] > WIDTH or box[1] < 0 or box[3] > BOTTOM
            choices.append((10 * outside + sum(_overlap(box, other) for other in boxes), abs(step), side, x, y, box))
        _, away, side, x, y, box = min(choices, key=lambda choice: choice[:2])
        boxes.append(box)
        placed.append({**dot, "label_x": round(x, 1), "label_y": round(y, 1), "side": side, "leader": away > 1})
    return placed


_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
