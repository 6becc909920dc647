"""Checks without a model: parameters on their way through configurations, and values that must be refused."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mitigate.compose.schemas import plain
from mitigate.compose.session import session
from mitigate.compose.values import decide
from mitigate.core.method import Method
from mitigate.errors import ConfigError, MitigateError
from mitigate.testing.base import Skip, Subject, check, ensure, fail
from mitigate.testing.subjects import geometries, quietly

#: Marks a string parameter that may be any text: ``prompt: Annotated[str, "free text"] = "..."``.
FREE_TEXT = "free text"
_NONSENSE = "no such option"
_REMEDY = "refuse it in __post_init__ with self.require(...), which names the parameter"


@check()
def check_config_round_trip(subject: Subject) -> None:
    """Come back equal when the parameters are written to YAML and composed as for a run."""
    method, name = subject.method, subject.name
    text = OmegaConf.to_yaml(OmegaConf.create(plain(method.params())))
    try:
        with session() as hydra:
            schema = hydra.merge(["stack=none", f"methods=[{name}]"]).methods[name]
        node: Any = OmegaConf.merge(schema, OmegaConf.create(text))
        built = decide(name, node, {}, {}).build()
    except MitigateError as error:
        fail(f"{name}: its parameters cannot be composed from a file: {error}")
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        fail(f"{name}: its parameters cannot be composed from a file: {error.full_key}: {reason}")
    changed = [
        f"{key}={value!r} became {built.params()[key]!r}"
        for key, value in method.params().items()
        if built.params()[key] != value
    ]
    ensure(type(built) is type(method), f"{name}: a run that selects it builds {type(built).__qualname__} instead")
    ensure(not changed, f"{name}: after a configuration file {', '.join(changed)}; use types YAML has, and tuples")


@check()
def check_bad_numbers(subject: Subject) -> None:
    """Refuse NaN and infinities by the parameter's name, and do not crash at an absurd number."""
    for parameter, kinds in _kinds(subject.plugin).items():
        value = getattr(subject.method, parameter)
        for wrong in (math.nan, math.inf, -math.inf) if float in kinds else ():
            refused = _refusal(subject, parameter, _in_place_of(value, wrong))
            ensure(refused, f"{subject.name} accepts {parameter}={wrong}: call self.require_finite({parameter!r}, ...)")
        if kinds & {int, float}:
            _refusal(subject, parameter, _in_place_of(value, -1_000_000))


@check()
def check_bad_options(subject: Subject) -> None:
    """Refuse a string that means nothing by the parameter's name, unless it is declared free text."""
    texts = {parameter: kinds for parameter, kinds in _kinds(subject.plugin).items() if str in kinds}
    for parameter in texts:
        value = getattr(subject.method, parameter)
        ensure(
            _refusal(subject, parameter, _in_place_of(value, _NONSENSE)),
            f"{subject.name} accepts {parameter}={_NONSENSE!r}: call self.require_option({parameter!r}, (...)); "
            f'if any text is right, annotate it Annotated[str, "{FREE_TEXT}"]',
        )
    if not texts:
        raise Skip("no parameter is a string with a fixed meaning")


def free_texts(plugin: type[Method]) -> set[str]:
    """Return the parameters that take any text, and mappings."""
    return {parameter for parameter, kinds in _kinds(plugin).items() if not kinds}


def _kinds(plugin: type[Method]) -> dict[str, set[Any]]:
    """Return parameter -> the plain types its values are made of; free text and mappings are left out."""
    hints = typing.get_type_hints(plugin, include_extras=True)
    return {field.name: _leaves(hints[field.name]) for field in dataclasses.fields(plugin) if field.init}


def _leaves(annotation: Any) -> set[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {str}
    if origin is typing.Annotated:
        return set() if FREE_TEXT in arguments[1:] else _leaves(arguments[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return set()
    return set().union(*map(_leaves, arguments)) if arguments else {annotation}


def _in_place_of(value: Any, wrong: Any) -> Any:
    """Return the wrong value, as the first element where the right one is a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (wrong, *value[1:])
    return wrong


def _refusal(subject: Subject, parameter: str, wrong: Any) -> bool:
    """Tell whether a value is refused, when built or when planned; fail if that is not a `ConfigError` naming it."""
    name, shown = subject.name, f"{parameter}={wrong!r}"
    try:
        changed = dataclasses.replace(subject.method, **{parameter: wrong})
    except ConfigError as error:
        ensure(_names(parameter, error), f"{name}: {shown} is refused without naming {parameter}: {error}; {_REMEDY}")
        return True
    except Exception as error:  # what must not happen
        fail(f"{name}: {shown} raises {type(error).__name__}: {error}; {_REMEDY}")
    for facts in geometries():
        for ask in (changed.subscriptions, partial(changed.check_model, "checkpoint")):
            try:
                quietly(ask, facts)
            except MitigateError as error:  # other refusals are about the model
                if isinstance(error, ConfigError) and _names(parameter, error):
                    return True
            except Exception as error:  # what must not happen
                fail(f"{name}: {shown} raises {type(error).__name__} when planned: {error}; {_REMEDY}")
    return False


def _names(parameter: str, error: Exception) -> bool:
    return re.search(rf"\b{re.escape(parameter)}\b", str(error)) is not None
