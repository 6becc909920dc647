"""What the recorded saliency says: pure functions of token rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mitigate.diagnostics import saliency_stats, stats
from mitigate.diagnostics.base import Estimate, Findings, Table, TokenRow, words_only
from mitigate.diagnostics.labels import Label
from mitigate.metrics.base import Array

#: Measure -> title; the sign makes a high value mean "hallucinated" if the paper's claim holds.
PREDICTORS: Final[Mapping[str, tuple[int, str]]] = {
    "score": (-1, "low saliency S on earlier text"),
    "diagonal": (-1, "low saliency of the last token"),
    "attention": (-1, "low attention to earlier text (baseline)"),
    "p": (-1, "low probability of the token (baseline)"),
    "entropy": (1, "entropy of the distribution (baseline)"),
    "image": (-1, "low saliency of the picture (baseline)"),
    "position": (1, "late in the reply (baseline)"),
}
GROUPS: Final = ("system", "image", "prompt", "output")
KINDS: Final = (Label.GROUNDED, Label.HALLUCINATED)
#: Tokens shown on either side of a word.
REACH: Final = 8


def analyse(rows: Sequence[TokenRow], *, bins: int, resamples: int) -> Findings:
    """Compare the saliency of grounded and hallucinated words.

    Parameters
    ----------
    rows
        Token rows as `mitigate.diagnostics.saliency.Saliency` measures them.
    bins
        Bins of the saliency on 0..1.
    resamples
        Bootstrap resamples of the images.
    """
    words = [row for row in words_only(rows) if row.label in KINDS and row.measures["columns"]]
    ranked = _ranked(rows, resamples)
    if not any(row.label is Label.HALLUCINATED for row in words) or all(
        row.label is Label.HALLUCINATED for row in words
    ):
        kind = "hallucinated" if words and words[0].label is Label.GROUNDED else "grounded"
        note = f"No {kind} word was generated: the two kinds cannot be compared; use more samples."
        return Findings(numbers=ranked, tables=_fidelity(ranked), notes=[note])
    data = _Words(words, resamples)
    numbers = {**_separation(data), **_effects(data), **ranked}
    binned = {name: _binned(data, values, bins) for name, values in data.unit().items()}
    flow, flows = _flow(data)
    tables = [
        _means(data),
        _separation_table(numbers),
        _effects_table(numbers, data),
        *(_bins_table(name, found) for name, found in binned.items()),
        _by_layer(data),
        flow,
        *_fidelity(ranked),
    ]
    counts = {kind.value: int(data.of(kind).sum()) for kind in KINDS}
    notes = [
        f"Only {count} {kind} words: differences and areas say little; use more samples."
        for kind, count in counts.items()
        if count < 20
    ]
    curves = {
        "counts": counts,
        "images": len(set(data.images)),
        "values": {name: {kind.value: data.values[name][data.of(kind)].tolist() for kind in KINDS} for name in _SHOWN},
        "bins": binned,
        "flow": flows,
        "around": _around(rows, words, resamples),
        "predictors": {name: dataclasses.asdict(numbers[f"auroc/{name}"]) for name in PREDICTORS},
        "titles": {name: title for name, (_, title) in PREDICTORS.items()},
    }
    return Findings(numbers=numbers, tables=tables, data=curves, notes=notes)


_SHOWN: Final = ("score", "diagonal", "image", "attention")


class _Words:
    """Labelled words as arrays, one entry each."""

    def __init__(self, words: Sequence[TokenRow], resamples: int) -> None:
        self.words, self.resamples = words, resamples
        names = [name for name in PREDICTORS if name != "position"]
        self.values = {name: np.array([_number(row.measures[name]) for row in words]) for name in names}
        self.values["position"] = np.array([row.position for row in words], dtype=np.float64)
        self.length = np.array([row.length for row in words], dtype=np.float64)
        self.columns = np.array([row.measures["columns"] for row in words], dtype=np.float64)
        self.images = [row.image_id for row in words]
        self.positive = np.array([row.label is Label.HALLUCINATED for row in words])

    def of(self, kind: Label) -> Any:
        """Mask of the words of a kind."""
        return self.positive if kind is Label.HALLUCINATED else ~self.positive

    def images_of(self, kind: Label) -> list[str]:
        """Images of the words of a kind."""
        return [image for image, kept in zip(self.images, self.of(kind), strict=True) if kept]

    def mean(self, values: Array, kind: Label) -> Estimate:
        """Mean over the words of a kind."""
        return stats.mean(values[self.of(kind)], self.images_of(kind), n=self.resamples)

    def unit(self) -> dict[str, Array]:
        """Saliency on 0..1: the last token's own, and S over its bound 1 / sqrt(columns)."""
        return {"diagonal": self.values["diagonal"], "scaled score": self.values["score"] * np.sqrt(self.columns)}


def _separation(data: _Words) -> dict[str, Estimate]:
    found = {}
    for name, (sign, _) in PREDICTORS.items():
        scores = sign * data.values[name]
        found[f"auroc/{name}"] = stats.auroc(scores, data.positive, data.images, n=data.resamples)
        found[f"auprc/{name}"] = saliency_stats.auprc(scores, data.positive, data.images, n=data.resamples)
    return found


def _effects(data: _Words) -> dict[str, Estimate]:
    """Differences of S and of the diagonal, plain and with position and length held fixed."""
    found = {}
    controls = [data.values["position"], data.length]
    for name in ("score", "diagonal"):
        values = data.values[name]
        sides = [part for kind in KINDS for part in (values[data.of(kind)], data.images_of(kind))]
        found[f"difference/{name}"] = stats.difference(*sides, n=data.resamples)
        found[f"controlled/{name}"] = saliency_stats.controlled(
            values, data.positive, controls, data.images, n=min(data.resamples, 1000)
        )
        found[f"matched/{name}"] = saliency_stats.matched_pairs(
            values, data.positive, data.values["position"], data.images, n=data.resamples
        )
    return found


def _means(data: _Words) -> Table:
    rows: list[tuple[Any, ...]] = []
    titles = {
        "score": "S on earlier text",
        "diagonal": "last token",
        "image": "picture",
        "attention": "attention to text",
    }
    for name, title in titles.items():
        first, second = (data.values[name][data.of(kind)] for kind in KINDS)
        _, p = saliency_stats.mann_whitney(first, second)
        spreads = [
            f"{side.mean():.4f} ± {side.std(ddof=1) if len(side) > 1 else math.nan:.4f}" for side in (first, second)
        ]
        rows.append((title, *spreads, len(first), len(second), saliency_stats.cohens_d(first, second), p))
    columns = ("", "grounded", "hallucinated", "n grounded", "n hallucinated", "Cohen d", "Mann-Whitney p")
    title = "Mean ± sd (the test takes words as independent; intervals below do not)"
    return Table("means", title, columns, tuple(rows))


def _separation_table(numbers: Mapping[str, Estimate]) -> Table:
    rows = tuple(
        (title, numbers[f"auroc/{name}"].n, numbers[f"auroc/{name}"], numbers[f"auprc/{name}"])
        for name, (_, title) in PREDICTORS.items()
    )
    title = "What tells hallucinated from grounded words? (intervals resample images)"
    return Table("separation", title, ("", "n", "AUROC", "AUPRC"), rows)


def _effects_table(numbers: Mapping[str, Estimate], data: _Words) -> Table:
    titles = {
        "difference": "hallucinated minus grounded",
        "controlled": "log odds per sd, position and reply length held fixed",
        "matched": "difference in pairs of equal position (up to 2 tokens apart)",
    }
    rows = []
    for kind, title in titles.items():
        for name in ("score", "diagonal"):
            found = numbers[f"{kind}/{name}"]
            rows.append((f"{'S' if name == 'score' else 'last token'}: {title}", found.n, found))
    share = float(data.positive.mean())
    head = f"Effect of the saliency ({100 * share:.1f} % of the words are hallucinated)"
    return Table("effects", head, ("", "n", "value"), tuple(rows))


def _binned(data: _Words, values: Array, bins: int) -> list[dict[str, Any]]:
    """Share of hallucinated words per equal bin of 0..1, with Wilson's interval."""
    place = np.clip((values * bins).astype(int), 0, bins - 1)
    found = []
    for index in range(bins):
        inside = place == index
        estimate = stats.wilson(int(data.positive[inside].sum()), int(inside.sum()))
        found.append({"low": index / bins, "high": (index + 1) / bins, "risk": dataclasses.asdict(estimate)})
    return found


def _bins_table(name: str, found: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            f"{item['low']:.2f}-{item['high']:.2f}",
            item["risk"]["n"],
            Estimate(**item["risk"]) if item["risk"]["n"] else None,
        )
        for item in found
    )
    title = {
        "diagonal": "P(hallucinated) by saliency of the last token",
        "scaled score": "P(hallucinated) by S over its largest possible value",
    }[name]
    return Table(f"bins_{name.replace(' ', '_')}", f"{title} (Wilson intervals)", ("bin", "n", "risk"), rows)


def _by_layer(data: _Words) -> Table:
    """S layer by layer."""
    values = np.array([row.measures["score_layers"] for row in data.words], dtype=np.float64)
    rows = []
    for layer in range(values.shape[1]):
        own = values[:, layer]
        area = stats.auroc(-own, data.positive, data.images, n=data.resamples)
        rows.append((str(layer), *(data.mean(own, kind) for kind in KINDS), area))
    columns = ("measured layer", "S grounded", "S hallucinated", "AUROC of low S")
    return Table("by_layer", "Saliency S layer by layer", columns, tuple(rows))


def _flow(data: _Words) -> tuple[Table, dict[str, Any]]:
    """Shares of saliency and attention on the four groups of columns, layer by layer."""
    rows: list[tuple[Any, ...]] = []
    curves: dict[str, Any] = {}
    for measure in ("saliency_groups", "attention_groups"):
        sums = np.array([row.measures[measure] for row in data.words], dtype=np.float64)  # [words, layers, groups]
        total = sums.sum(-1, keepdims=True)
        shares = np.divide(sums, total, out=np.full_like(sums, np.nan), where=total > 0)
        curves[measure] = {
            kind.value: {
                group: [dataclasses.asdict(data.mean(shares[:, layer, place], kind)) for layer in range(sums.shape[1])]
                for place, group in enumerate(GROUPS)
            }
            for kind in KINDS
        }
        for kind in KINDS:
            means = [data.mean(shares[..., place].mean(1), kind) for place in range(len(GROUPS))]
            rows.append((f"{measure.partition('_')[0]}, {kind.value}", *means))
    return Table(
        "flow", "Where it comes from: shares of the row, mean of the layers", ("", *GROUPS), tuple(rows)
    ), curves


def _around(rows: Sequence[TokenRow], words: Sequence[TokenRow], resamples: int) -> dict[str, Any]:
    """Mean S of the tokens around a word, per distance."""
    by_place = {(row.sample, row.position): _number(row.measures["score"]) for row in rows}
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = [row for row in words if row.label is kind]
        found[kind.value] = []
        for shift in range(-REACH, REACH + 1):
            known = [
                (by_place[key], row.image_id) for row in own if (key := (row.sample, row.position + shift)) in by_place
            ]
            estimate = stats.mean([value for value, _ in known], [image for _, image in known], n=min(resamples, 1000))
            found[kind.value].append({"shift": shift, **dataclasses.asdict(estimate)})
    return found


def _ranked(rows: Sequence[TokenRow], resamples: int) -> dict[str, Estimate]:
    """Rank correlation of the exact score with the direct one: over tokens, and per step over candidates."""
    scored = [row for row in rows if "exact" in row.measures and row.measures["columns"]]
    if len(scored) < 3:
        return {}
    exact, direct = (
        np.array([[_number(v) for v in row.measures[key]] for row in scored]) for key in ("exact", "direct")
    )
    images = [row.image_id for row in scored]
    over_tokens = stats.pearson(
        saliency_stats.ranks(exact[:, 0]), saliency_stats.ranks(direct[:, 0]), images, n=resamples
    )
    steps = [saliency_stats.spearman(one, two) for one, two in zip(exact[:, 1:], direct[:, 1:], strict=True)]
    return {"rank/tokens": over_tokens, "rank/candidates": stats.mean(steps, images, n=resamples)}


def _fidelity(ranked: Mapping[str, Estimate]) -> list[Table]:
    if not ranked:
        return []
    rows = (
        ("over tokens: the chosen token's S", ranked["rank/tokens"].n, ranked["rank/tokens"]),
        (
            "within a step: S of the candidates, mean of the steps",
            ranked["rank/candidates"].n,
            ranked["rank/candidates"],
        ),
    )
    title = "Does the score without a backward rank as the exact one does? (Spearman)"
    return [Table("direct", title, ("", "n", "rank correlation"), rows)]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
