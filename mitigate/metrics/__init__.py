"""Metrics: pure functions over a text and its ground truth, summed per image and divided last."""

from __future__ import annotations

from mitigate.metrics.base import ImageCounts, Interval, Metric

BUILTIN: dict[str, str] = {}
"""Registered name -> ``module:object``; the project's own metrics belong to benchmarks and need no registration."""

__all__ = ["BUILTIN", "ImageCounts", "Interval", "Metric"]
