"""What the samples' visual attention says about hallucination: pure functions of the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mitigate.diagnostics import stats
from mitigate.diagnostics.base import Estimate, Findings, SampleRows, Table
from mitigate.diagnostics.labels import Label

_TASKS = {"caption": "captions", "yes_no": "yes/no answers"}


def analyse(samples: Sequence[SampleRows], *, bins: int, resamples: int) -> Findings:
    """Correlate the entropy of the question's attention with hallucination, task by task.

    Parameters
    ----------
    samples
        With ``entropy`` and ``norms`` in their measures.
    bins
        Bins of equal count for the binned correlation; fewer where a bin would hold less than three samples.
    resamples
        Bootstrap resamples of the images.
    """
    seen = [sample for sample in samples if sample.measures.get("entropy") is not None]
    if not seen:
        return Findings(notes=["No sample has a picture and a question after it: there is nothing to analyse."])
    numbers: dict[str, Estimate] = {}
    data: dict[str, Any] = {"tasks": {}}
    rows, terciles = [], []
    for task, title in _TASKS.items():
        mine = [sample for sample in seen if sample.task == task]
        if mine:
            found, drawn = _of_task(mine, bins, resamples)
            numbers |= {f"{name}/{task}": number for name, number in found.items()}
            data["tasks"][task] = drawn
            cells = ("rate", "entropy", "r", "binned_r")
            rows.append((title, len(mine), *(found[name] for name in cells), found["binned_r"].n))
            thirds: Sequence[Estimate | None] = [_third(third) for third in drawn["thirds"]] or [None] * 3  # too few
            terciles.append((title, *thirds))
    columns = ("replies", "n", "hallucinated", "entropy (nats)", "r, per sample", "r, binned", "bins")
    tables = [
        Table(
            "correlation", "Entropy of the question's attention to the picture and hallucination", columns, tuple(rows)
        ),
        Table(
            "thirds",
            "Share of replies with a hallucination, by entropy (Wilson intervals)",
            ("replies", "lowest third", "middle third", "highest third"),
            tuple(terciles),
        ),
    ]
    norms, table = _norms(seen, resamples)
    notes = [] if norms.get("plain") else ["The stack is empty: the norms are the plain model's, nothing is compared."]
    for title, drawn in data["tasks"].items():
        if drawn["hallucinated"] in (0, drawn["n"]):
            notes.append(
                f"{title}: {drawn['hallucinated']} of {drawn['n']} replies hallucinate: no correlation exists."
            )
    return Findings(numbers, [*tables, *table], {**data, "norms": norms}, notes)


def _of_task(samples: Sequence[SampleRows], bins: int, resamples: int) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Return the estimates of one task, and what its figure draws."""
    entropy = np.array([sample.measures["entropy"] for sample in samples], dtype=np.float64)
    wrong = np.array([hallucinates(sample) for sample in samples], dtype=np.float64)
    images = [sample.image_id for sample in samples]
    parts = stats.equal_bins(entropy, max(1, min(bins, len(samples) // 3)))
    drawn = [
        {"entropy": float(entropy[part].mean()), **dataclasses.asdict(stats.wilson(int(wrong[part].sum()), len(part)))}
        for part in parts
    ]
    found = {
        "rate": stats.wilson(int(wrong.sum()), len(samples)),
        "entropy": stats.mean(entropy, images, n=resamples),
        "r": stats.pearson(entropy, wrong, images, n=resamples),
        "binned_r": binned_correlation(entropy, wrong, parts),
    }
    if len(samples) >= 3:
        thirds = [stats.wilson(int(wrong[part].sum()), len(part)) for part in stats.equal_bins(entropy, 3)]
    else:
        thirds = []
    return found, {
        "n": len(samples),
        "hallucinated": int(wrong.sum()),
        "bins": drawn,
        "entropy": {
            "with": entropy[wrong > 0].tolist(),
            "without": entropy[wrong == 0].tolist(),
        },
        "thirds": [dataclasses.asdict(third) for third in thirds],
        "largest": float(np.log([sample.measures["image_tokens"] for sample in samples]).mean()),
    }


def hallucinates(sample: SampleRows) -> bool:
    """Say whether a reply holds a hallucinated token."""
    return any(row.label is Label.HALLUCINATED for row in sample.rows)


def binned_correlation(x: Any, y: Any, parts: Sequence[Any]) -> Estimate:
    """Return Pearson's r of the bins' means with Student's p; no interval: bins hide the spread of the samples."""
    one, two = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    if len(parts) < 3 or not one.std() or not two.std():
        return Estimate(float("nan"), float("nan"), float("nan"), len(parts))
    r = float(np.clip(np.corrcoef(one, two)[0, 1], -1.0, 1.0))
    return Estimate(r, float("nan"), float("nan"), len(parts), stats.correlation_p(r, len(parts)))


def _third(third: dict[str, Any]) -> Estimate:
    return Estimate(**third)


def _norms(samples: Sequence[SampleRows], resamples: int) -> tuple[dict[str, Any], list[Table]]:
    """Mean norm of the visual tokens per layer with and without the stack, and their ratio."""
    # samples of one picture share it, but questions differ: every sample counts, pictures are the clusters
    images = [sample.image_id for sample in samples]
    with_stack = np.array([sample.measures["norms"] for sample in samples], dtype=np.float64)
    curves = {"stack": _curve(with_stack, images, resamples), "layers": with_stack.shape[1], "n": len(samples)}
    if not all(sample.measures.get("plain_norms") for sample in samples):
        return curves, []
    plain = np.array([sample.measures["plain_norms"] for sample in samples], dtype=np.float64)
    ratio = with_stack / plain
    curves |= {"plain": _curve(plain, images, resamples), "ratio": _curve(ratio, images, resamples)}
    before = np.array([sample.measures["plain_entropy"] for sample in samples], dtype=np.float64)
    after = np.array([sample.measures["entropy"] for sample in samples], dtype=np.float64)
    change = stats.mean(after - before, images, n=resamples)
    rows: list[tuple[Any, ...]] = [
        (
            str(layer),
            float(plain[:, layer].mean()),
            float(with_stack[:, layer].mean()),
            Estimate(**curves["ratio"][layer]),
        )
        for layer in range(ratio.shape[1])
    ]
    rows.append(("entropy (nats)", float(before.mean()), float(after.mean()), change))
    columns = ("layer", "without the stack", "with the stack", "ratio (entropy: difference)")
    return curves, [Table("norms", "Norm of the visual tokens after each layer", columns, tuple(rows))]


def _curve(values: Any, images: Sequence[str], resamples: int) -> list[dict[str, Any]]:
    return [dataclasses.asdict(stats.mean(values[:, layer], images, n=resamples)) for layer in range(values.shape[1])]
