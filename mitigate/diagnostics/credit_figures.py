"""The figures of the credit diagnostic: correlations, norms, and the picture with what was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from mitigate.diagnostics import figures
from mitigate.diagnostics.base import Findings, SampleRows
from mitigate.diagnostics.credit_analysis import hallucinates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mitigate.benchmarks.base import Benchmark

_TITLES = {"caption": "captions", "yes_no": "yes/no answers"}
_ROLES = {"sources": "#D55E00", "neighbours": "#56B4E9", "strongest": "#D55E00"}
_PER_ROW = 3


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draw every figure whose data are there."""
    if not findings.data:
        return []
    with figures.style():
        return [_correlation(findings, folder, task) for task in findings.data["tasks"]] + [_norms(findings, folder)]


def _correlation(findings: Findings, folder: Path, task: str) -> Path:
    """Hallucination rate per entropy bin, and the entropies of replies with and without a hallucination."""
    data = findings.data["tasks"][task]
    figure, axes = figures.grid(1, 2, width=9.6, height=3.8)
    r, binned = findings.numbers[f"r/{task}"], findings.numbers[f"binned_r/{task}"]
    bins = data["bins"]
    places = [item["entropy"] for item in bins]
    figures.points(axes[0], places, bins, label="bin (Wilson 95 % interval)", color=figures.PALETTE[0])
    axes[0].set_xlabel("entropy of the question's attention to the picture (nats)")
    axes[0].set_ylabel(f"{_TITLES[task]} with a hallucination")
    highest = max((item["high"] for item in bins), default=1.0)
    axes[0].set_ylim(-0.02, min(1.02, 1.1 * highest))
    shown = [f"per sample: r = {r.value:.2f} [{r.low:.2f}, {r.high:.2f}], n = {r.n:,}"]
    if binned.p is not None:
        shown.append(f"binned: r = {binned.value:.2f}, p = {binned.p:.2g}, {binned.n} bins")
    axes[0].set_title("\n".join(shown), fontsize=9)
    edges = np.histogram_bin_edges([*data["entropy"]["with"], *data["entropy"]["without"]], bins=24).tolist()
    for name, color in (("without", figures.COLORS["grounded"]), ("with", figures.COLORS["hallucinated"])):
        values = data["entropy"][name]
        if values:
            label = f"{name} a hallucination (n = {len(values):,})"
            axes[1].hist(values, edges, density=True, color=color, alpha=0.45, label=label)
    axes[1].set_xlabel("entropy (nats)")
    axes[1].set_ylabel("density")
    figures.legend(axes[1], ncols=1)
    return figures.save(figure, folder, f"credit_{task}")


def _norms(findings: Findings, folder: Path) -> Path:
    """Norm of the visual tokens per layer; with a stack, its ratio to the plain model beside it."""
    norms = findings.data["norms"]
    compared = "ratio" in norms
    figure, axes = figures.grid(1, 2 if compared else 1, width=9.6 if compared else 5.6, height=3.6)
    layers = list(range(norms["layers"]))
    if compared:
        figures.curve(axes[0], layers, norms["plain"], label="without the stack", color=figures.COLORS["other"])
    label = "with the stack" if compared else "plain model"
    figures.curve(axes[0], layers, norms["stack"], label=label, color=figures.PALETTE[0], marker="s")
    axes[0].set_ylabel("mean norm of the visual tokens")
    highest = max(item["value"] for name in ("plain", "stack") for item in norms.get(name, ()))
    axes[0].set_ylim(0.0, 1.15 * highest)
    figures.layer_axis(axes[0], norms["layers"])
    figures.legend(axes[0])
    if compared:
        figures.curve(axes[1], layers, norms["ratio"], label="with / without", color=figures.PALETTE[1], marker="D")
        axes[1].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes[1].set_ylabel("ratio of the norms")
        figures.layer_axis(axes[1], norms["layers"])
        figures.legend(axes[1])
    return figures.save(figure, folder, "credit_norms")


def overlays(
    samples: Sequence[SampleRows], benchmark: Benchmark, folder: Path, *, count: int, top: float
) -> list[Path]:
    """Draw the attention, and the tokens that were chosen or strongest, over pictures.

    Half of the samples have the lowest entropy, half the highest, each picture once.
    """
    shown = chosen([sample for sample in samples if sample.measures.get("map")], count)
    if not shown:
        return []
    known = {sample.id: sample for sample in benchmark.samples()}
    rows = -(-len(shown) // _PER_ROW)
    with figures.style():
        figure, axes = figures.grid(rows, min(_PER_ROW, len(shown)), width=9.6, height=3.8 * rows + 0.5)
        figures.pad(figure, 0.14)
        used: dict[str, str] = {}
        for place, sample in zip(axes, shown, strict=False):
            picture = benchmark.images(known[sample.id])[0]
            place.imshow(picture, extent=(0, 1, 1, 0), interpolation="nearest")
            used |= _mark(place, sample, top)
            wrong = "hallucinates" if hallucinates(sample) else "no hallucination"
            place.set_title(f"{sample.id}\n{sample.measures['entropy']:.2f} nats, {wrong}", fontsize=9)
        for place in axes[: len(shown)]:
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        for place in axes[len(shown) :]:
            place.set_axis_off()
        handles = [Patch(facecolor="none", edgecolor=color, label=name) for name, color in used.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, title="white haze: attention of the question")
        return [figures.save(figure, folder, "credit_overlays")]


def chosen(samples: Sequence[SampleRows], count: int) -> list[SampleRows]:
    """Return samples of different pictures with the lowest and the highest entropies, ascending."""
    once = {sample.image_id: sample for sample in sorted(samples, key=lambda item: item.task, reverse=True)}
    ordered = sorted(once.values(), key=lambda item: (item.measures["entropy"], item.id))
    low = ordered[: (count + 1) // 2]
    rest = ordered[len(low) :]
    return [*low, *(rest[-(count // 2) :] if count // 2 else [])]


def _mark(place: Axes, sample: SampleRows, top: float) -> dict[str, str]:
    """Draw one sample's attention and tokens; returns what was drawn in which colour."""
    down, across = sample.measures["grid"]
    weights = np.array(sample.measures["map"]).reshape(down, across)
    haze: Any = np.ones((down, across, 4))
    haze[..., 3] = 0.7 * weights / max(weights.max(), 1e-12)
    place.imshow(haze, extent=(0, 1, 1, 0), interpolation="nearest")
    roles = {name: sample.measures[name] for name in ("sources", "neighbours") if sample.measures.get(name)}
    if not roles:
        count = max(1, round(top * weights.size))
        roles = {"strongest": np.argsort(-weights.ravel(), kind="stable")[:count].tolist()}
    for name in reversed(roles):  # sources over their neighbours
        for index in roles[name]:
            row, column = divmod(index, across)
            corner = (column / across, row / down)
            inset = 0.06
            place.add_patch(
                Rectangle(
                    (corner[0] + inset / across, corner[1] + inset / down),
                    (1 - 2 * inset) / across,
                    (1 - 2 * inset) / down,
                    fill=False,
                    edgecolor=_ROLES[name],
                    linewidth=1.4,
                )
            )
    return {name: _ROLES[name] for name in roles}
