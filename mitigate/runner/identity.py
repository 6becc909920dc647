"""Whether a folder on disk belongs to the run that is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.compose.resolved import PLACES, PLACING
from mitigate.errors import ConfigError, DataError
from mitigate.jsonfiles import read_object, to_json
from mitigate.runner.fingerprint import weights_before_loading
from mitigate.runner.folder import refuse_orphans
from mitigate.runner.provenance import CODE, plugin_versions

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun

#: Settings that say where results go and how fast they come, not what they are.
_VOLATILE = ("name", "on_error", "runs_dir", "stack", "stacks", "tracker")
_VOLATILE_TRAINER = ("devices", "num_nodes", "num_workers", "strategy")
_SHOWN_DIFFERENCES = 4
#: How the keys begin under which a record keeps the versions of plugins.
_PLUGINS = ("benchmark ", "method ", "metric ", CODE)


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a run's numbers, flat: dotted key -> value; the methods' order is one of them."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    if isinstance(kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in _VOLATILE_TRAINER}
    methods = list(config.get("methods") or {})
    if isinstance(kept.get("model"), Mapping):
        kept["model"] = {key: value for key, value in kept["model"].items() if key not in PLACING}
    if isinstance(kept.get("benchmark"), Mapping):
        kept["benchmark"] = {key: value for key, value in kept["benchmark"].items() if key not in PLACES}
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
        If the folder's configuration or record cannot be read, or is missing beside answers.
    """
    refuse_orphans(run_dir)
    if not (run_dir / "config.json").exists():
        return
    before, now = identity(_asked(run_dir)), identity(resolved.config)
    recorded: dict[str, Any] = {}
    if (run_dir / "record.json").exists():
        recorded = read_object(run_dir / "record.json")
        versions = recorded.get("versions")
        if not isinstance(versions, dict):
            raise DataError(f"{run_dir / 'record.json'} is no run record; delete {run_dir} to run it again")
        before |= {key: value for key, value in versions.items() if key.startswith(_PLUGINS)}
        now |= plugin_versions(resolved)
    missing = object()
    keys = sorted(key for key in {*before, *now} if before.get(key, missing) != now.get(key, missing))
    told = [_told(before, now, key) for key in keys]
    known = str(recorded.get("weights", ""))
    # Hashing a large checkpoint takes a while: only where it can still decide.
    if not told and known and other_weights(known, weights_before_loading(resolved.config["model"])):
        told.append(_weights_changed(resolved))
    if told:
        raise another_run(run_dir, told)


def check_loaded_weights(resolved: ResolvedRun, before: str, now: str, run_dir: Path) -> None:
    """Refuse to go on with a run when loading shows that its model is another one by now.

    Raises
    ------
    ConfigError
        If both are known and differ.
    """
    if other_weights(before, now):
        raise another_run(run_dir, [_weights_changed(resolved)])


def other_weights(before: str, now: str) -> bool:
    """Say whether two checkpoints differ for sure: both are known, by the same means, and are not equal."""
    return bool(before and now) and before.split(":")[0] == now.split(":")[0] and before != now


def another_run(run_dir: Path, told: list[str]) -> ConfigError:
    """Return the refusal of a folder, with what differs and the remedy."""
    more = f" and {len(told) - _SHOWN_DIFFERENCES} more" if len(told) > _SHOWN_DIFFERENCES else ""
    return ConfigError(
        f"{run_dir} holds another run: {'; '.join(told[:_SHOWN_DIFFERENCES])}{more}\n"
        f"give this one its own name (name=...) or delete {run_dir}"
    )


def _asked(run_dir: Path) -> Mapping[str, Any]:
    path = run_dir / "config.json"
    config = read_object(path).get("config")
    if not isinstance(config, dict):
        raise DataError(f"{path} holds no configuration of a run; delete {run_dir} to run it again")
    return config


def _weights_changed(resolved: ResolvedRun) -> str:
    return f"model {resolved.config['model']['name']}: its weights or its processor's files have changed"


def _told(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    if key.startswith(CODE):
        return f"{key.removeprefix(CODE)}: its code has changed"
    return f"{key} was {_show(before, key)}, now {_show(now, key)}"


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def changes_since(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return ``package old -> new`` for software that changed since a record was made."""
    return [f"{key} {before[key]} -> {now[key]}" for key in sorted(before) if key in now and before[key] != now[key]]
