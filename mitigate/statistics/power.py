"""What a comparison of this size can find, and what size would find more."""

from __future__ import annotations

import math
from statistics import NormalDist


def minimum_detectable_effect(se: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest true difference found with the wanted power; NaN if ``se`` is.

    Parameters
    ----------
    se
        Standard error of the difference.
    alpha
        Two-sided level of the test. For Holm over k stacks, the hardest of them is tested at ``alpha / k``.
    power
        Chance of finding it.

    Raises
    ------
    ValueError
        If ``alpha`` or ``power`` is not between 0 and 1.
    """
    return _deviations(alpha, power) * se


def required_images(effect: float, se: float, images: int, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many images find a true difference of ``effect``, judged by a comparison that was made.

    Parameters
    ----------
    effect
        The difference to find, in the metric's own unit.
    se, images
        Standard error and number of images of the comparison made; the error shrinks with the root of the images.
    alpha, power
        As for `minimum_detectable_effect`.

    Raises
    ------
    ValueError
        If ``effect`` is 0, ``se`` negative or undefined, or ``alpha`` or ``power`` not between 0 and 1.
    """
    if not effect or not math.isfinite(effect) or not (math.isfinite(se) and se >= 0):
        raise ValueError(
            f"required_images needs an effect other than 0 and a standard error, but got {effect} and {se}"
        )
    # rounded first: 400.00000000000006 images are 400
    return max(1, math.ceil(round(images * (_deviations(alpha, power) * se / effect) ** 2, 6)))


def _deviations(alpha: float, power: float) -> float:
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"alpha and power lie between 0 and 1, but got alpha={alpha}, power={power}")
    normal = NormalDist()
    return normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
