"""What installed packages bring: their entry points, limited by the environment variable ``MITIGATE_PLUGINS``.

Nothing here imports a plugin, except that a package of configuration files is imported to see that it is there.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

from mitigate.errors import ConfigError, PluginError

#: Distribution name of what comes with the project.
BUILTIN_DISTRIBUTION: Final = "mitigate"
#: Names the packages whose plugins count, by commas; ``none`` (or nothing): those of no other package.
VARIABLE: Final = "MITIGATE_PLUGINS"
CONFIGS: Final = "mitigate.configs"
#: All entry-point groups of the project.
ENTRY_POINT_GROUPS: Final = (
    "mitigate.methods",
    "mitigate.models",
    "mitigate.benchmarks",
    "mitigate.metrics",
    "mitigate.trackers",
    "mitigate.diagnostics",
    CONFIGS,
)


@dataclass(frozen=True)
class Entry:
    """One known name.

    Parameters
    ----------
    name
        Registered name, as written in configurations.
    value
        ``module:attribute`` of the plugin.
    distribution
        Installed package that brings it.
    broken
        Why it cannot be used, or ``None``.
    """

    name: str
    value: str
    distribution: str
    broken: str | None = None


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` or, if nothing is near, the list of known names.

    Parameters
    ----------
    wrong
        What the user wrote.
    known
        Names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}? (known: {', '.join(names)})"
    return f"; known: {', '.join(names) if names else 'none'}"


def normalised(distribution: str) -> str:
    """Return a distribution's name as package indexes compare it: ``Mitigate_Foo`` is ``mitigate-foo``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed(group: str) -> list[Entry]:
    """Return the entry points of a group that `VARIABLE` lets through.

    A package that is found twice (an editable install beside a wheel, a build folder on the path) counts once: what
    comes first on Python's path is what Python imports.

    Raises
    ------
    ConfigError
        If the variable names a package that is not installed or brings nothing.
    """
    allowed = _allowed()
    return [entry for entry in _all(group) if allowed is None or normalised(entry.distribution) in allowed]


def left_out(group: str, name: str) -> str | None:
    """Return the package that brings a name but is left out by `VARIABLE`, if there is one."""
    allowed = _allowed()
    found = [entry.distribution for entry in _all(group) if entry.name == name]
    return next((package for package in found if allowed is not None and normalised(package) not in allowed), None)


def _all(group: str) -> list[Entry]:
    seen: dict[tuple[str, str], Entry] = {}
    for point in entry_points(group=group):
        distribution = str((point.dist and point.dist.name) or "unknown package")
        entry = Entry(point.name, point.value, distribution)
        seen.setdefault((normalised(distribution), point.name), entry)
    return list(seen.values())


def _allowed() -> frozenset[str] | None:
    """Return the normalised names `VARIABLE` lists; ``None`` if it is not set."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names in ([], ["none"]):
        return frozenset()
    known = {normalised(BUILTIN_DISTRIBUTION): BUILTIN_DISTRIBUTION}
    for group in ENTRY_POINT_GROUPS:
        known |= {normalised(entry.distribution): entry.distribution for entry in _all(group)}
    for name in names:
        if name == "none":
            raise ConfigError(f"{VARIABLE}={text}: none stands alone; leave it out, or name no package")
        if normalised(name) not in known:
            raise ConfigError(
                f"{VARIABLE} names {name!r}, but no installed package of that name brings plugins"
                f"{suggestion(normalised(name), known.values())}"
            )
    return frozenset(normalised(name) for name in names)


def load(entry: Entry, kind: str) -> Any:
    """Import what an entry stands for.

    What a module prints while it is imported goes to stderr: stdout belongs to the command (``--json``).

    Raises
    ------
    PluginError
        Whatever goes wrong, ``SystemExit`` included: a plugin must not end the process that looks for it.
    """
    module = entry.value.partition(":")[0].strip()
    try:
        with redirect_stdout(sys.stderr):
            return EntryPoint(entry.name, entry.value, "").load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{kind} {entry.name!r} of {entry.distribution} cannot be imported: {_told(error)}\n"
            f"look at `python -c 'import {module}'`, or update or uninstall {entry.distribution}"
        ) from error


def unreadable(entry: Entry) -> str | None:
    """Return why the module of an entry cannot be imported for sure, found without running it; else ``None``.

    For plugins that are slow to import: a missing module and wrong syntax are seen, errors while it runs are not.
    """
    module = entry.value.partition(":")[0].strip()
    try:
        with redirect_stdout(sys.stderr):
            spec = importlib.util.find_spec(module)
        if spec is None:
            return f"No module named {module!r}"
        if spec.origin is not None and spec.origin.endswith(".py"):
            ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (Exception, SystemExit) as error:
        return _told(error)
    return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


@cache
def config_packages() -> tuple[Entry, ...]:
    """Return the packages of configuration files that other packages bring, and which of them cannot be imported.

    Their entry points' names mean nothing, so two packages may use the same.
    """
    found = []
    for entry in installed(CONFIGS):
        try:
            module = load(entry, "the package of configuration files")
            broken = None if hasattr(module, "__path__") else f"{entry.value} is a module, not a package"
        except PluginError as error:
            broken = str(error)
        found.append(replace(entry, broken=broken))
    return tuple(found)
