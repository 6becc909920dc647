"""Figures of the saliency diagnostic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.patches import Rectangle

from mitigate.diagnostics import figures
from mitigate.diagnostics.labels import Label
from mitigate.diagnostics.saliency_analysis import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mitigate.diagnostics.base import Findings
    from mitigate.diagnostics.saliency_maps import TokenMap

_KINDS: Final = (Label.GROUNDED.value, Label.HALLUCINATED.value)
_GROUP_COLORS: Final = dict(zip(GROUPS, ("#7F7F7F", "#009E73", "#E69F00", "#CC79A7"), strict=True))
_TITLES: Final = {
    "score": "S on earlier text",
    "diagonal": "saliency of the last token",
    "image": "saliency of the picture",
    "attention": "attention to earlier text",
}
#: Tokens up to which a map names them.
_NAMED: Final = 48


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draw what the findings allow."""
    data = findings.data
    drawn = []
    with figures.style():
        if "values" in data:
            parts = {"saliency-values": _values, "saliency-risk": _risk, "saliency-separation": _separation}
            parts |= {"saliency-flow": _flow, "saliency-around": _around}
            drawn += [figures.save(part(data), folder, name) for name, part in parts.items()]
        if data.get("interventions"):
            drawn.append(figures.save(_interventions(data["interventions"]), folder, "saliency-interventions"))
    return drawn


def _count(data: Mapping[str, Any], kind: str) -> str:
    return f"{kind} (n = {data['counts'][kind]})"


def _values(data: Mapping[str, Any]) -> Figure:
    """Distributions of the four measures."""
    figure, axes = figures.grid(2, 2, width=8.0, height=5.6)
    for place, (name, title) in zip(axes, _TITLES.items(), strict=True):
        sides = [np.array(data["values"][name][kind]) for kind in _KINDS]
        edges = np.linspace(0.0, max(float(side.max()) for side in sides) or 1.0, 26).tolist()
        for kind, side in zip(_KINDS, sides, strict=True):
            color = figures.COLORS[kind]
            place.hist(
                side, edges, weights=np.full(len(side), 1 / len(side)), histtype="stepfilled", alpha=0.35, color=color
            )
            place.axvline(float(side.mean()), color=color, label=_count(data, kind))
        place.set_title(title)
        place.set_ylabel("share of words")
    figures.shared_legend(figure, axes[0], title="lines: means")
    return figure


def _risk(data: Mapping[str, Any]) -> Figure:
    """Share of hallucinated words per bin of the saliency."""
    figure, axes = figures.grid(1, 2, width=8.6, height=3.9, sharey=True)
    titles = {"diagonal": "saliency of the last token", "scaled score": "S over its largest possible value"}
    for place, (name, bins) in zip(axes, data["bins"].items(), strict=True):
        middle = [(item["low"] + item["high"]) / 2 for item in bins]
        filled = [(x, item["risk"]) for x, item in zip(middle, bins, strict=True) if item["risk"]["n"]]
        figures.points(
            place, [x for x, _ in filled], [risk for _, risk in filled], label="95 % (Wilson)", color=figures.PALETTE[0]
        )
        for x, risk in filled:
            place.annotate(f"{risk['n']}", (x, 1.0), ha="center", va="bottom", fontsize=8, color="#555555")
        share = data["counts"][_KINDS[1]] / sum(data["counts"].values())
        place.axhline(share, color="#555555", linestyle="--", linewidth=1.0, label="all words")
        place.set_xlim(0, 1)
        place.set_ylim(0, 1.06)
        place.set_xlabel(f"{titles[name]} (counts above)")
    axes[0].set_ylabel("share hallucinated")
    figures.shared_legend(figure, axes[0])
    return figure


def _separation(data: Mapping[str, Any]) -> Figure:
    """Areas under the ROC curve, beside the baselines."""
    figure, (axes,) = figures.grid(width=7.6, height=3.6)
    names = list(data["predictors"])
    for row, name in enumerate(reversed(names)):
        found = data["predictors"][name]
        baseline = "baseline" in data["titles"][name]
        low, high, value = found["low"], found["high"], found["value"]
        color = "#7F7F7F" if baseline else figures.PALETTE[0]
        axes.plot([low, high], [row, row], color=color, linewidth=2.0)
        axes.plot([value], [row], marker="o", color=color)
    axes.axvline(0.5, color="#555555", linestyle="--", linewidth=1.0)
    axes.set_yticks(range(len(names)), [data["titles"][name] for name in reversed(names)])
    axes.set_xlabel("AUROC for hallucinated words, 95 % (0.5: no information)")
    return figure


def _flow(data: Mapping[str, Any]) -> Figure:
    """Shares of saliency and attention on the four groups by layer."""
    figure, axes = figures.grid(1, 2, width=9.0, height=4.0, sharey=True)
    for place, (measure, kinds) in zip(axes, data["flow"].items(), strict=True):
        for group in GROUPS:
            for kind, line in zip(_KINDS, ("-", "--"), strict=True):
                values = [item["value"] for item in kinds[kind][group]]
                label = group if line == "-" else None
                place.plot(values, line, color=_GROUP_COLORS[group], marker="o", label=label)
        place.set_title(f"{measure.partition('_')[0]} (solid: grounded, dashed: hallucinated)", fontsize=10)
        place.set_xlabel("measured layer")
        place.set_ylim(0, None)
    axes[0].set_ylabel("share of the row")
    figures.shared_legend(figure, axes[0])
    return figure


def _around(data: Mapping[str, Any]) -> Figure:
    """S of the tokens around words."""
    figure, (axes,) = figures.grid(width=7.4, height=4.0)
    for kind, marker in zip(_KINDS, figures.MARKERS, strict=False):
        found = data["around"][kind]
        shifts = [item["shift"] for item in found]
        figures.curve(axes, shifts, found, label=_count(data, kind), color=figures.COLORS[kind], marker=marker)
    axes.axvline(0, color="#555555", linestyle="--", linewidth=1.0)
    axes.set_xlabel("tokens from the word (words near an end have fewer neighbours)")
    axes.set_ylabel("mean S")
    figures.legend(axes)
    return figure


def _interventions(data: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Headline metrics over the gain."""
    figure, axes = figures.grid(1, len(data), width=3.6 * len(data) + 0.6, height=3.4)
    for place, (name, found) in zip(axes, data.items(), strict=True):
        figures.points(place, [item["gain"] for item in found], found, label="95 %", color=figures.PALETTE[0])
        place.axvline(1.0, color="#555555", linestyle="--", linewidth=1.0)
        place.set_title(name)
        place.set_xlabel("factor on attention to text")
    return figure


# --------------------------------------------------------------------------------------------------------- the maps


def draw_map(found: TokenMap, title: str, folder: Path, name: str, *, legacy: bool = False) -> Path:
    """Draw attention and saliency of one token side by side, their last rows, and where these come from."""
    kind = "saliency as in the demo scripts" if legacy else "saliency"
    side = min(5.2, 3.4 + 0.045 * len(found.texts))
    with figures.style():
        figure, axes = figures.grid(
            3, 2, width=2 * side + 0.8, height=side + 2.9, gridspec_kw={"height_ratios": [side, 0.35, 1.5]}
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for column, (values, label) in enumerate(((found.attention, "attention"), (found.saliency, kind))):
            _triangle(axes[column], values, found, label)
            _strip(axes[2 + column], values)
            measure = "attention" if column == 0 else "saliency"
            _bars(axes[4 + column], found.last[measure], measure)
        return figures.save(figure, folder, name)


def _triangle(axes: Axes, values: Any, found: TokenMap, label: str) -> None:
    """Query rows x key columns; the upper triangle is left white, the last row boxed."""
    size = len(values)
    shown = np.ma.masked_where(np.triu(np.ones((size, size), dtype=bool), 1), values)
    top = float(np.quantile(values[np.tril_indices(size)], 0.99)) or float(values.max())
    axes.imshow(shown, cmap="RdPu", vmin=0.0, vmax=top or 1.0, interpolation="nearest", aspect="auto")
    axes.add_patch(Rectangle((-0.5, size - 1.5), size, 1, fill=False, edgecolor="black", linewidth=1.0, clip_on=False))
    axes.grid(visible=False)
    axes.set_title(f"{label} (no picture columns; bar: groups as below)", fontsize=10, pad=12)
    if size <= _NAMED:
        axes.set_xticks(range(size), found.texts, rotation=90, fontsize=6)
        axes.set_yticks(range(size), found.texts, fontsize=6)
    else:
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    start = 0
    for place in range(1, size + 1):
        if place == size or found.groups[place] != found.groups[start]:
            color = _GROUP_COLORS[found.groups[start]]
            axes.plot(
                [start - 0.4, place - 0.6],
                [1.02, 1.02],
                color=color,
                linewidth=4,
                solid_capstyle="butt",
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )
            start = place
    axes.set_ylim(size - 0.5, -0.5)


def _strip(axes: Axes, values: Any) -> None:
    """Show the last row alone, scaled to its largest value."""
    from mitigate.diagnostics.saliency_maps import strip

    axes.imshow(strip(values)[None], cmap="RdPu", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel("last row", rotation=0, ha="right", va="center", fontsize=8)


def _bars(axes: Axes, shares: Mapping[str, float], label: str) -> None:
    """Shares of the last row on the groups, the picture included."""
    names = {"system": "system", "image": "image", "prompt": "prompt", "generated": "output"}
    for place, (key, name) in enumerate(names.items()):
        axes.bar(place, shares.get(key, 0.0), color=_GROUP_COLORS[name], width=0.7)
        axes.text(
            place, shares.get(key, 0.0), f"{100 * shares.get(key, 0.0):.0f} %", ha="center", va="bottom", fontsize=8
        )
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_ylim(0, 1.15)
    axes.set_ylabel(f"share of {label}", fontsize=8)
