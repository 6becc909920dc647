"""Checks of the user's overrides, before Hydra merges them: every message names the culprit and the remedy."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mitigate.compose.schema import DecodingConfig, ModelConfig, RunConfig, TrackerConfig, TrainerConfig
from mitigate.compose.schemas import METHOD_EXTRAS, annotations_of, schema_of, type_name
from mitigate.compose.session import GROUPS, Session, flatten
from mitigate.errors import ConfigError, UnknownName
from mitigate.registry import benchmarks, methods, suggestion

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "decoding": DecodingConfig,
    "trainer": TrainerConfig,
    "tracker": TrackerConfig,
}


def expand_sweeps(session: Session, tokens: Sequence[str], *, one: bool = False) -> list[list[str]]:
    """Return the override lists of all jobs of a sweep, the last swept key varying fastest.

    Raises
    ------
    ConfigError
        If a sweep cannot be enumerated, or nothing is swept and that is not allowed (``one``).
    """
    choices: list[list[str]] = []
    swept = False
    for override in session.parse(tokens):
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: only lists, choice(), range() and glob() can be swept")
        swept = True
        key = override.get_key_element()
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    if not swept and not one:
        raise ConfigError("-m sweeps values, but no override has several; write key=a,b or drop -m")
    return [list(job) for job in itertools.product(*choices)]


def parse_checked(session: Session, tokens: Sequence[str]) -> list[Override]:
    """Parse the overrides of one job and check what can be checked without composing."""
    parsed = session.parse(tokens)
    chosen: dict[str, str] = {}
    for override in parsed:
        if override.is_sweep_override():
            _refuse_sweep(override)
        if session.is_group(override):
            _check_group(session, override)
            group, text = override.key_or_group, str(override.input_line)
            if group in chosen:
                raise ConfigError(f"{chosen[group]} and {text}: {group} is chosen once; drop one of the two")
            chosen[group] = text
        else:
            _check_head(override)
        if any(value == "???" for value in flatten({"value": override.value()}).values()):
            raise ConfigError(f"{override.input_line}: give a value instead of ???")
    return parsed


def _refuse_sweep(override: Override) -> None:
    text = str(override.input_line)
    key, _, values = text.partition("=")
    remedy = f"add -m to run one job per value, or write '{key}=[{values}]' for a list"
    raise ConfigError(f"{text} has several values: {remedy}")


def _check_group(session: Session, override: Override) -> None:
    group, value, text = override.key_or_group, override.value(), override.input_line
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{text}: {group} is always there; drop the leading +")
    if override.is_delete():
        raise ConfigError(f"{text}: a group is not taken out but left out; drop {text}")
    if group == "methods":
        check_method_list(value, str(text))
    elif not isinstance(value, str):
        options = session.options(group)
        if not isinstance(value, (list, dict)) and str(value) in options:
            return
        if group == "stack" and isinstance(value, list):
            raise ConfigError(f"{text}: a run has one stack; `mitigate compare` takes a list of them")
        raise ConfigError(f"{text}: {group} takes one name; known: {', '.join(options)}")
    elif group == "benchmark":
        benchmarks().get(value)
    elif value not in session.options(group):
        raise session.unknown_option(group, value)


def check_method_list(value: Any, text: str) -> None:
    """Check the value of ``methods=``: a list of different, importable methods."""
    if not isinstance(value, list):
        raise ConfigError(f"{text}: methods is a list; write 'methods=[{value}]'")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{text}: {name!r} is no method name; write 'methods=[NAME, ...]' with names only")
        methods().get(name)
        if value.count(name) > 1:
            raise ConfigError(
                f"{text} names {name} twice; add a second copy under its own key: '+methods.{name}_2={{name: {name}}}'"
            )


def _check_head(override: Override) -> None:
    parts, text = override.key_or_group.split("."), override.input_line
    known = [field.name for field in fields(RunConfig)]
    if parts[0] == "hydra":
        raise ConfigError(f"{text}: hydra.* settings have no effect here; runs are placed with runs_dir= and name=")
    if "/" in parts[0] or "@" in str(override.input_line).partition("=")[0]:
        raise ConfigError(f"{text}: no such group{suggestion(parts[0].split('/')[0], GROUPS)}")
    if parts[0] not in known:
        raise ConfigError(f"unknown key {parts[0]!r} in {text}{suggestion(parts[0], {*known, *GROUPS})}")
    if override.is_add() and parts[0] != "methods":
        raise ConfigError(f"{text}: {override.key_or_group} is no new key; drop the leading +")
    if override.is_delete() and not (parts[0] == "methods" and len(parts) == 2):
        raise ConfigError(f"{text}: only methods can be taken out with ~, such as ~methods.NAME")
    if parts[0] in SECTIONS:
        names = [field.name for field in fields(SECTIONS[parts[0]])]
        if parts[1] not in names:
            raise ConfigError(f"{parts[0]} has no key {parts[1]!r}{suggestion(parts[1], names)}")
        if parts[:2] == ["model", "tuned"]:
            raise ConfigError(f"{text}: set methods.NAME.PARAMETER instead; model.tuned is for files of conf/model")
    elif len(parts) > 1 and parts[0] not in ("methods", "benchmark"):
        raise ConfigError(f"{text}: {parts[0]} is a single value; write {parts[0]}=VALUE")


def method_keys(config: DictConfig) -> list[str]:
    """Return the keys of the selected methods, in stack order; nodes without a name are not selected."""
    return [key for key, node in config.methods.items() if isinstance(node, DictConfig) and "name" in node]


def check_values(parsed: Iterable[Override], config: DictConfig) -> None:
    """Check all values against the plugins that the composed groups select.

    Parameters
    ----------
    parsed
        All overrides of the job.
    config
        The configuration composed from the group choices alone.

    Raises
    ------
    ConfigError
        At the first wrong key, wrong type, or value of a method that is not selected.
    """
    selected = {key: str(config.methods[key].name) for key in method_keys(config)}
    for override in parsed:
        parts, value, text = override.key_or_group.split("."), override.value(), str(override.input_line)
        if override.key_or_group in GROUPS:
            continue
        if parts[0] == "methods":
            _check_method_value(override, parts, selected)
        elif parts[0] == "benchmark":
            plugin = benchmarks().get(str(config.benchmark.name))
            _check_parameter(plugin, str(config.benchmark.name), parts[1], value, text, ())
        elif parts[0] in SECTIONS:
            annotation = typing.get_type_hints(SECTIONS[parts[0]])[parts[1]]
            _check_type(SECTIONS[parts[0]], parts[1], value, text, type_name(annotation))
        else:
            _check_type(RunConfig, parts[0], value, text, type_name(typing.get_type_hints(RunConfig)[parts[0]]))


def _check_method_value(override: Override, parts: Sequence[str], selected: dict[str, str]) -> None:
    key, value, text = parts[1], override.value(), str(override.input_line)
    if override.is_delete():
        if selected.pop(key, None) is None:
            raise ConfigError(f"{text} takes nothing out: the stack is {_listed(selected)}")
        return
    if len(parts) == 2:
        _check_copy(override, key, selected)
        return
    if key not in selected:
        if key in methods().names():
            wanted = ",".join([*selected, key])
            raise ConfigError(
                f"{text} sets a value of {key}, which is not in the stack ({_listed(selected)}); "
                f"select it with 'methods=[{wanted}]' or drop the value"
            )
        raise UnknownName(f"{text}: unknown method {key!r}{suggestion(key, [*selected, *methods().names()])}")
    if parts[2] == "name":
        raise ConfigError(f"{text}: a method's name is fixed; add another with '+methods.KEY={{name: {value}}}'")
    _check_parameter(methods().get(selected[key]), key, parts[2], value, text, METHOD_EXTRAS)


def _check_copy(override: Override, key: str, selected: dict[str, str]) -> None:
    """Check ``+methods.KEY={name: ..., ...}``, a further method under its own key."""
    value, text = override.value(), str(override.input_line)
    if key in selected:
        raise ConfigError(f"{text}: {key} is already in the stack; set methods.{key}.PARAMETER or choose another key")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{text}: a further method needs its name; write '+methods.{key}={{name: METHOD, ...}}'")
    if not (override.is_add() or override.is_force_add()):
        raise ConfigError(f"{text}: {key} is new; put a + before methods")
    plugin = methods().get(value["name"])
    for parameter, item in value.items():
        if parameter != "name":
            _check_parameter(plugin, key, str(parameter), item, f"{parameter}={item} in {text}", METHOD_EXTRAS)
    selected[key] = value["name"]


def _check_parameter(plugin: type, owner: str, parameter: str, value: Any, text: str, extras: Sequence[str]) -> None:
    known = [*annotations_of(plugin), *(extra for extra in extras if extra != "name")]
    if parameter not in known:
        raise ConfigError(f"{owner} has no parameter {parameter!r}{suggestion(parameter, known)}")
    annotation = annotations_of(plugin).get(parameter, str)
    node = schema_of(owner, plugin, extras=[extra for extra in extras if extra != "name"], unset=True)
    _check_type(node, parameter, value, text, type_name(annotation))


def _check_type(schema: type, key: str, value: Any, text: str, expected: str) -> None:
    if isinstance(value, str) and "${" in value:  # an interpolation has its type when it is resolved
        return
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, value)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{text} has the wrong type: {key} is {expected}") from error


def _listed(selected: Mapping[str, str]) -> str:
    return ", ".join(selected) or "empty"
