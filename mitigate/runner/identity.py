"""Whether a folder on disk belongs to the run that is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.errors import ConfigError
from mitigate.records import read_json, to_json
from mitigate.runner.provenance import plugin_versions

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun

#: Settings that say where results go and how fast they come, not what they are.
_VOLATILE = ("name", "runs_dir", "stack", "stacks", "tracker")
_VOLATILE_TRAINER = ("devices", "num_nodes", "num_workers", "strategy")
_SHOWN_DIFFERENCES = 4


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a run's numbers, flat: dotted key -> value; the methods' order is one of them."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    if isinstance(kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in _VOLATILE_TRAINER}
    methods = list(config.get("methods") or {})
    return {**_flatten(to_json(kept)), "methods": methods}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def check_same_run(resolved: ResolvedRun, run_dir: Path) -> None:
    """Refuse to add to a folder that holds another run.

    Raises
    ------
    ConfigError
        Naming the settings that differ.
    DataError
        If the folder's configuration cannot be read.
    """
    if not (run_dir / "config.json").exists():
        return
    before, now = identity(read_json(run_dir / "config.json")["config"]), identity(resolved.config)
    if (run_dir / "record.json").exists():
        recorded = read_json(run_dir / "record.json").get("versions", {})
        before |= {key: value for key, value in recorded.items() if key.startswith(("benchmark ", "method "))}
        now |= plugin_versions(resolved)
    missing = object()
    keys = sorted(key for key in {*before, *now} if before.get(key, missing) != now.get(key, missing))
    if not keys:
        return
    shown = [f"{key} was {_show(before, key)}, now {_show(now, key)}" for key in keys[:_SHOWN_DIFFERENCES]]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    raise ConfigError(
        f"{run_dir} holds another run: {'; '.join(shown)}{more}\n"
        f"give this one its own name (name=...) or delete {run_dir}"
    )


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def changes_since(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return ``package old -> new`` for software that changed since a record was made."""
    return [f"{key} {before[key]} -> {now[key]}" for key in sorted(before) if key in now and before[key] != now[key]]
