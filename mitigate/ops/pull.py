"""Edits that move attention to anchors and away from noise, and the gate that ties them to drift.

Shapes as in `mitigate.ops.anchors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitigate.lazy import torch
from mitigate.ops.similarity import bhattacharyya, head_weights, masked_deviation, masked_mean, pooled, restricted

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.ops.anchors import Maps

#: A log ratio never moves a score by more than this.
LOG_RATIO_LIMIT = 2.0


@dataclass(frozen=True, kw_only=True)
class Pull:
    """How deep layers are edited; the meaning of every field is that of the method's parameter of this name."""

    operator: str
    scale: str
    alpha: float
    beta: float
    mix: float
    damp: float
    mass: str
    gate: str
    gate_input: str
    heads: str
    pool: str
    top_heads: float

    def score_bias(self, scores: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
        """Return what is added to scores ``[B, H, R, K]``: ``[B, H, R, W]``, and the gate ``[B, G, R]``."""
        columns, width = maps.columns.unsqueeze(1), maps.columns.shape[-1]
        shares, mass = restricted(scores.softmax(-1)[..., :width].unsqueeze(2), columns)
        step = score_step(scores[..., :width], maps, self.operator, self.scale, self.alpha, self.beta)
        gate = self._gate(shares if self.gate_input == "raw" else stepped(shares, step), mass, maps)
        bias = gate[:, None, ..., None] * step
        if self.mass == "preserve":
            bias = keep_mass(bias, shares, columns)
        return torch.where(self._edited_heads(mass), bias, 0.0).sum(2), gate

    def mixed(self, probs: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
        """Return the new weights of the prompt's columns ``[B, H, R, W]`` and the gate ``[B, G, R]``."""
        columns = maps.columns.unsqueeze(1)
        shares, mass = restricted(probs.unsqueeze(2), columns)
        seen = shares.detach()
        if self.gate_input == "edited":
            seen = mixture(seen, maps, torch.ones_like(mass[:, 0]), self.mix, self.damp)
        gate = self._gate(seen, mass.detach(), maps)
        new = mixture(shares, maps, gate, self.mix, self.damp) * mass.unsqueeze(-1)
        acts = (gate > 0) & ((maps.anchors > 0) | (maps.penalty > 0)).any(-1)
        edited = columns & acts[:, None, ..., None] & self._edited_heads(mass)
        return torch.where(edited.any(2), torch.where(edited, new, 0.0).sum(2), probs), gate

    def _gate(self, shares: Tensor, mass: Tensor, maps: Maps) -> Tensor:
        """Gate of every group and row, ``[B, G, R]``, from this layer's maps."""
        if self.gate == "none":
            return torch.ones_like(mass[:, 0])
        deep = pooled(shares, head_weights(mass, self.pool, self.top_heads))
        noise, middle = (restricted(field, maps.columns)[0] for field in (maps.noise, maps.middle))
        return drift_gate(deep, noise, middle)

    def _edited_heads(self, mass: Tensor) -> Tensor:
        """Heads to edit, ``[B, H, G, R, 1]``."""
        chosen = (
            mass >= mass.mean(1, keepdim=True) if self.heads == "visual" else torch.ones_like(mass, dtype=torch.bool)
        )
        return chosen.unsqueeze(-1)


def drift_gate(deep: Tensor, noise: Tensor, middle: Tensor) -> Tensor:
    """How far a deep map has drifted from the middle map (0) to the noise map (1), ``[...]``.

    The ratio BC(p, n) / (BC(p, n) + BC(p, m)) is b / (1 + b) at p = m and 1 / (1 + b) at p = n, with b = BC(n, m);
    between these two it is stretched to [0, 1] and clipped. 0.5 where n and m are the same map.
    """
    to_noise, to_middle, apart = bhattacharyya(deep, noise), bhattacharyya(deep, middle), bhattacharyya(noise, middle)
    range_ = (1.0 - apart) * (to_noise + to_middle)
    stretched = (to_noise - apart * to_middle) / torch.where(range_ > 0, range_, 1.0)
    return torch.where(1.0 - apart > 1e-6, stretched.clamp(0.0, 1.0), 0.5)


def score_step(scores: Tensor, maps: Maps, operator: str, scale: str, alpha: float, beta: float) -> Tensor:
    """Return what is added to the scores at full strength, ``[B, H or 1, G, R, W]``, zero off the columns.

    Parameters
    ----------
    scores
        ``[B, H, R, W]``.
    operator
        ``logit``: c (alpha s - beta nu), where ``scale`` gives the head's unit c; ``log_ratio``: alpha ln((m + u) / 2u)
        - beta ln((n + u) / 2u) with u = 1 / N, cut at `LOG_RATIO_LIMIT`.
    """
    columns = maps.columns.unsqueeze(1)
    if operator == "log_ratio":
        u = maps.columns.sum(-1, keepdim=True).clamp_min(1).to(maps.noise.dtype).reciprocal()
        step = alpha * ((maps.middle + u) / (2 * u)).log() - beta * ((maps.noise + u) / (2 * u)).log()
        return torch.where(columns, step.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).unsqueeze(1), 0.0)
    wanted = (alpha * maps.anchors - beta * maps.penalty).unsqueeze(1)
    if scale == "none":
        return wanted
    grouped = scores.unsqueeze(2)
    unit = masked_mean(grouped.abs(), columns) if scale == "absmean" else masked_deviation(grouped, columns)
    return unit.unsqueeze(-1) * wanted


def keep_mass(bias: Tensor, shares: Tensor, columns: Tensor) -> Tensor:
    """Shift a bias on the scores so that the columns keep their attention mass; arguments ``[B, H, G, R, W]``."""
    shift = (shares.log() + bias).logsumexp(-1, keepdim=True)
    return torch.where(columns & shift.isfinite(), bias - shift, 0.0)


def stepped(shares: Tensor, step: Tensor) -> Tensor:
    """Return the distribution after a step on its scores, ``[..., W]``; zeros where there was none."""
    return (shares.log() + step).softmax(-1).nan_to_num(0.0)


def mixture(shares: Tensor, maps: Maps, gate: Tensor, mix: float, damp: float) -> Tensor:
    """(1 - r g) normalise(p (1 - b g nu)) + r g s / sum(s), ``[B, H, G, R, W]``.

    Parameters
    ----------
    shares
        p, ``[B, H, G, R, W]``.
    gate
        g, ``[B, G, R]``.
    mix, damp
        r and b. A row without anchors is only damped; a map that damping would empty stays.
    """
    strength = gate[:, None, ..., None]
    damped, left = restricted(shares * (1.0 - damp * strength * maps.penalty.unsqueeze(1)), maps.columns.unsqueeze(1))
    damped = torch.where(left.unsqueeze(-1) > 0, damped, shares)
    target, held = restricted(maps.anchors, maps.columns)
    ratio = torch.where(held[:, None, ..., None] > 0, mix * strength, 0.0)
    return (1.0 - ratio) * damped + ratio * target.unsqueeze(1)
