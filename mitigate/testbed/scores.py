"""Scoring captions and answers of the testbed against its exact ground truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mitigate.testbed.language import Question, mentioned, sentences
from mitigate.testbed.world import OBJECTS, PARTNER, is_related

if TYPE_CHECKING:
    from collections.abc import Sequence


def caption_metrics(captions: Sequence[str], truths: Sequence[frozenset[str]]) -> dict[str, float]:
    """CHAIR_i, CHAIR_s, recall and length of captions.

    Parameters
    ----------
    captions
        One per scene.
    truths
        Objects in each scene.

    Returns
    -------
    dict
        ``chair_i`` (hallucinated mentions / mentions), ``chair_s`` (captions with at least one / captions), ``recall``
        (objects named / objects present, over all scenes) and ``words`` (mean words per caption).
    """
    named = [mentioned(text) for text in captions]
    wrong = [[name for name in names if name not in truth] for names, truth in zip(named, truths, strict=True)]
    found = sum(len(set(names) & truth) for names, truth in zip(named, truths, strict=True))
    return {
        "chair_i": sum(map(len, wrong)) / max(1, sum(map(len, named))),
        "chair_s": sum(bool(names) for names in wrong) / max(1, len(wrong)),
        "recall": found / max(1, sum(map(len, truths))),
        "words": sum(len(text.split()) for text in captions) / max(1, len(captions)),
    }


def kinship_metrics(captions: Sequence[str], truths: Sequence[frozenset[str]]) -> dict[str, float]:
    """Tell what the hallucinated objects have to do with what is there.

    Returns
    -------
    dict
        Shares of the hallucinated mentions which are the partner of something present, or its partner or theme-mate,
        each beside the share expected if hallucinated objects were drawn evenly from those absent.
    """
    totals = {"partner": 0.0, "related": 0.0, "partner_by_chance": 0.0, "related_by_chance": 0.0}
    count = 0
    for text, truth in zip(captions, truths, strict=True):
        partners = {PARTNER[name] for name in truth} - truth
        absent = [name for name in OBJECTS if name not in truth]
        related = {name for name in absent if is_related(name, truth)}
        for name in mentioned(text):
            if name not in truth:
                count += 1
                totals["partner"] += name in partners
                totals["related"] += name in related
                totals["partner_by_chance"] += len(partners) / len(absent)
                totals["related_by_chance"] += len(related) / len(absent)
    return {key: value / max(1, count) for key, value in totals.items()} | {"count": float(count)}


def rate_by_sentence(captions: Sequence[str], truths: Sequence[frozenset[str]]) -> list[dict[str, float]]:
    """Share of hallucinated mentions and number of mentions at each sentence index, from the first sentence on."""
    rows: list[list[int]] = []
    for text, truth in zip(captions, truths, strict=True):
        for index, part in enumerate(sentences(text)):
            while len(rows) <= index:
                rows.append([0, 0])
            for name in mentioned(part):
                rows[index][0] += name not in truth
                rows[index][1] += 1
    return [{"rate": wrong / max(1, total), "mentions": float(total)} for wrong, total in rows]


def answer_metrics(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 of "yes", yes-rate, and the share of answers that are neither yes nor no (counted as no)."""
    said = [answer.lower().startswith("yes") for answer in answers]
    truth = [question.label == "yes" for question in questions]
    hits = sum(a and b for a, b in zip(said, truth, strict=True))
    total = max(1, len(questions))
    return {
        "accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / total,
        "f1": 2 * hits / max(1, sum(said) + sum(truth)),
        "yes_rate": sum(said) / total,
        "unclear": sum(not answer.lower().startswith(("yes", "no")) for answer in answers) / total,
    }


def chair_difference(
    before: Sequence[str],
    after: Sequence[str],
    truths: Sequence[frozenset[str]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Difference in CHAIR_i (after minus before) with its 95 % interval.

    Parameters
    ----------
    before, after
        Captions of the same scenes.
    truths
        Objects in each scene.
    resamples, seed
        Size and seed of the paired bootstrap over scenes.

    Returns
    -------
    dict
        ``difference``, ``low`` and ``high``.
    """
    counts = np.array(
        [
            [value for text in pair for value in _wrong_and_all(text, truth)]
            for pair, truth in zip(zip(before, after, strict=True), truths, strict=True)
        ],
        dtype=np.float64,
    )
    picks = np.random.RandomState(seed).randint(len(counts), size=(resamples, len(counts)))
    sums = counts[picks].sum(axis=1)
    spread = sums[:, 2] / np.maximum(1, sums[:, 3]) - sums[:, 0] / np.maximum(1, sums[:, 1])
    total = counts.sum(axis=0)
    low, high = np.percentile(spread, [2.5, 97.5])
    return {
        "difference": float(total[2] / max(1, total[3]) - total[0] / max(1, total[1])),
        "low": float(low),
        "high": float(high),
    }


def _wrong_and_all(text: str, truth: frozenset[str]) -> tuple[int, int]:
    names = mentioned(text)
    return sum(name not in truth for name in names), len(names)
