"""Whether a folder on disk belongs to the diagnostic run that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.diagnostics import records
from mitigate.errors import DataError
from mitigate.jsonfiles import read_object
from mitigate.runner.fingerprint import code_hash
from mitigate.runner.identity import another_run, identity
from mitigate.runner.provenance import CODE, versions

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun
    from mitigate.diagnostics.base import Diagnostic


def versions_of(resolved: ResolvedRun, diagnostic: Diagnostic) -> dict[str, str]:
    """Return the versions of the software, of the plugins, and of the diagnostic with a short hash of its code."""
    name = f"diagnostic {diagnostic.name}"
    own = {name: str(diagnostic.version), f"{CODE}{name}": code_hash(type(diagnostic))}
    return versions(resolved) | own


def check_same(resolved: ResolvedRun, diagnostic: Diagnostic, folder: Path) -> None:
    """Refuse to add to a folder that holds another run.

    Raises
    ------
    ConfigError
        Naming what differs.
    DataError
        If the folder has records, but nothing readable says of what.
    """
    config, summary = folder / "config.json", folder / "summary.json"
    if not config.exists() or not summary.exists():
        if (folder / records.FILE).exists():
            gone = config.name if not config.exists() else summary.name
            raise DataError(f"{folder} has records but no {gone}; delete {folder} to run it again")
        return
    asked = read_object(config).get("config")
    made = read_object(summary).get("versions")
    if not isinstance(asked, dict) or not isinstance(made, dict):
        raise DataError(f"{folder} holds no diagnostic run; delete it, or give this run its own name (name=...)")
    before, now = identity(asked), identity(resolved.config)
    kinds = ("benchmark ", "method ", "diagnostic ", CODE)
    before |= {key: value for key, value in made.items() if key.startswith(kinds)}
    now |= {key: value for key, value in versions_of(resolved, diagnostic).items() if key.startswith(kinds)}
    missing = object()
    keys = sorted(key for key in {*before, *now} if before.get(key, missing) != now.get(key, missing))
    if keys:
        raise another_run(folder, [_told(before, now, key) for key in keys])


def _told(before: dict[str, Any], now: dict[str, Any], key: str) -> str:
    if key.startswith(CODE):
        return f"{key.removeprefix(CODE)}: its code has changed"
    was, is_now = (json.dumps(flat[key]) if key in flat else "absent" for flat in (before, now))
    return f"{key} was {was}, now {is_now}"
