"""The figures of the drift diagnostic, drawn from its findings alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.diagnostics import figures
from mitigate.diagnostics.base import Findings
from mitigate.diagnostics.labels import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "bhattacharyya": "Bhattacharyya coefficient\n(1 = same map)",
    "jensen_shannon": "Jensen-Shannon divergence, nats\n(0 = same map)",
    "hellinger": "Hellinger distance\n(0 = same map)",
}


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draw every figure whose data are there."""
    if not findings.data:
        return []
    with figures.style():
        made = [_similarity(findings, folder, name) for name in _TITLES]
        if "objects" in findings.data:
            made.append(_objects(findings, folder))
    return made


def _similarity(findings: Findings, folder: Path, name: str) -> Path:
    """Likeness to the early and to the middle mean over depth, by type of word."""
    data = findings.data
    figure, axes = figures.grid(1, 2, width=9.6, height=4.0, sharey=True)
    for side, place in zip(("noise", "anchors"), axes, strict=True):
        _windows(place, data)
        for index, label in enumerate(Label):
            estimates = data["curves"][f"{name}_{side}"].get(label.value)
            if estimates:
                figures.curve(
                    place,
                    list(range(data["layers"])),
                    estimates,
                    label=f"{label.value} (n = {data['counts'][label.value]:,})",
                    color=figures.COLORS[label.value],
                    marker=figures.MARKERS[index],
                )
        figures.layer_axis(place, data["layers"])
    axes[0].set_title("to the mean of the early layers (noise)", pad=16)
    axes[1].set_title("to the mean of the middle layers (anchors)", pad=16)
    axes[0].set_ylabel(_TITLES[name])
    figures.shared_legend(figure, axes[0])
    return figures.save(figure, folder, f"drift_{name}")


def _windows(place: Axes, data: Any) -> None:
    """Shade the three windows and name them above the frame."""
    for index, (name, layers) in enumerate(data["windows"].items()):
        color = ("#BBBBBB", "#E69F00", "#56B4E9")[index]
        place.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=color, alpha=0.16, linewidth=0)
        middle = (layers[0] + layers[-1]) / 2
        place.annotate(
            {"mid": "middle"}.get(name, name),
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )


def _objects(findings: Findings, folder: Path) -> Path:
    """Attention on the named object over depth, beside what chance gives."""
    data = findings.data
    objects = data["objects"]
    figure, axes = figures.grid(1, 2, width=9.6, height=3.8)
    layers = list(range(data["layers"]))
    figures.curve(axes[0], layers, objects["mass"], label="on the named object", color=figures.PALETTE[0])
    axes[0].axhline(objects["area"], color="black", linewidth=0.8, linestyle=":", label="evenly over the picture")
    axes[0].set_ylabel("share of the visual attention")
    names = {"hit": "strongest tokens", "pointing": "strongest token alone"}
    for index, (name, title) in enumerate(names.items()):
        color, marker = figures.PALETTE[index + 1], figures.MARKERS[index + 1]
        figures.curve(axes[1], layers, objects[name], label=title, color=color, marker=marker)
    axes[1].axhline(objects["inside"], color="black", linewidth=0.8, linestyle=":", label="chance")
    axes[1].set_ylabel(f"share on the named object (n = {objects['n']:,})")
    for place in axes:
        place.set_ylim(bottom=0.0)
        figures.layer_axis(place, data["layers"])
        figures.legend(place, ncols=2)
    return figures.save(figure, folder, "drift_objects")
