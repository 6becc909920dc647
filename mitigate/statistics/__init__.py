"""How sure a number is: paired bootstrap over images, swap test, exact McNemar, Holm, power.

Samples of one image are not independent, so images are resampled, not samples; a comparison resamples the same images
for the baseline and for every stack. All draws come from one seed and do not depend on the order of the records.
"""

from mitigate.statistics.comparing import (
    FEW_CHANGES,
    FEW_IMAGES,
    Difference,
    bootstrap,
    compare_all,
    intervals,
    paired_differences,
)
from mitigate.statistics.outcomes import McNemar, holm, mcnemar, mcnemar_p
from mitigate.statistics.pooling import pool, seed_spread
from mitigate.statistics.power import minimum_detectable_effect, required_images
from mitigate.statistics.resampling import RESAMPLES

__all__ = [
    "FEW_CHANGES",
    "FEW_IMAGES",
    "RESAMPLES",
    "Difference",
    "McNemar",
    "bootstrap",
    "compare_all",
    "holm",
    "intervals",
    "mcnemar",
    "mcnemar_p",
    "minimum_detectable_effect",
    "paired_differences",
    "pool",
    "required_images",
    "seed_spread",
]
