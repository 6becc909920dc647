"""Names of plugins: built-in tables, entry points of installed packages, and classes registered at run time.

Nothing is imported until a plugin is asked for by name; a plugin that cannot be imported, or a name that two packages
claim, is listed as broken and stops only the runs that select it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mitigate.discovery import (
    BUILTIN_DISTRIBUTION,
    VARIABLE,
    Entry,
    config_packages,
    installed,
    left_out,
    load,
    suggestion,
)
from mitigate.errors import DuplicateName, PluginError, UnknownName

if TYPE_CHECKING:
    from mitigate.core.method import Method

T = TypeVar("T")

#: Distribution name shown for what no installed package brings.
RUNTIME_DISTRIBUTION = "registered at run time"

__all__ = [
    "BUILTIN_DISTRIBUTION",
    "RUNTIME_DISTRIBUTION",
    "Entry",
    "Registry",
    "adapters",
    "benchmarks",
    "config_packages",
    "diagnostics",
    "methods",
    "metrics",
    "register_method",
    "suggestion",
    "trackers",
]


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
        ``module:attribute`` of the class every plugin must extend; imported only when a plugin is.
    named
        Whether a class must carry its registered name as ``name``.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], base: str, *, named: bool = True) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._base = base
        self._named = named
        self._runtime: dict[str, type[T]] = {}
        self._installed: list[Entry] | None = None

    def claims(self) -> dict[str, list[Entry]]:
        """Return name -> who brings it, sorted by name; more than one is a clash. Imports no plugin."""
        found = {name: [Entry(name, value, BUILTIN_DISTRIBUTION)] for name, value in self._builtin.items()}
        if self._installed is None:  # what is installed stays for this process
            self._installed = installed(self.group)
        for entry in self._installed:
            found.setdefault(entry.name, []).append(entry)
        for name, plugin in self._runtime.items():
            found[name] = [Entry(name, _value(plugin), RUNTIME_DISTRIBUTION)]
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """Return all known names, sorted; imports no plugin."""
        return list(self.claims())

    def origin(self, name: str) -> Entry:
        """Return who brings a name, without importing it.

        Raises
        ------
        UnknownName
            If nobody brings it; the message lists the nearest.
        DuplicateName
            If two packages bring it.
        """
        claims = self.claims()
        if name not in claims:
            package = left_out(self.group, name)
            hint = f" ({package} brings it, but {VARIABLE} leaves that package out)" if package else ""
            raise UnknownName(f"unknown {self.kind} {name!r}{hint}{suggestion(name, claims)}")
        if len(claims[name]) > 1:
            both = " and ".join(entry.distribution for entry in claims[name])
            raise DuplicateName(
                f"{self.kind} {name!r} comes from both {both}; "
                f"uninstall one, rename its entry point, or set MITIGATE_PLUGINS to the packages you want"
            )
        return claims[name][0]

    def get(self, name: str) -> type[T]:
        """Import a plugin.

        Raises
        ------
        UnknownName, DuplicateName
            As `origin` does.
        PluginError
            If the plugin cannot be imported or is not what its kind demands.
        """
        entry = self.origin(name)
        if name in self._runtime:
            return self._runtime[name]
        plugin = load(entry, self.kind)
        self._check(name, plugin, entry.distribution)
        return cast("type[T]", plugin)

    def _check(self, name: str, plugin: Any, distribution: str) -> None:
        """Check what every plugin of the kind promises; what it computes is for the conformance checks."""
        module, _, attribute = self._base.partition(":")
        base = getattr(importlib.import_module(module), attribute)
        who = f"{self.kind} {name!r}{'' if distribution == RUNTIME_DISTRIBUTION else f' of {distribution}'}"
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            raise PluginError(f"{who} is not a subclass of {module}.{attribute}")
        known, wanted = getattr(base, "api", 1), getattr(plugin, "api", 1)
        if wanted > known:
            raise PluginError(
                f"{who} is written for version {wanted} of the {self.kind} interface, this mitigate has version "
                f"{known}; update mitigate, or install an older {distribution}"
            )
        if dataclasses.is_dataclass(base) and "__dataclass_fields__" not in vars(plugin):  # inherited ones do not count
            raise PluginError(f"{who} is no dataclass: decorate the class with @dataclass(frozen=True, kw_only=True)")
        declared = getattr(plugin, "name", None)
        if self._named and declared != name:
            raise PluginError(
                f"{who} calls itself {declared!r}; give the class `name = {name!r}` or register it under its own name"
            )
        for needed, annotation in inspect.get_annotations(base).items():
            if "ClassVar" in str(annotation) and not hasattr(plugin, needed):
                raise PluginError(f"{who} has no {needed!r}: give the class `{needed}: {annotation} = ...`")

    def entry(self, name: str) -> Entry:
        """Return where a known name comes from; imports the plugin to see whether it is broken."""
        claims = self.claims()[name]
        try:
            self.get(name)
        except PluginError as error:
            return dataclasses.replace(claims[0], broken=str(error))
        except DuplicateName as error:
            both = ", ".join(entry.distribution for entry in claims)
            return dataclasses.replace(claims[0], distribution=both, broken=str(error))
        return claims[0]

    def entries(self) -> list[Entry]:
        """Return every known name with where it comes from and whether it is broken; imports all plugins."""
        return [self.entry(name) for name in self.names()]

    def register(self, name: str, plugin: type[T]) -> type[T]:
        """Add a class for the life of this process; one that another class of its module had is replaced.

        So a notebook cell can be changed and run again.

        Raises
        ------
        DuplicateName
            If another plugin has the name.
        PluginError
            If the class is not what its kind demands, or the name cannot be written in a configuration.
        """
        if not name.isidentifier():
            raise PluginError(f"{name!r} cannot name a {self.kind}: use letters, digits and _ only")
        self._check(name, plugin, RUNTIME_DISTRIBUTION)
        other = next(iter(self.claims().get(name, [])), None)
        again = other is not None and (
            other.value == _value(plugin)
            or (name in self._runtime and self._runtime[name].__module__ == plugin.__module__)
        )
        if other is not None and not again:
            raise DuplicateName(
                f"{self.kind} {name!r} already comes from {other.distribution} ({other.value}); choose another name"
            )
        if other is None or other.distribution == RUNTIME_DISTRIBUTION:
            self._runtime[name] = plugin
        return plugin

    def unregister(self, name: str) -> None:
        """Forget a class registered at run time; unknown names are no error."""
        self._runtime.pop(name, None)


def _value(plugin: type) -> str:
    return f"{plugin.__module__}:{plugin.__qualname__}"


@cache
def _registry(kind: str, group: str, package: str, base: str, *, named: bool = True) -> Registry[Any]:
    builtin: Mapping[str, str] = importlib.import_module(package).BUILTIN
    return Registry(kind, group, builtin, base, named=named)


def methods() -> Registry[Method]:
    """Return the registry of mitigation methods."""
    return _registry("method", "mitigate.methods", "mitigate.methods", "mitigate.core.method:Method")


def benchmarks() -> Registry[Any]:
    """Return the registry of benchmarks."""
    return _registry("benchmark", "mitigate.benchmarks", "mitigate.benchmarks", "mitigate.benchmarks.base:Benchmark")


def metrics() -> Registry[Any]:
    """Return the registry of metrics."""
    return _registry("metric", "mitigate.metrics", "mitigate.metrics", "mitigate.metrics.base:Scorer")


def trackers() -> Registry[Any]:
    """Return the registry of trackers."""
    return _registry("tracker", "mitigate.trackers", "mitigate.trackers", "mitigate.trackers.base:Tracker")


def diagnostics() -> Registry[Any]:
    """Return the registry of diagnostics."""
    return _registry(
        "diagnostic", "mitigate.diagnostics", "mitigate.diagnostics", "mitigate.diagnostics.base:Diagnostic"
    )


def adapters() -> Registry[Any]:
    """Return the registry of model adapters, by transformers' ``model_type``; importing one imports torch."""
    return _registry(
        "model adapter", "mitigate.models", "mitigate.adapters", "mitigate.adapters.base:Adapter", named=False
    )


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method class for this process, for notebooks.

    Configurations, stacks and commands of this process know the name from then on. The class gets the name if it has
    none; running the cell again replaces the class.

    Raises
    ------
    PluginError
        If the name is none, or the class no method.
    DuplicateName
        If another method has the name.

    Examples
    --------
    >>> from mitigate import register_method
    >>> @register_method("mine")  # doctest: +SKIP
    ... @dataclass(frozen=True, kw_only=True)
    ... class Mine(Method): ...
    """
    if not isinstance(name, str):  # @register_method without its brackets, too
        raise PluginError(f"{name!r} cannot name a method: write @register_method('my_method') above @dataclass")

    def decorate(plugin: type[Method]) -> type[Method]:
        if isinstance(plugin, type) and not hasattr(plugin, "name"):
            plugin.name = name
        return methods().register(name, plugin)

    return decorate
