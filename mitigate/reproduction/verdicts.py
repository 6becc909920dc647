"""Published against measured: whether the interval holds the published value, and whether the claim is there.

A measured number comes with a 95 % interval, a published one with the digits it was printed with: it stands for
everything that rounds to it. What a paper claims is the difference to the row without its method, so that has a verdict
of its own, on its sign and on its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

ValueVerdict = Literal["agrees", "differs", "undefined"]
DifferenceVerdict = Literal[
    "confirmed", "weaker", "stronger", "inconclusive", "not found", "opposite", "no effect", "effect", "undefined"
]
Sign = Literal["same sign", "opposite sign", "no difference", "undefined"]

MEANING: Final[dict[str, str]] = {
    "agrees": "the published value lies inside the measured 95 % interval",
    "differs": "the published value lies outside the measured 95 % interval",
    "confirmed": "a difference of the published sign was measured, and its interval holds the published one",
    "weaker": "a difference of the published sign was measured, but a smaller one",
    "stronger": "a difference of the published sign was measured, but a larger one",
    "inconclusive": "the interval holds the published difference, and zero as well",
    "not found": "the interval holds zero, but not the published difference",
    "opposite": "a difference of the opposite sign was measured",
    "no effect": "no difference is published, and the interval holds zero",
    "effect": "no difference is published, but one was measured",
    "same sign": "the measured difference has the published sign; nothing follows",
    "opposite sign": "the measured difference has the other sign; nothing follows",
    "no difference": "one of the two differences is zero; nothing follows",
    "undefined": "there is no measured number",
}
"""Verdict -> what it says, in one sentence."""


@dataclass(frozen=True)
class Measured:
    """A measured number with its 95 % interval, in the published unit; NaN where undefined."""

    value: float
    low: float
    high: float

    @property
    def defined(self) -> bool:
        """Whether there is a value with an interval."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def holds(self, published: float, slack: float) -> bool:
        """Tell whether the interval holds a number that is known up to ``slack``."""
        # 38.4 - 48.0 is not -9.6 in binary: a hair of tolerance beside the digits that were not printed
        reach = slack + 1e-9 * max(1.0, abs(published))
        return self.low - reach <= published <= self.high + reach


def value_verdict(published: float, measured: Measured, slack: float) -> ValueVerdict:
    """Hold a published value against the measured interval.

    Parameters
    ----------
    published
        As printed.
    measured
        In the same unit.
    slack
        Half a unit of the last printed digit.
    """
    if not measured.defined:
        return "undefined"
    return "agrees" if measured.holds(published, slack) else "differs"


def difference_verdict(published: float, measured: Measured, slack: float) -> DifferenceVerdict:
    """Hold a published difference to the row without the method against the measured, paired one.

    Parameters
    ----------
    published
        Difference of two printed values.
    measured
        Paired difference, in the same unit.
    slack
        A unit of the last printed digit: both values were rounded.
    """
    if not measured.defined:
        return "undefined"
    shown = measured.low > 0 or measured.high < 0
    if abs(published) <= 1e-9:
        return "effect" if shown else "no effect"
    inside = measured.holds(published, slack)
    if not shown:
        return "inconclusive" if inside else "not found"
    if (published > 0) != (measured.low > 0):
        return "opposite"
    if inside:
        return "confirmed"
    return "weaker" if abs(measured.value) < abs(published) else "stronger"


def sign_only(published: float, measured: Measured) -> Sign:
    """Compare the signs of two differences that are not of the same thing, such as those of two models."""
    if not math.isfinite(measured.value):
        return "undefined"
    if abs(published) <= 1e-9 or measured.value == 0:
        return "no difference"
    return "same sign" if (published > 0) == (measured.value > 0) else "opposite sign"
