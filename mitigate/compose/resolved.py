"""A run, fully decided: every value, where it came from, and the built methods and benchmark."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.core.facts import ModelFacts
    from mitigate.core.method import Method

#: Parameters of benchmarks that say where something is and how to reach it.
PLACES = ("data_dir", "judge_key_env", "judge_retries", "judge_url")
#: Where the parts of a model lie does not change what it computes.
PLACING = ("device_map", "max_memory", "offload_folder")
#: Where a run is written and shown does not change what it computes.
_NOT_IDENTITY = ("name", "on_error", "runs_dir", "stack", "stacks", "tracker")


@dataclass(frozen=True)
class ResolvedRun:
    """One stack on one benchmark, ready to run.

    Parameters
    ----------
    config
        The complete configuration as plain JSON values; ``config["methods"]`` is ordered and holds every final value.
    methods
        Key -> built method, in stack order.
    benchmark
        The built benchmark.
    facts
        The model's geometry, or ``None`` if it is known only when the checkpoint is loaded.
    provenance
        Dotted key -> where the final value came from: ``"default"``, ``"preset NAME"``, ``"model NAME"``,
        ``"stack NAME"``, ``"experiment NAME"`` or ``"command line"``.
    stack_name
        The preset's name if the methods are the preset's, else their keys joined by ``+`` (``"none"`` without any).
    """

    config: Mapping[str, Any]
    methods: Mapping[str, Method]
    benchmark: Benchmark
    facts: ModelFacts | None
    provenance: Mapping[str, str]
    stack_name: str

    @property
    def digest(self) -> str:
        """Eight hex digits of a hash over everything that decides the result, the order of the methods included."""
        identity = {key: value for key, value in self.config.items() if key not in _NOT_IDENTITY}
        identity["benchmark"] = {key: value for key, value in identity["benchmark"].items() if key not in PLACES}
        identity["model"] = {key: value for key, value in identity["model"].items() if key not in PLACING}
        identity["methods"] = list(self.config["methods"].items())
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """Readable folder name of the run, the same for the same configuration."""
        return self.config["name"] or _slug(self._benchmark, self._model, self.stack_name, self.digest)

    @property
    def _benchmark(self) -> str:
        return str(self.config["benchmark"]["name"])

    @property
    def _model(self) -> str:
        model = self.config["model"]
        return str(model["path"]).rstrip("/").split("/")[-1] if model["name"] == "hf" else str(model["name"])


def comparison_name(runs: list[ResolvedRun]) -> str:
    """Return the readable folder name of a comparison, the same for the same stacks and configuration."""
    first = runs[0]
    stacks = f"{len(runs)}-stacks"
    return first.config["name"] or _slug(first._benchmark, first._model, stacks, comparison_digest(runs))


def comparison_digest(runs: list[ResolvedRun]) -> str:
    """Return eight hex digits of a hash over everything that decides the results of a comparison's stacks."""
    return hashlib.sha256(" ".join(f"{run.stack_name}={run.digest}" for run in runs).encode()).hexdigest()[:8]


def _slug(*parts: str) -> str:
    return "-".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts)
