"""The figures of the entropy diagnostic, drawn from its findings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mitigate.diagnostics import figures
from mitigate.diagnostics.base import Findings
from mitigate.diagnostics.labels import Label


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draw every figure whose data are there."""
    if not findings.data:
        return []
    with figures.style():
        made = [_by_layer(findings, folder), _separation(findings, folder)]
        made += [_heads(findings, folder), _policies(findings, folder)]
    return made


def _by_layer(findings: Findings, folder: Path) -> Path:
    """Boxes of the entropies per layer and type, and the mean mass below."""
    data = findings.data
    figure, (top, bottom) = figures.grid(
        2, 1, width=max(8.0, 0.38 * data["layers"]), height=6.4, sharex=True, height_ratios=[3, 2]
    )
    shown = [label for label in Label if data["counts"][label.value]]
    width = 0.8 / max(len(shown), 1)
    for index, label in enumerate(shown):
        shift = (index - (len(shown) - 1) / 2) * width
        boxes = [
            {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high, "fliers": []}
            for low, q1, median, q3, high in data["quartiles"][label.value]
        ]
        color = figures.COLORS[label.value]
        top.bxp(
            boxes,
            positions=np.arange(data["layers"]) + shift,
            widths=width * 0.85,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.35, "edgecolor": color},
            medianprops={"color": color, "linewidth": 2.0},
            whiskerprops={"color": color},
            capprops={"color": color},
            manage_ticks=False,
            label=f"{label.value} (n = {data['counts'][label.value]:,})",
        )
        x = (np.arange(data["layers"]) + 0.0).tolist()
        figures.curve(bottom, x, data["mass"][label.value], label=label.value, color=color)
    top.axhline(data["largest"], color="black", linewidth=0.8, linestyle=":")
    top.annotate(
        "ln n: evenly over the picture", (data["layers"] - 0.5, data["largest"]), ha="right", va="bottom", fontsize=8
    )
    top.margins(y=0.08)
    top.set_ylabel("LIAE (nats)")
    bottom.set_ylabel("image mass\n(mean over heads)")
    bottom.set_ylim(bottom=0.0)
    figures.layer_axis(bottom, data["layers"])
    figures.legend(top, title="boxes: quartiles; whiskers: 10 % to 90 %", alignment="left", title_fontsize=9)
    return figures.save(figure, folder, "entropy_by_layer")


def _separation(findings: Findings, folder: Path) -> Path:
    """AUROC per layer beside the summaries over layers, and the correlation of entropy and mass."""
    data = findings.data
    figure, (left, right) = figures.grid(1, 2, width=9.6, height=3.8)
    layers = list(range(data["layers"]))
    figures.curve(left, layers, data["auroc"], label="LIAE of one layer", color=figures.PALETTE[0])
    names = {"auroc/entropy_mean": "mean over layers", "auroc/entropy_max": "highest layer"}
    for index, (name, title) in enumerate(names.items()):
        estimate = vars(findings.numbers[name])
        place = data["layers"] + 0.3 + 0.9 * index
        figures.points(
            left, [place], [estimate], label=title, color=figures.PALETTE[index + 1], marker=figures.MARKERS[index + 1]
        )
    left.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    figures.layer_axis(left, data["layers"])
    left.set_xlim(-0.5, data["layers"] + 1.8)
    left.set_ylim(0.0, 1.0)
    left.set_ylabel("AUROC, hallucinated vs grounded")
    figures.legend(left, ncols=2)
    figures.curve(right, layers, data["relation"], label="r, all words", color=figures.PALETTE[2])
    right.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    right.set_ylim(-1.0, 1.0)
    figures.layer_axis(right, data["layers"])
    right.set_ylabel("correlation of LIAE and image mass")
    figures.legend(right)
    return figures.save(figure, folder, "entropy_separation")


def _heads(findings: Findings, folder: Path) -> Path:
    """How many heads look away per layer, and which."""
    data = findings.data
    heads: Any = data.get("heads")
    figure, axes = figures.grid(1, 2 if heads else 1, width=9.6 if heads else 5.2, height=3.8)
    shown = [label for label in Label if data["counts"][label.value]]
    width = 0.8 / max(len(shown), 1)
    for index, label in enumerate(shown):
        places = np.arange(data["layers"]) + (index - (len(shown) - 1) / 2) * width
        values = [item["value"] for item in data["abnormal"][label.value]]
        axes[0].bar(places, values, width * 0.9, color=figures.COLORS[label.value], label=label.value)
    axes[0].set_ylabel("abnormal heads per token\n(image mass below the layer's mean)")
    figures.layer_axis(axes[0], data["layers"])
    figures.legend(axes[0])
    if heads:
        picture = axes[1].imshow(np.array(heads).T, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0, origin="lower")
        figure.colorbar(picture, ax=axes[1], label=f"share of {data['tokens']:,} tokens")
        axes[1].grid(visible=False)
        axes[1].set_ylabel("head")
        figures.layer_axis(axes[1], data["layers"])
        axes[1].set_title("how often a head is abnormal")
    return figures.save(figure, folder, "entropy_abnormal_heads")


def _policies(findings: Findings, folder: Path) -> Path:
    """Which share of layers each threshold flags, by type and by layer."""
    data = findings.data
    figure, (left, right) = figures.grid(1, 2, width=9.6, height=3.8)
    policies = list(data["flagged"])
    shown = [label.value for label in Label if data["counts"][label.value]]
    for index, label in enumerate(shown):
        places = [number + (index - (len(shown) - 1) / 2) * 0.22 for number in range(len(policies))]
        estimates = [data["flagged"][policy][label] for policy in policies]
        figures.points(left, places, estimates, label=label, color=figures.COLORS[label], marker=figures.MARKERS[index])
    left.set_xticks(range(len(policies)), policies)
    left.set_ylim(0.0, 1.0)
    left.set_ylabel("share of layers flagged")
    left.set_xlabel("threshold policy")
    figures.legend(left)
    for index, policy in enumerate(policies):
        right.plot(
            data["flagged"][policy]["by_layer"],
            color=figures.PALETTE[index],
            marker=figures.MARKERS[index],
            label=policy,
        )
    figures.layer_axis(right, data["layers"])
    right.set_ylim(0.0, 1.0)
    right.set_ylabel("share of words at which flagged")
    figures.legend(right, ncols=2)
    return figures.save(figure, folder, "entropy_thresholds")
