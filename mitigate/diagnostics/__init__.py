"""Diagnostics: what goes on inside a model while it generates, held against a benchmark's ground truth."""

from __future__ import annotations

from functools import cache
from typing import Any

from mitigate.registry import Registry

BUILTIN: dict[str, str] = {
    "saliency": "mitigate.diagnostics.saliency:Saliency",
    "entropy": "mitigate.diagnostics.entropy:Entropy",
    "drift": "mitigate.diagnostics.drift:Drift",
    "credit": "mitigate.diagnostics.credit:Credit",
}
"""Registered name -> ``module:class`` of the diagnostics that come with the project."""


@cache
def diagnostics() -> Registry[Any]:
    """Return the registry of diagnostics; packages add theirs through the entry-point group of the same name."""
    return Registry("diagnostic", "mitigate.diagnostics", BUILTIN, "mitigate.diagnostics.base:Diagnostic")
