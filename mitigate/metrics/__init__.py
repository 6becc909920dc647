"""Metrics: pure functions over a text and its ground truth, summed per image and divided last."""

from __future__ import annotations

from mitigate.metrics.base import ImageCounts, Interval, Metric, Scorer

BUILTIN: dict[str, str] = {
    "amber": "mitigate.metrics.amber:Amber",
    "chair": "mitigate.metrics.chair:Chair",
    "cider": "mitigate.metrics.cider:Cider",
    "hallusionbench": "mitigate.metrics.hallusionbench:HallusionBench",
    "mme": "mitigate.metrics.mme:Mme",
    "mmhal": "mitigate.metrics.mmhal:Mmhal",
    "pope": "mitigate.metrics.pope:Pope",
}
"""Registered name -> ``module:class`` of the metrics that come with the project."""

__all__ = ["BUILTIN", "ImageCounts", "Interval", "Metric", "Scorer"]
