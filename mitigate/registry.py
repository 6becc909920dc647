"""Names of plugins: built-in tables, entry points of installed packages, and classes registered at run time.

Nothing is imported until a plugin is asked for by name; a plugin that cannot be imported is listed as broken and stops
only the runs that select it.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mitigate.errors import DuplicateName, PluginError, UnknownName

if TYPE_CHECKING:
    from mitigate.core.method import Method

T = TypeVar("T")

#: Distribution name shown for what is not installed as a package.
BUILTIN_DISTRIBUTION = "mitigate"
RUNTIME_DISTRIBUTION = "registered at run time"


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


class Registry(Generic[T]):
    """The plugins of one kind, by name.

    Parameters
    ----------
    kind
        What a plugin is, for messages (``"method"``).
    group
        Entry-point group through which other packages add names (``"mitigate.methods"``).
    builtin
        Built-in name -> ``module:attribute``.
    base
        ``module:attribute`` of the class every plugin must extend; ``None`` leaves plugins unchecked.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], base: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._base = base
        self._runtime: dict[str, type[T]] = {}
        self._installed: list[Any] | None = None

    def _table(self) -> dict[str, Entry]:
        """Return name -> entry, unloaded. Raises `DuplicateName` if two packages claim one name."""
        table = {name: Entry(name, value, BUILTIN_DISTRIBUTION) for name, value in self._builtin.items()}
        if self._installed is None:  # reading all packages' metadata is slow; what is installed stays for this process
            self._installed = _entry_points(self.group)
        for point in self._installed:
            found = Entry(point.name, point.value, point.dist.name if point.dist else "unknown package")
            other = table.get(point.name)
            if other is not None and other != found:
                raise DuplicateName(
                    f"{self.kind} {point.name!r} comes from both {other.distribution} and {found.distribution}; "
                    f"uninstall one, rename its entry point, or set MITIGATE_PLUGINS to the packages you want"
                )
            table[point.name] = found
        for name, plugin in self._runtime.items():
            table[name] = Entry(name, f"{plugin.__module__}:{plugin.__qualname__}", RUNTIME_DISTRIBUTION)
        return table

    def names(self) -> list[str]:
        """Return all known names, sorted; imports no plugin."""
        return sorted(self._table())

    def get(self, name: str) -> type[T]:
        """Import a plugin.

        Raises
        ------
        UnknownName
            If no package registers the name; lists the nearest.
        PluginError
            If the plugin cannot be imported or is not what its kind demands.
        """
        table = self._table()
        if name not in table:
            raise UnknownName(f"unknown {self.kind} {name!r}{suggestion(name, table)}")
        if name in self._runtime:
            return self._runtime[name]
        entry = table[name]
        module, _, attribute = entry.value.partition(":")
        try:
            plugin = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else "no message"
            raise PluginError(
                f"{self.kind} {name!r} of {entry.distribution} cannot be imported: {type(error).__name__}: {reason}\n"
                f"look at `python -c 'import {module}'`, or update or uninstall {entry.distribution}"
            ) from error
        self._check(name, plugin, entry.distribution)
        return cast("type[T]", plugin)

    def _check(self, name: str, plugin: Any, distribution: str) -> None:
        if self._base is None:
            return
        module, _, attribute = self._base.partition(":")
        base = getattr(importlib.import_module(module), attribute)
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            raise PluginError(f"{self.kind} {name!r} of {distribution} is not a subclass of {module}.{attribute}")
        declared = getattr(plugin, "name", None)
        if declared != name:
            raise PluginError(
                f"{self.kind} {name!r} of {distribution} calls itself {declared!r}; "
                f"give the class `name = {name!r}` or register it under its own name"
            )

    def entries(self) -> list[Entry]:
        """Return every known name with where it comes from; imports each plugin to see whether it is broken."""
        checked = []
        for name, entry in sorted(self._table().items()):
            try:
                self.get(name)
            except PluginError as error:
                checked.append(Entry(name, entry.value, entry.distribution, str(error)))
            else:
                checked.append(entry)
        return checked

    def register(self, name: str, plugin: type[T]) -> type[T]:
        """Add a class for the life of this process.

        Registering a class of the same module and name again replaces it, as a re-run notebook cell does.

        Raises
        ------
        DuplicateName
            If another plugin has the name.
        PluginError
            If the class is not what its kind demands.
        """
        self._check(name, plugin, RUNTIME_DISTRIBUTION)
        other = self._table().get(name)
        value = f"{plugin.__module__}:{plugin.__qualname__}"
        if other is not None and other.value != value:
            raise DuplicateName(
                f"{self.kind} {name!r} already comes from {other.distribution} ({other.value}); choose another name"
            )
        if other is None or other.distribution == RUNTIME_DISTRIBUTION:
            self._runtime[name] = plugin
        return plugin

    def unregister(self, name: str) -> None:
        """Forget a class registered at run time; unknown names are no error."""
        self._runtime.pop(name, None)


def _entry_points(group: str) -> list[Any]:
    """Return the entry points of a group, limited by ``MITIGATE_PLUGINS`` (``none`` or package names, by commas)."""
    wanted = os.environ.get("MITIGATE_PLUGINS")
    points = list(entry_points(group=group))
    if wanted is None:
        return points
    allowed = {part.strip() for part in wanted.split(",")} - {"", "none"}
    return [point for point in points if point.dist is not None and point.dist.name in allowed]


@cache
def _registry(kind: str, group: str, package: str, base: str | None) -> Registry[Any]:
    builtin: Mapping[str, str] = importlib.import_module(package).BUILTIN
    return Registry(kind, group, builtin, base)


def methods() -> Registry[Method]:
    """Return the registry of mitigation methods."""
    return _registry("method", "mitigate.methods", "mitigate.methods", "mitigate.core.method:Method")


def benchmarks() -> Registry[Any]:
    """Return the registry of benchmarks."""
    return _registry("benchmark", "mitigate.benchmarks", "mitigate.benchmarks", "mitigate.benchmarks.base:Benchmark")


def trackers() -> Registry[Any]:
    """Return the registry of trackers."""
    return _registry("tracker", "mitigate.trackers", "mitigate.trackers", "mitigate.trackers.base:Tracker")


def adapters() -> Registry[Any]:
    """Return the registry of model adapters, by transformers' ``model_type``."""
    return _registry("model adapter", "mitigate.models", "mitigate.adapters", None)


def config_packages() -> dict[str, str]:
    """Return distribution name -> importable package of configuration files that installed packages add."""
    return {(point.dist.name if point.dist else point.name): point.value for point in _entry_points("mitigate.configs")}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method class for this process, for notebooks: ``@register_method("mine")``."""

    def decorate(plugin: type[Method]) -> type[Method]:
        return methods().register(name, plugin)

    return decorate
