"""Typed Hydra nodes generated from plugin dataclasses, and what is known about a plugin's parameters."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mitigate.errors import ConfigError, PluginError

#: Fields every method node has besides the method's own parameters.
METHOD_EXTRAS = ("name", "preset")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a plugin.

    Parameters
    ----------
    name
        As written in configurations.
    type
        The annotation, as a user reads it (``"int"``, ``"list[str]"``).
    default
        Default value, JSON-able; ``None`` also when there is none.
    required
        Whether it has no default.
    doc
        Its text in the class docstring, on one line.
    """

    name: str
    type: str
    default: Any
    required: bool
    doc: str


_hints_of = cache(typing.get_type_hints)


def annotations_of(plugin: type) -> dict[str, Any]:
    """Return parameter name -> annotation of a plugin dataclass.

    Raises
    ------
    PluginError
        If the class is no dataclass, an annotation cannot be read, or a parameter has a reserved name.
    """
    if not dataclasses.is_dataclass(plugin):
        raise PluginError(f"{plugin.__module__}.{plugin.__qualname__} is no dataclass: decorate it with @dataclass")
    try:
        hints = _hints_of(plugin)
    except Exception as error:
        raise PluginError(
            f"{plugin.__module__}.{plugin.__qualname__}: annotations cannot be read ({error}); "
            f"import their names at run time, not under TYPE_CHECKING"
        ) from error
    found = {field.name: hints[field.name] for field in dataclasses.fields(plugin) if field.init}
    for reserved in METHOD_EXTRAS:
        if reserved in found:
            raise PluginError(f"{plugin.__module__}.{plugin.__qualname__}: parameter name {reserved!r} is reserved")
    return found


def _config_type(annotation: Any) -> Any:
    """Translate an annotation into one OmegaConf can check: tuples become lists, enums and literals what they hold."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float, bool, str):
        return annotation
    if _is_enum(annotation) or origin is typing.Literal:
        kinds = {type(choice) for choice in _choices(annotation)}
        return typing.Union[tuple(kinds)] if kinds <= {int, float, bool, str} else Any  # noqa: UP007
    if origin in (typing.Union, types.UnionType):
        inner = [_config_type(argument) for argument in arguments if argument is not type(None)]
        if len(inner) != 1 and any(kind not in (int, float, bool, str) for kind in inner):
            return Any
        joined: Any = typing.Union[tuple(inner)]  # noqa: UP007  # built from a list at run time
        return typing.Optional[joined] if type(None) in arguments else joined  # noqa: UP045
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return list[_config_type(arguments[0])] if arguments else list[Any]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[str, _config_type(arguments[1]) if len(arguments) == 2 else Any]  # type: ignore[misc]
    return Any


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _choices(annotation: Any) -> dict[Any, Any]:
    """Return what may be written for a literal or an enum -> its plain value; enums are written by name or by value."""
    if not _is_enum(annotation):
        return {argument: argument for argument in typing.get_args(annotation)}
    by_value = {member.value: plain(member) for member in annotation}
    return {member.name: plain(member) for member in annotation} | by_value


def _settled(annotation: Any, value: Any, text: str) -> Any:
    """Return a value of the right type with enums by value; what is no choice, or too many of a tuple, is refused."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return value if value is None or len(inner) != 1 else _settled(inner[0], value, text)
    if isinstance(value, list) and arguments:
        fixed = origin is tuple and Ellipsis not in arguments
        if fixed and len(value) != len(arguments):
            raise ConfigError(f"{text} has the wrong length: it takes {len(arguments)} values, not {len(value)}")
        return [_settled(arguments[number] if fixed else arguments[0], item, text) for number, item in enumerate(value)]
    if _is_enum(annotation) or origin is typing.Literal:
        choices = _choices(annotation)
        if not isinstance(value, Hashable) or value not in choices:
            raise ConfigError(
                f"{text} is none of {', '.join(str(choice) for choice in dict.fromkeys(choices.values()))}"
            )
        return choices[value]
    return value


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples and sets become lists, enums their values."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def defaults_of(plugin: type) -> dict[str, Any]:
    """Return parameter name -> default of a plugin dataclass, as plain values; required parameters are left out.

    Raises
    ------
    PluginError
        If a default cannot be written into a configuration.
    """
    found = {}
    for field in dataclasses.fields(plugin):
        if field.init and field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.init and field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
        try:
            json.dumps(found.get(field.name))
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"{plugin.__module__}.{plugin.__qualname__}: default {found[field.name]!r} of {field.name} cannot be "
                f"written into a configuration; use numbers, strings, enums, or tuples of them"
            ) from error
    return found


def schema_of(name: str, plugin: type, *, extras: Sequence[str] = (), unset: bool = False) -> type:
    """Make the dataclass Hydra checks a plugin's values with.

    A copy rather than the plugin itself, because OmegaConf makes nodes of frozen dataclasses read-only.

    Parameters
    ----------
    name
        Registered name, the default of the field ``name``.
    plugin
        The plugin class.
    extras
        Further string fields.
    unset
        Leave every value missing, so that what somebody set can be told from defaults.
    """
    annotations = annotations_of(plugin)
    defaults = {} if unset else defaults_of(plugin)
    fields: list[tuple[str, Any, Any]] = [("name", str, dataclasses.field(default=name))]
    fields += [(extra, str, dataclasses.field(default=MISSING)) for extra in extras]
    for parameter, annotation in annotations.items():
        value = defaults.get(parameter, MISSING)
        default: Any = dataclasses.field(default=value)
        if isinstance(value, (list, dict)):
            default = dataclasses.field(default_factory=value.copy)
        fields.append((parameter, _config_type(annotation), default))
    return dataclasses.make_dataclass(plugin.__name__, fields)


def check_value(plugin: type, key: str, value: Any, text: str) -> Any:
    """Return a parameter's value in its own type (``1`` as ``1.0`` for a float).

    Parameters
    ----------
    plugin
        Dataclass the parameter belongs to.
    key
        Name of the parameter.
    value
        Plain value.
    text
        What the user wrote, for the message.

    Raises
    ------
    ConfigError
        If the value has the wrong type, or is none of the choices.
    """
    annotation = annotations_of(plugin)[key]
    schema = dataclasses.make_dataclass("Value", [(key, _config_type(annotation), dataclasses.field(default=MISSING))])
    node: Any = OmegaConf.structured(schema)
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{text} has the wrong type: {key} is {type_name(annotation)}") from error
    container: Any = OmegaConf.to_container(node)
    return _settled(annotation, container[key], text)


def native(plugin: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn plain configuration values into what the plugin's annotations ask for (lists into tuples)."""
    annotations = annotations_of(plugin)
    return {name: _native(annotations[name], value) for name, value in values.items()}


def _native(annotation: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, list):
        if origin in (typing.Union, types.UnionType):
            options = [argument for argument in arguments if typing.get_origin(argument) in (tuple, list, Sequence)]
            return _native(options[0], value) if options else value
        if arguments:
            inner = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
            value = [_native(kind, item) for kind, item in zip(inner, value, strict=True)]
        if annotation is tuple or origin is tuple or origin is Sequence:
            return tuple(value)
    if _is_enum(annotation) and not isinstance(value, annotation):
        return annotation[value] if value in annotation.__members__ else annotation(value)
    return value


def type_name(annotation: Any) -> str:
    """Return an annotation as a user reads it."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:typing|collections\.abc)\.", "", str(annotation))


def parameters_of(plugin: type) -> list[Parameter]:
    """Describe the parameters of a plugin dataclass, with their texts from its NumPy docstring."""
    defaults, docs = defaults_of(plugin), _parameter_docs(plugin)
    return [
        Parameter(name, type_name(annotation), defaults.get(name), name not in defaults, docs.get(name, ""))
        for name, annotation in annotations_of(plugin).items()
    ]


def _parameter_docs(plugin: type) -> dict[str, str]:
    """Read the ``Parameters`` sections of the class docstrings, base classes first."""
    docs: dict[str, str] = {}
    for owner in reversed(plugin.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        section = re.search(
            r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", text, re.MULTILINE | re.DOTALL
        )
        names: list[str] = []
        for line in section.group(1).splitlines() if section else ():
            if line and not line.startswith(" "):
                names = [part.strip() for part in line.split(":")[0].split(",")]
                docs.update(dict.fromkeys(names, ""))
            else:
                for name in names:
                    docs[name] = f"{docs[name]} {line.strip()}".strip()
    return docs
