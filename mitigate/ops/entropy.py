"""How attention is spread over a set of keys: mass, Shannon entropy, pooling over heads, thresholds over depth.

Shapes: B rows of the batch, H heads, R query rows, K keys. Entropies are in nats. A distribution without any mass
counts as uniform over its keys, so that no result is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Ways to turn the heads of a layer into one number; see `pooled_entropy`.
POOLS = ("mass_mean", "renorm_mean", "max", "mean_of_entropies")
#: Policies of `Threshold`.
THRESHOLDS = ("bas_min", "running_mean", "mean_plus_kstd", "ema", "fixed")


def key_mass(weights: Tensor, keys: Tensor) -> Tensor:
    """Attention on a set of keys, per head.

    Parameters
    ----------
    weights
        ``[B, H, R, K]``.
    keys
        ``[B, R, K]`` bool.

    Returns
    -------
    Tensor
        ``[B, H, R]``.
    """
    return torch.where(keys.unsqueeze(1), weights, 0.0).sum(-1)


def largest_entropy(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Entropy of the uniform distribution over a set of keys, ln n; 0 for an empty set.

    Parameters
    ----------
    keys
        ``[..., K]`` bool.

    Returns
    -------
    Tensor
        ``[...]``.
    """
    count = keys.sum(-1).clamp_min(1).to(dtype)
    return count.log()


def renormalised(weights: Tensor, keys: Tensor) -> Tensor:
    """Make the weights on a set of keys sum to 1; uniform where they have no mass, zeros for an empty set.

    Parameters
    ----------
    weights
        ``[..., K]``, not negative.
    keys
        Bool, broadcasts with the weights.
    """
    inside = torch.where(keys, weights, 0.0)
    mass = inside.sum(-1, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    even = keys.to(weights.dtype) / keys.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(mass > tiny, inside / mass.clamp_min(tiny), even)


def restricted_entropy(weights: Tensor, keys: Tensor, *, renormalise: bool = True) -> Tensor:
    """Shannon entropy of the weights on a set of keys.

    Parameters
    ----------
    weights
        ``[..., K]``, not negative.
    keys
        Bool, broadcasts with the weights.
    renormalise
        Whether the weights are first made to sum to 1 over the keys: then the result measures spread alone and lies in
        [0, ln n]. Otherwise it is ``-sum a ln a`` of the weights as they are, which grows with their mass.

    Returns
    -------
    Tensor
        ``[...]`` nats.
    """
    spread = renormalised(weights, keys) if renormalise else torch.where(keys, weights, 0.0)
    entropy: Tensor = torch.special.entr(spread).sum(-1)
    if not renormalise:
        return entropy
    return torch.minimum(entropy, largest_entropy(keys, weights.dtype)).clamp_min(0.0)


def pooled_entropy(weights: Tensor, keys: Tensor, *, pool: str = "mass_mean", renormalise: bool = True) -> Tensor:
    """One entropy per row for all heads of a layer.

    Parameters
    ----------
    weights
        ``[B, H, R, K]``, not negative.
    keys
        ``[B, R, K]`` bool.
    pool
        ``mass_mean``: entropy of the heads' mean weights, so that a head counts by its mass on the keys;
        ``renorm_mean``: of the mean of the heads' own distributions over the keys; ``max``: of the largest weight of
        any head; ``mean_of_entropies``: mean of the heads' own entropies.
    renormalise
        See `restricted_entropy`.

    Returns
    -------
    Tensor
        ``[B, R]`` nats.
    """
    if pool == "mean_of_entropies":
        return restricted_entropy(weights, keys.unsqueeze(1), renormalise=renormalise).mean(1)
    if pool == "renorm_mean":
        pooled = renormalised(weights, keys.unsqueeze(1)).mean(1)
    elif pool == "max":
        pooled = weights.amax(1)
    else:
        pooled = weights.mean(1)
    return restricted_entropy(pooled, keys, renormalise=renormalise)


def image_entropy(
    weights: Tensor,
    keys: Tensor,
    *,
    groups: Tensor | None = None,
    pool: str = "mass_mean",
    renormalise: bool = True,
    normalise: bool = False,
) -> Tensor:
    """Entropy of a layer's attention on the pictures.

    Parameters
    ----------
    weights, keys, pool, renormalise
        As for `pooled_entropy`.
    groups
        ``[B, K]`` number of the picture a key belongs to, -1 for none: the mean of the pictures' own entropies. Without
        it all keys are one set.
    normalise
        Whether to divide by the largest possible value, ln n (the mean of the pictures' ones).

    Returns
    -------
    Tensor
        ``[B, R]``, 0 where there is no key at all.
    """
    if groups is None:
        entropy = pooled_entropy(weights, keys, pool=pool, renormalise=renormalise)
        ceiling = largest_entropy(keys, weights.dtype)
    else:
        entropy, ceiling, count = (weights.new_zeros(keys.shape[:-1]) for _ in range(3))
        for group in range(int(groups.max()) + 1):
            members = keys & (groups == group).unsqueeze(1)
            present = members.any(-1)
            entropy = entropy + present * pooled_entropy(weights, members, pool=pool, renormalise=renormalise)
            ceiling = ceiling + largest_entropy(members, weights.dtype)
            count = count + present
        entropy, ceiling = entropy / count.clamp_min(1.0), ceiling / count.clamp_min(1.0)
    return entropy / torch.where(ceiling > 0, ceiling, 1.0) if normalise else entropy


def outlying_keys(weights: Tensor, keys: Tensor, deviations: float) -> Tensor:
    """Keys that draw far more attention than the others: head mean above mean plus some standard deviations.

    Parameters
    ----------
    weights
        ``[B, H, R, K]``.
    keys
        ``[B, R, K]`` bool; mean and (population) deviation are taken over these.
    deviations
        How many standard deviations.

    Returns
    -------
    Tensor
        ``[B, R, K]`` bool, a subset of the keys.
    """
    pooled = torch.where(keys, weights.mean(1), 0.0)
    count = keys.sum(-1, keepdim=True).clamp_min(1)
    mean = pooled.sum(-1, keepdim=True) / count
    spread = torch.where(keys, (pooled - mean) ** 2, 0.0).sum(-1, keepdim=True) / count
    return keys & (pooled > mean + deviations * spread.sqrt())


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """When a layer's entropy is too high, given the entropies of the layers before it.

    What is remembered of them is one tensor ``[3, ...]``: how many there were, a level, and a sum of squares.

    Parameters
    ----------
    policy
        What an entropy is compared with: ``bas_min`` the lowest so far; ``running_mean`` the mean so far;
        ``mean_plus_kstd`` that mean plus ``k_std`` (population) standard deviations; ``ema`` their exponential moving
        average; ``fixed`` a number.
    delta
        Margin added to the level.
    k_std, ema_decay, fixed
        Parameters of the policies that use them.
    first_eligible
        Whether the first layer, which has nothing to be compared with, counts as too high.
    """

    policy: str = "bas_min"
    delta: float = 0.0
    k_std: float = 1.0
    ema_decay: float = 0.9
    fixed: float = 0.0
    first_eligible: bool = False

    def start(self, entropy: Tensor) -> Tensor:
        """Return the memory before the first layer, for entropies of this shape."""
        seen = entropy.new_zeros(3, *entropy.shape)
        if self.policy == "bas_min":
            seen[1] = torch.inf
        return seen

    def level(self, seen: Tensor) -> Tensor:
        """Value an entropy must exceed to be flagged; NaN where there is no earlier layer to take it from."""
        count, level, squares = seen
        if self.policy == "fixed":
            return torch.full_like(level, self.fixed + self.delta)
        if self.policy == "mean_plus_kstd":
            level = level + self.k_std * (squares / count.clamp_min(1.0)).sqrt()
        return torch.where(count > 0, level + self.delta, torch.nan)

    def flagged(self, seen: Tensor, entropy: Tensor) -> Tensor:
        """E[l] > t[l-1] + delta, bool of the entropy's shape."""
        first = seen[0] == 0
        above = entropy > self.level(seen)  # False against NaN
        if not self.first_eligible:
            return above & ~first
        return above if self.policy == "fixed" else above | first

    def update(self, seen: Tensor, entropy: Tensor) -> Tensor:
        """Take in the entropy of one more layer."""
        count, level, squares = seen
        if self.policy == "bas_min":
            level = torch.minimum(level, entropy)
        elif self.policy == "ema":
            moved = self.ema_decay * level + (1.0 - self.ema_decay) * entropy
            level = torch.where(count > 0, moved, entropy)
        else:
            step = entropy - level
            level = level + step / (count + 1.0)
            squares = squares + step * (entropy - level)
        return torch.stack([count + 1.0, level, squares])
