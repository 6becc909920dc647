"""Tests of right and wrong answers, and of several stacks at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.special import bdtr

from mitigate.statistics.resampling import require_same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class McNemar:
    """Discordant pairs of two runs over the same yes/no outcomes, and the exact two-sided p-value.

    Parameters
    ----------
    only_first, only_second
        How many samples only the first, only the second run got right.
    p
        Exact two-sided p-value.
    odds_ratio
        ``only_second / only_first``: above 1, the second run repaired more than it broke. Where one of the two is 0,
        half a sample is added to both, so that the ratio is always a finite number, and 1 without discordant pairs.
    """

    only_first: int
    only_second: int
    p: float
    odds_ratio: float = math.nan


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> McNemar:
    """Compare right/wrong outcomes of two runs by sample id, exactly (two-sided binomial over discordant pairs).

    The test takes samples as independent, which several questions about one image are not: read it beside the
    clustered comparison, not instead of it.

    Raises
    ------
    DataError
        If a sample occurs in one run only.
    """
    require_same(list(first), second, "sample")
    only_first = sum(first[key] and not second[key] for key in first)
    only_second = sum(second[key] and not first[key] for key in first)
    add = 0.0 if only_first and only_second else 0.5
    ratio = (only_second + add) / (only_first + add)
    return McNemar(only_first, only_second, mcnemar_p(only_first, only_second), ratio)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test; 1 without discordant pairs."""
    # Twice the tail exceeds 1 when both sides are equal, because the middle term then counts twice.
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing several hypotheses at once (Holm's step-down), in the order given.

    An undefined (NaN) p-value stays undefined and does not count as a test.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[index] = running
    return adjusted
