"""Metrics: pure functions over a text and its ground truth, summed per image and divided last."""

from __future__ import annotations

from mitigate.metrics.base import ImageCounts, Interval, Metric

__all__ = ["ImageCounts", "Interval", "Metric"]
