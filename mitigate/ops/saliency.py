"""Saliency arithmetic: what one attention row owes its keys, for one token that it predicts.

Source: arXiv 2601.20279, Eq. 2-6. Shapes: B rows of a request, H query heads, K keys, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

#: Ways to normalise a saliency row (Eq. 5 has ``row_l2``).
NORMS = ("row_l2", "row_l1", "row_max", "none")
#: Ways to sum up a saliency row over key columns (Eq. 6 has ``mean``).
REDUCTIONS = ("mean", "sum", "window_sum")


def cotangent(logits: Tensor, token: Tensor, *, unit: bool = True) -> Tensor:
    """Gradient of a token's cross-entropy with respect to the logits (Eq. 2-3), or its direction.

    It is ``p - e_c = (1 - p_c) (q - e_c)`` with q the softmax over the other tokens: the direction is known exactly
    even where ``1 - p_c`` underflows. A normalised row does not depend on the length. Where c is the only token left (a
    cut-off put minus infinity everywhere else) q is taken as zero: the direction is ``-e_c``.

    Parameters
    ----------
    logits
        ``[B, V]`` float32, raw.
    token
        ``[B]`` the token c of every row.
    unit
        Whether to return it at length 1.

    Returns
    -------
    Tensor
        ``[B, V]``.
    """
    others = logits.scatter(1, token[:, None], -torch.inf).softmax(-1)
    others = torch.where((logits.isfinite().sum(-1) > 1)[:, None], others, 0.0)
    direction = others.scatter(1, token[:, None], -1.0)
    if unit:
        length = 1.0 / direction.norm(dim=-1, keepdim=True)
    else:
        length = logits.softmax(-1).scatter(1, token[:, None], 0.0).sum(-1, keepdim=True)  # 1 - p_c, uncancelled
    scaled: Tensor = direction * length
    return scaled


def saliency_row(attention: Tensor, gradient: Tensor) -> Tensor:
    """Sum ``|A * dA|`` (Eq. 4) over heads: ``[B, H, K]`` twice to ``[B, K]``."""
    return (attention * gradient).abs().sum(1)


def normalised(row: Tensor, norm: str) -> Tensor:
    """Divide a saliency row by its size over all keys (Eq. 5); a row of zeros stays one.

    Parameters
    ----------
    row
        ``[B, K]``, not negative.
    norm
        One of `NORMS`.
    """
    if norm == "none":
        return row
    tiny = torch.finfo(row.dtype).tiny
    largest = row.amax(-1, keepdim=True)
    row = row / (largest + tiny)  # first to at most 1: squares of small numbers would underflow
    if norm == "row_max":
        return row
    size = row.norm(dim=-1, keepdim=True) if norm == "row_l2" else row.sum(-1, keepdim=True)
    shares: Tensor = row / (size + tiny)
    return shares


def last_columns(columns: Tensor, count: int) -> Tensor:
    """Keep the last ``count`` True entries of every row of a mask ``[B, K]``."""
    from_the_right = columns.flip(-1).cumsum(-1).flip(-1)
    return columns & (from_the_right <= count)


def reduced(row: Tensor, columns: Tensor, reduce: str) -> Tensor:
    """Sum up a saliency row over a mask of columns (Eq. 6): ``[B, K]`` twice to ``[B]``; 0 where the mask is empty.

    Parameters
    ----------
    row
        Normalised saliency.
    columns
        Which keys count; for ``window_sum`` already cut to the window (`last_columns`).
    reduce
        One of `REDUCTIONS`.
    """
    total = (row * columns).sum(-1)
    return total / columns.sum(-1).clamp_min(1) if reduce == "mean" else total


def layer_shares(
    parts: Iterable[tuple[Tensor, Tensor]], columns: Sequence[Tensor], *, norm: str, reduce: str
) -> list[Tensor]:
    """Saliency of one row layer by layer (Eq. 4-6), over several masks of columns.

    Parameters
    ----------
    parts
        Per layer ``(A, dA)``, each ``[B, H, K]``.
    columns
        Masks ``[B, K]``.
    norm, reduce
        As in `normalised` and `reduced`.

    Returns
    -------
    list
        Per mask ``[B, layers]`` float32.
    """
    device = columns[0].device
    shares = [normalised(saliency_row(*part), norm).to(device, torch.float32) for part in parts]
    return [torch.stack([reduced(share, mask, reduce) for share in shares], -1) for mask in columns]
