"""Attention maps over a set of columns: distributions, how alike two are, and statistics that ignore other columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

POOLS = ("mean", "mass", "top")


def restricted(weights: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Restrict attention to some columns and renormalise it to sum 1.

    Parameters
    ----------
    weights
        ``[..., K]``, not negative.
    columns
        ``[..., K]`` bool, broadcast with the weights: the columns to keep, such as the visual ones.

    Returns
    -------
    tuple
        Distribution ``[..., K]`` (zeros where no weight lies on the columns) and the mass ``[...]`` they held.
    """
    kept = torch.where(columns, weights, 0.0)
    mass = kept.sum(-1)
    return kept / mass.clamp_min(torch.finfo(kept.dtype).tiny).unsqueeze(-1), mass


def bhattacharyya(left: Tensor, right: Tensor) -> Tensor:
    """Bhattacharyya coefficient of distributions ``[..., K]``: sum of sqrt(p q), 1 when equal, 0 when disjoint."""
    return (left * right).sqrt().sum(-1)


def hellinger(left: Tensor, right: Tensor) -> Tensor:
    """Hellinger distance of distributions ``[..., K]``, between 0 (equal) and 1 (disjoint)."""
    return (0.5 * (left.sqrt() - right.sqrt()).square().sum(-1)).sqrt()


def jensen_shannon(left: Tensor, right: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions ``[..., K]`` in nats, between 0 (equal) and ln 2 (disjoint)."""
    middle = 0.5 * (left + right)
    middle = torch.where(middle > 0, middle, 1.0)
    divergence: Tensor = torch.special.xlogy(left, left / middle) + torch.special.xlogy(right, right / middle)
    return 0.5 * divergence.sum(-1)


def head_weights(mass: Tensor, pool: str, share: float) -> Tensor:
    """Weights with which heads enter a pooled map.

    Parameters
    ----------
    mass
        ``[B, H, ...]`` what each head puts on the columns.
    pool
        ``mean`` (all alike), ``mass`` (by mass) or ``top`` (the ``share`` of heads with the most mass, alike).
    share
        For ``top``: between 0 and 1; at least one head.

    Returns
    -------
    Tensor
        ``[B, H, ...]``.
    """
    if pool == "mass":
        return mass
    if pool == "top":
        chosen = top(mass.movedim(1, -1), max(1, round(share * mass.shape[1])))
        return chosen.movedim(-1, 1).to(mass.dtype)
    return torch.ones_like(mass)


def pooled(maps: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over heads of ``[B, H, ..., K]`` with weights ``[B, H, ...]``: ``[B, ..., K]``."""
    total = weights.sum(1).clamp_min(torch.finfo(maps.dtype).tiny)
    return (maps * weights.unsqueeze(-1)).sum(1) / total.unsqueeze(-1)


def top(values: Tensor, count: Tensor | int) -> Tensor:
    """Mark the ``count`` (number or ``[...]``) largest of ``[..., K]``; among equals the first column wins."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return rank < (count if isinstance(count, int) else count.unsqueeze(-1))


def masked_mean(values: Tensor, columns: Tensor) -> Tensor:
    """Mean of ``[..., K]`` over the columns ``[..., K]`` that are True; 0 where there are none."""
    return torch.where(columns, values, 0.0).sum(-1) / columns.sum(-1).clamp_min(1)


def masked_deviation(values: Tensor, columns: Tensor) -> Tensor:
    """Median absolute deviation of ``[..., K]`` over columns that are True (lower medians); 0 where there are none."""
    kept = torch.where(columns, values, float("nan"))
    distance = (kept - kept.nanmedian(-1, keepdim=True).values).abs()
    return distance.nanmedian(-1).values.nan_to_num(0.0)
