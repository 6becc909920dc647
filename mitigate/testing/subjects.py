"""What the checks try: the instances of a method, the geometries of models, and a name in the registry for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any, TypeVar

from mitigate.core.facts import ModelFacts
from mitigate.core.method import Method
from mitigate.errors import MitigateError, PluginError
from mitigate.registry import adapters, methods

T = TypeVar("T")

#: Decoders to plan for, with the depth and heads of common checkpoints and of a tiny model.
_DECODERS = ((32, 32, 32), (28, 28, 4), (4, 4, 2))


def geometries() -> list[ModelFacts]:
    """Return the geometry of models of every known family, with and without an image grid."""
    return [
        ModelFacts(family=family, layers=layers, heads=heads, kv_heads=kv_heads, spatial_grid=grid)
        for family, (layers, heads, kv_heads), grid in product(adapters().names(), _DECODERS, (True, False))
    ]


def quietly(ask: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a method without the warnings it may give about a model it expects little of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ask(*arguments)


def instances(plugin: type[Method]) -> list[Method]:
    """Return the method with its defaults and with every set of its ``test_params``.

    What cannot be built is left out: the check of the test parameters says why.

    Raises
    ------
    PluginError
        If nothing can be built.
    """
    found: dict[str, Method] = {}
    problem = "it has no test_params()"
    for values in [{}, *_test_params(plugin)]:
        try:
            method = plugin(**values)
        except Exception as error:  # whatever its author did
            problem = f"{type(error).__name__}: {error}"
        else:
            found.setdefault(repr(method), method)
    if not found:
        raise PluginError(f"{plugin.__module__}:{plugin.__qualname__} cannot be built: {problem}")
    return list(found.values())


def _test_params(plugin: type[Method]) -> list[dict[str, Any]]:
    with suppress(Exception):
        return [dict(values) for values in plugin.test_params()]
    return []


def variants(plugin: type[Method]) -> list[Method]:
    """Return the instances and every preset that can be built."""
    found = instances(plugin)
    for preset in plugin.presets:
        with suppress(Exception):
            found.append(plugin.preset(preset))
    return found


def params_text(method: Method) -> str:
    """Write the parameters that differ from the defaults: ``beta=0.5, window=3``; empty for the defaults."""
    from mitigate.compose.schemas import defaults_of, plain

    with suppress(MitigateError, TypeError, AttributeError):  # a class that is not a proper dataclass has none
        defaults = defaults_of(type(method))
        changed = {key: value for key, value in method.params().items() if defaults.get(key) != plain(value)}
        return ", ".join(f"{key}={value}" for key, value in changed.items())
    return ""


@contextmanager
def registered(plugin: type[Method]) -> Iterator[None]:
    """Give a class that no package registers its name for a while; a name that is taken stays as it is."""
    name = getattr(plugin, "name", None)
    mine = isinstance(name, str) and name not in methods().names()
    try:
        if mine:
            with suppress(MitigateError):
                methods().register(str(name), plugin)
        yield
    finally:
        if mine:
            methods().unregister(str(name))
