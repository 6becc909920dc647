"""Choosing heads of a layer by a score, and mixing heads with each other.

Shapes: B rows of the batch, H heads, R query rows, K keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Rules of `low_heads`.
LOW = ("below_mean", "bottom_k", "ratio_of_best", "below_median")
#: Kinds of `reference_shares`.
REFERENCES = ("argmax_iaf", "topk_mean", "iaf_weighted")


def low_heads(score: Tensor, rule: str, *, count: int, ratio: float) -> Tensor:
    """Heads with a low score.

    Parameters
    ----------
    score
        ``[B, H, R]``.
    rule
        ``below_mean`` of the heads; ``below_median`` (mean of the two middle ones if H is even); ``bottom_k``, the
        ``count`` lowest; ``ratio_of_best``, below ``ratio`` times the highest score.

    Returns
    -------
    Tensor
        ``[B, H, R]`` bool.
    """
    if rule == "below_mean":
        return score < score.mean(1, keepdim=True)
    if rule == "ratio_of_best":
        return score < ratio * score.amax(1, keepdim=True)
    heads, ordered = score.shape[1], score.sort(dim=1, stable=True)
    if rule == "below_median":
        return score < ordered.values[:, [(heads - 1) // 2, heads // 2]].mean(1, keepdim=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, ordered.indices[:, :count], True)


def reference_shares(score: Tensor, kind: str, *, count: int) -> Tensor:
    """Share of each head in the reference the low heads are mixed with; sums to 1 over heads.

    Parameters
    ----------
    score
        ``[B, H, R]``, not negative.
    kind
        ``argmax_iaf``: the best head alone; ``topk_mean``: the ``count`` best in equal parts; ``iaf_weighted``: every
        head in proportion to its score.

    Returns
    -------
    Tensor
        ``[B, H, R]``.
    """
    if kind == "iaf_weighted":
        total = score.sum(1, keepdim=True)
        tiny = torch.finfo(score.dtype).tiny
        return torch.where(total > tiny, score / total.clamp_min(tiny), 1.0 / score.shape[1])
    best = score.argmax(1, keepdim=True)
    if kind == "topk_mean":
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score).scatter(1, best, 1.0 / best.shape[1])


def mix_heads(
    matrix: Tensor, reference: Tensor, heads: Tensor, amount: float, *, keys: Tensor | None = None, scores: bool = False
) -> Tensor:
    """Interpolate heads towards a reference row; everything else stays bit for bit.

    Parameters
    ----------
    matrix
        ``[B, H, R, K]`` weights, or scores before softmax.
    reference
        ``[B, 1, R, K]``.
    heads
        ``[B, H, R]`` which to mix.
    amount
        0 keeps the head, 1 replaces it.
    keys
        ``[B, R, K]``: mix these keys only, and scale weights so that the row's sum stays; all by default.
    scores
        Whether these are scores: masked ones stay masked, and no sum is kept.
    """
    mixed = torch.lerp(matrix, reference, amount)
    if keys is not None:
        mixed = torch.where(keys.unsqueeze(1), mixed, matrix)
        if not scores:
            mixed = mixed * (matrix.sum(-1, keepdim=True) / mixed.sum(-1, keepdim=True))
    chosen = heads.unsqueeze(-1)
    return torch.where(chosen & ~masked(matrix) if scores else chosen, mixed, matrix)


def weighted_row(matrix: Tensor, shares: Tensor, *, scores: bool = False) -> Tensor:
    """Sum of the heads' rows by their shares ``[B, H, R]``, ``[B, 1, R, K]``; scores hidden in all heads stay so."""
    if not scores:
        return (shares.unsqueeze(-1) * matrix).sum(1, keepdim=True)
    # masked scores are as large as the dtype allows: adding them up would overflow
    hidden = masked(matrix)
    row = (shares.unsqueeze(-1) * matrix.masked_fill(hidden, 0.0)).sum(1, keepdim=True)
    return row.masked_fill(hidden.all(1, keepdim=True), torch.finfo(row.dtype).min)


def masked(scores: Tensor) -> Tensor:
    """Which scores are hidden from softmax: at, or next to, the least number of the dtype."""
    return scores <= torch.finfo(scores.dtype).min / 2
