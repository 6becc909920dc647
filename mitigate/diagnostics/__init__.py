"""Diagnostics: what goes on inside a model while it generates, held against a benchmark's ground truth."""

from __future__ import annotations

from mitigate.registry import diagnostics

BUILTIN: dict[str, str] = {
    "saliency": "mitigate.diagnostics.saliency:Saliency",
    "entropy": "mitigate.diagnostics.entropy:Entropy",
    "drift": "mitigate.diagnostics.drift:Drift",
    "credit": "mitigate.diagnostics.credit:Credit",
}
"""Registered name -> ``module:class`` of the diagnostics that come with the project."""

__all__ = ["BUILTIN", "diagnostics"]
