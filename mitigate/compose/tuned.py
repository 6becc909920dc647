"""Values tuned for a model: those of its own file, and those that packages add in ``conf/tuned/MODEL.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mitigate.compose.search_path import distribution_of
from mitigate.compose.session import TUNED, Session
from mitigate.errors import ConfigError, UnknownName
from mitigate.registry import BUILTIN_DISTRIBUTION, methods, suggestion


@dataclass(frozen=True)
class TunedValue:
    """A value tuned for a model.

    Parameters
    ----------
    value
        As written in the file.
    place
        File, package and method, for messages.
    source
        Where it came from, for the provenance.
    """

    value: Any
    place: str
    source: str


def tuned_values(hydra: Session, option: str | None, model: DictConfig) -> dict[str, list[tuple[str, TunedValue]]]:
    """Return method name -> (parameter, value) of all files that tune methods for a model.

    Parameters
    ----------
    hydra
        The search path.
    option
        The chosen option of the group ``model``.
    model
        The composed ``model`` section, whose ``tuned`` is the content of the model's own file.

    Raises
    ------
    ConfigError
        If a file is not METHOD: {PARAMETER: VALUE}.
    UnknownName
        If it names a method that no installed package brings.
    """
    found: list[tuple[Any, str, str]] = []
    if option is not None:
        brought = [package for package in hydra.brought_by(f"model/{option}") if package != BUILTIN_DISTRIBUTION]
        file = f"conf/model/{option}.yaml{f' of {brought[0]}' if brought else ''}"
        found.append((OmegaConf.to_container(model.tuned), f"{file}: tuned.", f"model {model.name}"))
        for source in hydra.sources():
            if source.is_config(f"{TUNED}/{option}"):
                package = distribution_of(source.provider)
                file = f"conf/{TUNED}/{option}.yaml of {package}"
                found.append((read_tuned(source, option, file), f"{file}: ", f"model {option} ({package})"))
    values: dict[str, list[tuple[str, TunedValue]]] = {}
    for table, place, label in found:
        for method, parameters in table.items():
            if method not in methods().names():
                raise UnknownName(f"{place}{method}: unknown method{suggestion(method, methods().names())}")
            values.setdefault(method, []).extend(
                (parameter, TunedValue(value, f"{place}{method}", label)) for parameter, value in parameters.items()
            )
    return values


def read_tuned(source: Any, option: str, file: str) -> dict[str, dict[str, Any]]:
    """Return the content of a file of tuned values.

    Raises
    ------
    ConfigError
        If it is no YAML, or not METHOD: {PARAMETER: VALUE}.
    """
    try:
        content: Any = OmegaConf.to_container(source.load_config(f"{TUNED}/{option}").config)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise ConfigError(f"{file} must hold METHOD: {{PARAMETER: VALUE}} for each method, nothing else")
    return {str(method): {str(key): value for key, value in part.items()} for method, part in content.items()}


def tuned_for(method: str, values: Mapping[str, list[tuple[str, TunedValue]]]) -> dict[str, TunedValue]:
    """Return the tuned values of one method.

    Raises
    ------
    ConfigError
        If two files set one value.
    """
    chosen: dict[str, TunedValue] = {}
    for parameter, value in values.get(method, ()):
        if parameter in chosen:
            raise ConfigError(
                f"{parameter} is tuned twice: {chosen[parameter].place} and {value.place}; "
                f"take one out, or set MITIGATE_PLUGINS to the packages you want"
            )
        chosen[parameter] = value
    return chosen
