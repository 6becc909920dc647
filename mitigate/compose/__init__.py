"""From Hydra overrides to a checked, fully resolved run. Nothing else in the project imports Hydra."""

from __future__ import annotations

from mitigate.compose.resolved import ResolvedRun, comparison_digest, comparison_name
from mitigate.compose.run import compose_comparison, compose_comparison_sweep, compose_run, compose_sweep, sweep_jobs

__all__ = [
    "ResolvedRun",
    "comparison_digest",
    "comparison_name",
    "compose_comparison",
    "compose_comparison_sweep",
    "compose_run",
    "compose_sweep",
    "sweep_jobs",
]
