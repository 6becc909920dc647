"""A plugin's parameters on a command line: ``parser=strict``, ``benchmark.parser=strict``, ``--parser strict``."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mitigate.compose.schemas import annotations_of, check_value, native
from mitigate.errors import ConfigError
from mitigate.registry import suggestion

_BOOLEANS = ("true", "false")


class Parameters:
    """Collects the values a user gives, and builds the plugin with them.

    Parameters
    ----------
    plugin
        The plugin's class.
    owner
        What to call it in messages, such as ``benchmark pope``.
    """

    def __init__(self, plugin: type, owner: str) -> None:
        self._plugin = plugin
        self._owner = owner
        self._annotations = annotations_of(plugin)
        self._values: dict[str, Any] = {}

    def __contains__(self, flag: str) -> bool:
        """Tell whether ``--flag`` is one of the plugin's parameters."""
        return _key(flag) in self._annotations

    def flags(self) -> list[str]:
        """Return the parameters as flags."""
        return [f"--{name.replace('_', '-')}" for name in self._annotations]

    def is_switch(self, flag: str) -> bool:
        """Tell whether a flag needs no value: it is true or false."""
        return self._annotations[_key(flag)] is bool

    def set(self, key: str, raw: str, text: str) -> None:
        """Take a value.

        Parameters
        ----------
        key
            Name of the parameter, as a flag or as a key.
        raw
            The value as the user wrote it.
        text
            All that the user wrote, for messages.

        Raises
        ------
        ConfigError
            If there is no such parameter, it is given twice, or the value is of the wrong type.
        """
        name = _key(key.removeprefix("benchmark."))
        if name not in self._annotations:
            raise ConfigError(f"{self._owner} has no parameter {name!r}{suggestion(name, self._annotations)}")
        if name in self._values:
            raise ConfigError(f"{text}: {name} is given twice; keep one of them")
        value = _read(self._annotations[name], raw, text)
        self._values[name] = check_value(self._plugin, name, value, text)

    def build(self) -> Any:
        """Build the plugin; it refuses values that it cannot use, as a `ConfigError`."""
        return self._plugin(**native(self._plugin, self._values))


def is_boolean(text: str) -> bool:
    """Tell whether a text is the value of a switch."""
    return text.lower() in _BOOLEANS


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _read(annotation: Any, raw: str, text: str) -> Any:
    """Turn what was written into a plain value: text as it stands, lists with or without their brackets."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if raw == "null" and type(None) in kinds:
        return None
    if any(_is_text(kind) for kind in kinds):
        return raw
    if any(_is_list(kind) for kind in kinds) and not raw.startswith("["):
        return [part.strip() for part in raw.split(",")]
    try:
        return OverridesParser.create().parse_override(f"value={raw}").value()
    except HydraException:
        raise ConfigError(f"{text}: {raw!r} cannot be read as a value; quote brackets for the shell") from None


def _is_text(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(kind))
    return kind is str or (isinstance(kind, type) and issubclass(kind, enum.Enum))


def _is_list(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, (str, Mapping))
