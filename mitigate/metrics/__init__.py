"""Metrics: pure functions over a text and its ground truth, summed per image and divided last."""

from __future__ import annotations

from mitigate.metrics.base import ImageCounts, Interval, Metric, Scorer

BUILTIN: dict[str, str] = {
    "chair": "mitigate.metrics.chair:Chair",
    "hallusionbench": "mitigate.metrics.hallusionbench:HallusionBench",
    "mme": "mitigate.metrics.mme:Mme",
    "pope": "mitigate.metrics.pope:Pope",
}
"""Registered name -> ``module:class`` of the metrics that come with the project."""

__all__ = ["BUILTIN", "ImageCounts", "Interval", "Metric", "Scorer"]
