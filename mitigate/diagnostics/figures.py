"""Drawing helpers shared by the diagnostics: figures are objects, no global state, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mitigate.diagnostics.labels import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that people who see colours differently can tell apart (Okabe and Ito).
COLORS: Final[Mapping[str, str]] = {
    Label.GROUNDED.value: "#0072B2",
    Label.HALLUCINATED.value: "#D55E00",
    Label.OTHER.value: "#7F7F7F",
}
#: Further colours, for what is no label.
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS: Final = ("o", "s", "^", "D", "v", "P")

_STYLE: Final[Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "figure.dpi": 150,
    "svg.hashsalt": "mitigate",
    "svg.fonttype": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Use the project's look while a figure is made and saved."""
    with matplotlib.rc_context(_STYLE):
        yield


def grid(
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 3.8, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure with axes in reading order.

    Parameters
    ----------
    rows, columns
        Axes.
    width, height
        Inches of the whole figure.
    **options
        As of ``Figure.subplots``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def pad(figure: Figure, inches: float) -> None:
    """Leave more room above and below each axes, for titles of several lines."""
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=inches)


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write ``name.png`` and ``name.svg`` and return the PNG file."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out; the second file would only do it again
    picture = folder / f"{name}.png"
    figure.savefig(picture, metadata={"Software": "mitigate"})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": "mitigate"})
    return picture


def curve(
    axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], *, label: str, color: str, marker: str = "o"
) -> None:
    """Draw values over x with their intervals as a band.

    Parameters
    ----------
    estimates
        ``value``, ``low`` and ``high`` per x, as `numbers` gives them; undefined ones (``None``, NaN) leave a gap.
    """
    value, low, high = ([_number(item[key]) for item in estimates] for key in ("value", "low", "high"))
    axes.plot(x, value, color=color, marker=marker, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def points(
    axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], *, label: str, color: str, marker: str = "o"
) -> None:
    """Draw single values with error bars."""
    value, low, high = ([_number(item[key]) for item in estimates] for key in ("value", "low", "high"))
    below = [max(middle - end, 0.0) if end == end else 0.0 for middle, end in zip(value, low, strict=True)]
    above = [max(end - middle, 0.0) if end == end else 0.0 for middle, end in zip(value, high, strict=True)]
    axes.errorbar(
        x,
        value,
        yerr=[below, above],
        fmt=marker,
        color=color,
        label=label,
        capsize=2.0,
        elinewidth=1.0,
        linestyle="none",
    )


def layer_axis(axes: Axes, layers: int) -> None:
    """Label the x axis with decoder layers, not more than about sixteen of them."""
    step = max(1, -(-layers // 16))
    axes.set_xticks(range(0, layers, step))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xlabel("decoder layer (0 = first)")


def legend(axes: Axes, **options: Any) -> None:
    """Put the legend above the axes, in one row, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": min(len(labels), 3)}
        axes.legend(handles, labels, **{**place, "borderaxespad": 0.2, "handlelength": 1.6, **options})


def shared_legend(figure: Figure, axes: Axes, **options: Any) -> None:
    """Put one legend above all axes of a figure that show the same things."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, **{"loc": "outside upper left", "ncols": len(labels), **options})


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
