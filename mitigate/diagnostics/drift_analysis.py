"""What the recorded similarities say: pure functions of token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mitigate.diagnostics import stats
from mitigate.diagnostics.base import Estimate, Findings, SampleRows, Table, TokenRow, words_only
from mitigate.diagnostics.labels import Label
from mitigate.metrics.base import Array
from mitigate.ops.depth import Windows

#: Similarity -> sign with which it grows with likeness.
SIGNS: Final[Mapping[str, float]] = {"bhattacharyya": 1.0, "jensen_shannon": -1.0, "hellinger": -1.0}
LABELS: Final = tuple(Label)


def analyse(rows: Sequence[TokenRow], windows: Windows, similarity: str, *, resamples: int) -> Findings:
    """Test whether deep layers look like early ones again, and whether hallucinated words do so more.

    Parameters
    ----------
    rows
        Token rows with ``<similarity>_noise`` and ``<similarity>_anchors`` per layer, and ``contrast``; only first
        pieces of words count.
    windows
        The layer windows.
    similarity
        The one that is tested.
    resamples
        Bootstrap resamples of the images.
    """
    words, lost = stats.seeing(words_only(rows), f"{similarity}_noise", f"{similarity}_anchors")
    if not words:
        return Findings(notes=[*lost, "No word was generated after a picture: there is nothing to analyse."])
    labels = np.array([row.label.value for row in words])
    images = np.array([row.image_id for row in words])
    back = regression(words, windows, similarity)
    to_anchors = SIGNS[similarity] * stats.matrix(words, f"{similarity}_anchors")[:, list(windows.deep)].mean(1)
    to_noise = SIGNS[similarity] * stats.matrix(words, f"{similarity}_noise")[:, list(windows.deep)].mean(1)
    values = {"regression": back, "preference": to_noise - to_anchors}
    numbers: dict[str, Estimate] = {}
    for name, value in values.items():
        for label in LABELS:
            kept = labels == label.value
            if kept.any():
                numbers[f"{name}/{label}"] = _tested(value[kept], images[kept].tolist(), resamples)
        numbers[f"{name}/hallucinated-grounded"] = _difference(value, labels, images, resamples)
    kept = labels != Label.OTHER.value
    contrast = np.array([row.measures["contrast"] for row in words], dtype=np.float64)
    is_wrong = labels[kept] == Label.HALLUCINATED.value
    numbers["auroc/low_contrast"] = stats.auroc(-contrast[kept], is_wrong, images[kept].tolist(), n=resamples)
    numbers["auroc/regression"] = stats.auroc(back[kept], is_wrong, images[kept].tolist(), n=resamples)
    counts = {label.value: int((labels == label.value).sum()) for label in LABELS}
    data = {
        "layers": len(words[0].measures[f"{similarity}_noise"]),
        "counts": counts,
        "windows": dataclasses.asdict(windows),
        "similarity": similarity,
        "curves": {
            f"{name}_{side}": _curves(words, labels, images, f"{name}_{side}", resamples)
            for name in SIGNS
            for side in ("noise", "anchors")
        },
    }
    notes = lost + [
        f"Only {counts[label]} {label} words: the test says little; use more samples."
        for label in (Label.GROUNDED, Label.HALLUCINATED)
        if counts[label] < 20
    ]
    return Findings(numbers, [_table(numbers, windows, similarity)], data, notes)


def regression(words: Sequence[TokenRow], windows: Windows, similarity: str) -> Array:
    """Return, per word, likeness to the early map in the deep window minus that in the middle window.

    Positive: after looking elsewhere in the middle, deep layers look again where the early ones did.
    """
    likeness = SIGNS[similarity] * stats.matrix(words, f"{similarity}_noise")
    back: Array = likeness[:, list(windows.deep)].mean(1) - likeness[:, list(windows.mid)].mean(1)
    return back


def _tested(values: Array, images: Sequence[str], resamples: int) -> Estimate:
    """Return the mean, tested against 0."""
    zero = stats.difference([0.0] * len(values), images, values, images, n=resamples)
    return dataclasses.replace(zero, n=len(values))


def _difference(values: Array, labels: Any, images: Any, resamples: int) -> Estimate:
    sides: list[Any] = []
    for label in (Label.GROUNDED, Label.HALLUCINATED):
        kept = labels == label.value
        sides += [values[kept], images[kept].tolist()]
    return stats.difference(sides[0], sides[1], sides[2], sides[3], n=resamples)


def _curves(words: Sequence[TokenRow], labels: Any, images: Any, name: str, resamples: int) -> dict[str, Any]:
    values = stats.matrix(words, name)
    found: dict[str, Any] = {}
    for label in LABELS:
        kept = labels == label.value
        if kept.any():
            clusters = images[kept].tolist()
            found[label.value] = [
                dataclasses.asdict(stats.mean(values[kept, layer], clusters, n=resamples))
                for layer in range(values.shape[1])
            ]
    return found


def _table(numbers: Mapping[str, Estimate], windows: Windows, similarity: str) -> Table:
    spans = {name: f"{layers[0]}-{layers[-1]}" for name, layers in dataclasses.asdict(windows).items()}
    rows: list[tuple[Any, ...]] = []
    for name, title in (("regression", "fall back to early"), ("preference", "early rather than middle")):
        keys = [*(label.value for label in LABELS), "hallucinated-grounded"]
        for key in keys:
            if (number := numbers.get(f"{name}/{key}")) is not None:
                rows.append((f"{title}, {key}", number.n, number))
    for name, title in (("low_contrast", "low contrast of middle to early"), ("regression", "fall back to early")):
        number = numbers[f"auroc/{name}"]
        rows.append((f"AUROC of {title}", number.n, number))
    title = (
        f"Do deep layers ({spans['deep']}) look like early ({spans['early']}) rather than middle layers "
        f"({spans['mid']})? {similarity}"
    )
    return Table("thesis", title, ("", "n", "value"), tuple(rows))


# ------------------------------------------------------------------------------------------------------------- places


def with_objects(findings: Findings, samples: Sequence[SampleRows], *, resamples: int) -> Findings:
    """Add attention on the named object: mass, strongest tokens and pointing per layer, and the anchors' hits."""
    measured = [sample for sample in samples if "objects" in sample.measures]
    mentions = [(sample.image_id, item) for sample in measured for item in sample.measures["objects"]]
    if not mentions:
        why = (
            "the benchmark knows no places, or no picture is square and in one raster" if not measured else "none named"
        )
        return dataclasses.replace(findings, notes=[*findings.notes, f"Attention on objects was not measured: {why}."])
    images = [image for image, _ in mentions]
    layers = len(mentions[0][1]["mass"])
    curves = {
        name: [
            dataclasses.asdict(stats.mean([item[name][layer] for _, item in mentions], images, n=resamples))
            for layer in range(layers)
        ]
        for name in ("mass", "hit", "pointing")
    }
    area = stats.mean([item["area"] for _, item in mentions], images, n=resamples)
    inside = stats.mean([item["inside"] for _, item in mentions], images, n=resamples)
    anchors = [item["anchor_hit"] for _, item in mentions]
    windows = findings.data.get("windows", {})
    middle = list(windows.get("mid", range(layers)))
    hits = np.array([item["hit"] for _, item in mentions], dtype=np.float64)
    mid_hits, last = hits[:, middle].mean(1), hits[:, -1]
    numbers = {
        "objects/anchor_hit": stats.mean(anchors, images, n=resamples),
        "objects/middle_hit": stats.mean(mid_hits, images, n=resamples),
        "objects/final_hit": stats.mean(last, images, n=resamples),
        "objects/chance_hit": inside,
        "objects/middle-final": stats.difference(last, images, mid_hits, images, n=resamples),
    }
    titles = {
        "objects/anchor_hit": "anchors (middle minus early) on the object",
        "objects/middle_hit": "strongest tokens of middle layers on the object",
        "objects/final_hit": "strongest tokens of the last layer on the object",
        "objects/chance_hit": "tokens on the object if drawn at random",
        "objects/middle-final": "middle layers minus last layer",
    }
    rows = tuple((titles[name], len(mentions), number) for name, number in numbers.items())
    table = Table("objects", "Where grounded object words look (share of tokens)", ("", "n", "value"), rows)
    return dataclasses.replace(
        findings,
        numbers={**findings.numbers, **numbers},
        tables=[*findings.tables, table],
        data={**findings.data, "objects": {**curves, "area": area.value, "inside": inside.value, "n": len(mentions)}},
    )
