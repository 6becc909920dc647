"""What the recorded entropies say: pure functions of token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mitigate.diagnostics import stats
from mitigate.diagnostics.base import Estimate, Findings, SampleRows, Table, TokenRow, words_only
from mitigate.diagnostics.labels import Label
from mitigate.metrics.base import Array
from mitigate.ops.entropy import Threshold

#: Policies compared on the recorded entropies; each flags a layer by the layers before it.
POLICIES: Final[Mapping[str, Threshold]] = {
    "bas_min": Threshold(policy="bas_min"),
    "running_mean": Threshold(policy="running_mean"),
    "mean + 1 sd": Threshold(policy="mean_plus_kstd", k_std=1.0),
    "ema": Threshold(policy="ema", ema_decay=0.9),
}
LABELS: Final = tuple(Label)


def analyse(rows: Sequence[TokenRow], *, resamples: int) -> Findings:
    """Compare entropy, mass and abnormal heads between grounded, hallucinated and other words.

    Parameters
    ----------
    rows
        Token rows with ``entropy``, ``mass`` and ``abnormal`` (per layer) and ``image_tokens``; only first pieces of
        words count, and only tokens that had a picture to look at.
    resamples
        Bootstrap resamples of the images.
    """
    words, notes = stats.seeing([row for row in words_only(rows) if row.measures["image_tokens"] > 0], "entropy")
    if not words:
        return Findings(notes=[*notes, "No word was generated after a picture: there is nothing to analyse."])
    data = _Words(words, resamples)
    numbers = {**_separation(data), **_relation(data)}
    tables = [_by_type(data), _separation_table(numbers), _policies(data), _by_layer(data)]
    counts = {label.value: int(data.of(label).sum()) for label in LABELS}
    for label in (Label.GROUNDED, Label.HALLUCINATED):
        if counts[label] < 20:
            notes.append(f"Only {counts[label]} {label} words: differences and AUROC say little; use more samples.")
    curves = {
        "layers": data.entropy.shape[1],
        "counts": counts,
        "images": len(set(data.images)),
        "entropy": {label.value: _curve(data, data.entropy, label) for label in LABELS},
        "mass": {label.value: _curve(data, data.mass, label) for label in LABELS},
        "abnormal": {label.value: _curve(data, data.abnormal, label) for label in LABELS},
        "quartiles": {label.value: _quartiles(data.entropy[data.of(label)]) for label in LABELS},
        "auroc": [dataclasses.asdict(data.auroc(data.entropy[:, layer])) for layer in range(data.entropy.shape[1])],
        "relation": [
            dataclasses.asdict(data.pearson(data.entropy[:, layer], data.mass[:, layer]))
            for layer in range(data.entropy.shape[1])
        ],
        "flagged": _flagged(data),
        "largest": float(np.log([row.measures["image_tokens"] for row in words]).mean()),
    }
    return Findings(numbers=numbers, tables=tables, data=curves, notes=notes)


def with_heads(findings: Findings, samples: Sequence[SampleRows]) -> Findings:
    """Add the share of tokens at which each head was abnormal, ``[layers][heads]``."""
    counted = [sample for sample in samples if sample.rows and sample.measures.get("abnormal_heads")]
    if not counted:
        return findings
    total = np.sum([sample.measures["abnormal_heads"] for sample in counted], axis=0, dtype=np.float64)
    tokens = sum(len(sample.rows) for sample in counted)
    return dataclasses.replace(findings, data={**findings.data, "heads": (total / tokens).tolist(), "tokens": tokens})


def flags(entropy: Array, threshold: Threshold) -> Array:
    """Apply a threshold policy to recorded entropies, layer after layer.

    Parameters
    ----------
    entropy
        ``[words, layers]``.

    Returns
    -------
    Array
        ``[words, layers]``, 1.0 where the layer is flagged; the first layer never is.
    """
    import torch

    values = torch.from_numpy(np.ascontiguousarray(entropy))
    seen, flagged = threshold.start(values[:, 0]), []
    for layer in range(values.shape[1]):
        flagged.append(threshold.flagged(seen, values[:, layer]))
        seen = threshold.update(seen, values[:, layer])
    return torch.stack(flagged, 1).double().numpy()


class _Words:
    """Words as arrays, ``[words, layers]`` each."""

    def __init__(self, words: Sequence[TokenRow], resamples: int) -> None:
        self.words, self.resamples = words, resamples
        self.entropy = stats.matrix(words, "entropy")
        self.mass = stats.matrix(words, "mass")
        self.abnormal = stats.matrix(words, "abnormal")
        self.largest = np.log(np.array([row.measures["image_tokens"] for row in words], dtype=np.float64))
        self.images = [row.image_id for row in words]
        self.labels = np.array([row.label.value for row in words])
        self.position = np.array([row.position for row in words], dtype=np.float64)

    def of(self, label: Label) -> Any:
        """Mask of the words of a label."""
        return self.labels == label.value

    def mean(self, values: Array, label: Label) -> Estimate:
        """Mean over the words of a label."""
        mask = self.of(label)
        images = [image for image, kept in zip(self.images, mask, strict=True) if kept]
        return stats.mean(values[mask], images, n=self.resamples)

    def auroc(self, scores: Array) -> Estimate:
        """How well a score tells hallucinated from grounded words."""
        mask = self.of(Label.HALLUCINATED) | self.of(Label.GROUNDED)
        images = [image for image, kept in zip(self.images, mask, strict=True) if kept]
        return stats.auroc(scores[mask], self.of(Label.HALLUCINATED)[mask], images, n=self.resamples)

    def pearson(self, x: Array, y: Array) -> Estimate:
        """Correlation over all words."""
        return stats.pearson(x, y, self.images, n=self.resamples)

    def difference(self, values: Array) -> Estimate:
        """Mean of the hallucinated minus mean of the grounded words."""
        sides = []
        for label in (Label.GROUNDED, Label.HALLUCINATED):
            mask = self.of(label)
            sides += [values[mask], [image for image, kept in zip(self.images, mask, strict=True) if kept]]
        return stats.difference(*sides, n=self.resamples)


def _separation(data: _Words) -> dict[str, Estimate]:
    """How well entropy tells hallucinated from grounded words, beside baselines that need no entropy."""
    return {
        "auroc/entropy_mean": data.auroc(data.entropy.mean(1)),
        "auroc/entropy_max": data.auroc(data.entropy.max(1)),
        "auroc/low_mass": data.auroc(-data.mass.mean(1)),
        "auroc/position": data.auroc(data.position),
        "difference/entropy": data.difference(data.entropy.mean(1)),
        "difference/mass": data.difference(data.mass.mean(1)),
    }


def _relation(data: _Words) -> dict[str, Estimate]:
    """Correlation of entropy and mass, pooled over layers with each layer centred: could one replace the other."""
    entropy, mass = ((part - part.mean(0)).ravel() for part in (data.entropy, data.mass))
    images = [image for image in data.images for _ in range(data.entropy.shape[1])]
    return {"correlation/entropy_mass": stats.pearson(entropy, mass, images, n=data.resamples)}


def _by_type(data: _Words) -> Table:
    rows: list[tuple[Any, ...]] = []
    for label in LABELS:
        if not data.of(label).any():
            rows.append((label.value, 0, None, None, None, None))
            continue
        mean = data.entropy.mean(1)
        rows.append(
            (
                label.value,
                int(data.of(label).sum()),
                data.mean(mean, label),
                data.mean(mean / np.where(data.largest > 0, data.largest, np.nan), label),
                data.mean(data.mass.mean(1), label),
                data.mean(data.abnormal.mean(1), label),
            )
        )
    columns = ("words", "n", "LIAE (nats)", "LIAE / ln n", "image mass", "abnormal heads per layer")
    return Table("by_type", "Attention to the picture by type of word (means over layers)", columns, tuple(rows))


def _separation_table(numbers: Mapping[str, Estimate]) -> Table:
    titles = {
        "auroc/entropy_mean": "AUROC of LIAE, mean over layers",
        "auroc/entropy_max": "AUROC of LIAE, highest layer",
        "auroc/low_mass": "AUROC of low image mass (baseline)",
        "auroc/position": "AUROC of the position in the reply (baseline)",
        "difference/entropy": "LIAE, hallucinated minus grounded (nats)",
        "difference/mass": "image mass, hallucinated minus grounded",
        "correlation/entropy_mass": "correlation of LIAE and image mass within layers",
    }
    rows = tuple((title, numbers[name].n, numbers[name]) for name, title in titles.items())
    return Table("separation", "Does entropy tell hallucinated from grounded words?", ("", "n", "value"), rows)


def _flagged(data: _Words) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, threshold in POLICIES.items():
        # the first layer has nothing to be compared with
        share = flags(data.entropy, threshold)[:, 1:]
        found[name] = {
            "by_layer": [0.0, *share.mean(0).tolist()],
            **{
                label.value: dataclasses.asdict(data.mean(share.mean(1), label))
                for label in LABELS
                if data.of(label).any() and share.shape[1]
            },
        }
    return found


def _policies(data: _Words) -> Table:
    rows = []
    for name, threshold in POLICIES.items():
        share = flags(data.entropy, threshold)[:, 1:].mean(1)
        cells = [data.mean(share, label) if data.of(label).any() else None for label in LABELS]
        rows.append((name, *cells, data.difference(share)))
    columns = ("threshold", *(label.value for label in LABELS), "hallucinated - grounded")
    return Table("policies", "Share of layers that each threshold would flag", columns, tuple(rows))


def _by_layer(data: _Words) -> Table:
    rows = []
    for layer in range(data.entropy.shape[1]):
        means = [
            data.mean(data.entropy[:, layer], label) if data.of(label).any() else None
            for label in (Label.GROUNDED, Label.HALLUCINATED)
        ]
        rows.append(
            (
                str(layer),
                *means,
                data.auroc(data.entropy[:, layer]),
                float(data.mass[:, layer].mean()),
                float(data.abnormal[:, layer].mean()),
                data.pearson(data.entropy[:, layer], data.mass[:, layer]),
            )
        )
    columns = ("layer", "LIAE grounded", "LIAE hallucinated", "AUROC", "image mass", "abnormal heads", "r(LIAE, mass)")
    return Table("by_layer", "Layer by layer", columns, tuple(rows))


def _curve(data: _Words, values: Array, label: Label) -> list[dict[str, Any]]:
    if not data.of(label).any():
        return []
    return [dataclasses.asdict(data.mean(values[:, layer], label)) for layer in range(values.shape[1])]


def _quartiles(values: Array) -> list[list[float]]:
    """Return the 10th, 25th, 50th, 75th and 90th percentile per layer; empty without values."""
    if not len(values):
        return []
    found: list[list[float]] = np.percentile(values, [10, 25, 50, 75, 90], axis=0).T.tolist()
    return found
