"""Random numbers that depend on what they are for, not on the order or the batch in which they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# The constants of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def hashed_uniform(seed: Tensor, *counters: Tensor | int) -> Tensor:
    """Mix seeds and counters into numbers in [0, 1).

    Parameters
    ----------
    seed
        int64 tensor, for instance ``[B, 1, 1]``.
    *counters
        Integers or int64 tensors that broadcast with the seed, such as layer, head and key.

    Returns
    -------
    Tensor
        float32 of the broadcast shape.
    """
    state = seed
    for counter in counters:
        state = _mix(state + _GOLDEN * (torch.as_tensor(counter, device=seed.device) + 1))
    return ((state >> 40) & 0xFFFFFF).float() / float(1 << 24)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
