"""The final value of every method parameter, and who decided it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mitigate.compose.schemas import annotations_of, check_value, defaults_of, native, plain, schema_of, type_name
from mitigate.compose.tuned import TunedValue
from mitigate.core.method import Method
from mitigate.errors import ConfigError, UnknownName
from mitigate.registry import methods, suggestion

DEFAULT = "default"
COMMAND_LINE = "command line"
#: Values and where they came from.
_Layer = tuple[Mapping[str, Any], Mapping[str, str] | str]


@dataclass(frozen=True)
class MethodValues:
    """A method's final parameters.

    Parameters
    ----------
    name
        Registered name.
    preset
        Name of its preset.
    values
        Parameter -> value, plain.
    provenance
        Parameter (and ``preset``) -> where it came from.
    """

    name: str
    preset: str
    values: Mapping[str, Any]
    provenance: Mapping[str, str]

    def node(self) -> dict[str, Any]:
        """Return the configuration node: name, preset and all parameters."""
        return {"name": self.name, "preset": self.preset, **self.values}

    def resolved(self, key: str, node: Mapping[str, Any]) -> MethodValues:
        """Return the same with interpolations replaced by what they refer to, from the resolved node."""
        plugin = methods().get(self.name)
        values = {
            name: check_value(plugin, name, node[name], f"methods.{key}.{name}={node[name]}") for name in self.values
        }
        return dataclasses.replace(self, values=values)

    def build(self) -> Method:
        """Build the method; a value it refuses raises the `ConfigError` of the method."""
        plugin = methods().get(self.name)
        try:
            return plugin(**native(plugin, self.values))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"methods.{self.name}: {error}") from error


def decide(key: str, node: DictConfig, tuned: Mapping[str, TunedValue], origins: Mapping[str, str]) -> MethodValues:
    """Rank a method's values: default < tuned for the model < preset < files < command line.

    A preset that nobody asked for (the default one, or one a model's file names) stands below the tuned values.

    Parameters
    ----------
    key
        The method's key under ``methods``.
    node
        What the files and the command line set; everything else is missing.
    tuned
        Parameter -> value tuned for the model.
    origins
        Dotted key -> who set it, for values of ``node``.
    """
    name = str(node.name)
    plugin = methods().get(name)
    typed: Any = OmegaConf.structured(schema_of(name, plugin, extras=("preset",), unset=True))
    given = [str(parameter) for parameter in node if parameter != "name" and not OmegaConf.is_missing(node, parameter)]
    raw: Any = OmegaConf.to_container(node)  # interpolations stay: they may refer to values decided here
    set_here = {parameter: raw[parameter] for parameter in given}
    for parameter in set_here:
        _known(plugin, parameter, f"methods.{key}")
    for parameter, item in tuned.items():
        _known(plugin, parameter, item.place)
        if parameter != "preset" and not _has_reference(item.value):
            check_value(plugin, parameter, plain(item.value), f"{item.place}.{parameter}={item.value}")
    of_model = {parameter: item.value for parameter, item in tuned.items()}
    told = {parameter: item.source for parameter, item in tuned.items()}
    explicit = {parameter: origins.get(f"methods.{key}.{parameter}", "configuration") for parameter in set_here}
    preset = str(set_here.get("preset", of_model.get("preset", "paper")))
    if preset not in plugin.presets:
        raise UnknownName(f"methods.{key}.preset={preset} is unknown{suggestion(preset, plugin.presets)}")

    below: _Layer = (plugin.presets[preset], f"preset {preset}")
    above: _Layer = (of_model, told)
    if "preset" in set_here:
        below, above = above, below
    layers: list[_Layer] = [(defaults_of(plugin), DEFAULT), below, above, (set_here, explicit)]
    provenance = {"preset": explicit.get("preset", told.get("preset", DEFAULT))}
    for values, source in layers:
        for parameter, value in values.items():
            if parameter == "preset":
                continue
            _known(plugin, parameter, f"methods.{key}")
            try:
                typed[parameter] = plain(value)
            except OmegaConfBaseException as error:
                expected = type_name(annotations_of(plugin)[parameter])
                raise ConfigError(f"methods.{key}.{parameter}={value} is no {expected}") from error
            provenance[parameter] = source if isinstance(source, str) else source[parameter]
    missing = [parameter for parameter in annotations_of(plugin) if OmegaConf.is_missing(typed, parameter)]
    if missing:
        raise ConfigError(f"methods.{key}.{missing[0]} has no default; give it a value")
    container: Any = OmegaConf.to_container(typed)
    final = {parameter: plain(container[parameter]) for parameter in annotations_of(plugin)}
    for parameter, value in final.items():
        if not _has_reference(value):
            source = provenance[parameter]
            whose = "" if source in (DEFAULT, COMMAND_LINE) else f" (from {source})"
            final[parameter] = check_value(plugin, parameter, value, f"methods.{key}.{parameter}={value}{whose}")
    return MethodValues(name, preset, final, provenance)


def _known(plugin: type[Method], parameter: str, where: str) -> None:
    if parameter not in (*annotations_of(plugin), "preset"):
        raise ConfigError(f"{where} has no parameter {parameter!r}{suggestion(parameter, annotations_of(plugin))}")


def _has_reference(value: Any) -> bool:
    """Tell whether a value refers to another key, so that its type is known only when that is resolved."""
    return isinstance(value, str) and "${" in value
