"""Check on a tiny model: every parameter does something."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mitigate.core import Method, ModelFacts
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, MitigateError
from mitigate.testing.base import Skip, Subject, check, ensure
from mitigate.testing.checks_config import free_texts
from mitigate.testing.running import generate_with, prompts_for, quiet, stage
from mitigate.testing.subjects import geometries, instances, quietly
from mitigate.testing.tiny import Prompt, TinyModel

#: Marks a parameter that cannot show on a tiny model: ``tiles: Annotated[str, "not seen on tiny models"] = "pooled"``.
UNSEEN = "not seen on tiny models"


@check(needs_model=True, once=True)
def check_parameters_matter(subject: Subject) -> None:
    """Behave otherwise when a parameter is changed: each one in at least one parameter set."""
    stage(subject)
    plugin, sets = subject.plugin, instances(subject.plugin)
    hints = typing.get_type_hints(plugin, include_extras=True)
    unseen = {parameter for parameter, hint in hints.items() if UNSEEN in getattr(hint, "__metadata__", ())}
    idle = {field.name for field in dataclasses.fields(plugin)} - free_texts(plugin)
    with _reading(plugin) as read:
        for method in sets:
            known: dict[Any, Any] = {}
            for parameter in sorted(idle):
                value = vars(method)[parameter]
                others = [other for each in sets if (other := vars(each)[parameter]) != value]
                if others and _differs(Subject(method, subject.tiny), {parameter: others[0]}, known, read):
                    idle.discard(parameter)
    words = ", ".join(sorted(idle - unseen))
    ensure(
        not words,
        f"{subject.name}: changing {words} in any set of test_params() changes nothing: not the results, the "
        f"counters or the traces. Use the parameter, add a set in which it matters, or, if no tiny model can show it, "
        f'annotate it Annotated[..., "{UNSEEN}"]',
    )
    words = ", ".join(sorted(idle - read))
    ensure(not words, f"{subject.name}: {words} is {UNSEEN}, but nothing even reads it while it runs: use it")


@contextmanager
def _reading(plugin: Any) -> Iterator[set[str]]:
    """Collect the attributes of a class's instances that are read."""
    read: set[str] = set()
    own, usual = vars(plugin).get("__getattribute__"), plugin.__getattribute__

    def getattribute(self: Method, name: str) -> Any:
        read.add(name)
        return usual(self, name)

    plugin.__getattribute__ = getattribute
    try:
        yield read
    finally:
        if own is None:
            del plugin.__getattribute__
        else:
            plugin.__getattribute__ = own


def _differs(subject: Subject, change: dict[str, Any], known: dict[Any, Any], read: set[str]) -> bool:
    """Whether a method behaves otherwise with other values; ``known`` keeps what it does with its own."""
    before = set(read)
    try:
        other = dataclasses.replace(subject.method, **change)
    except ConfigError:  # another parameter needs this one as it is
        return True
    finally:
        read.intersection_update(before)  # the constructor reads everything
    for look in (_plans, _results):
        if look not in known:
            known[look] = look(subject)
        if look(Subject(other, subject.tiny)) != known[look]:
            return True
    return False


def _plans(subject: Subject) -> Any:
    """Return the models it refuses, and its branches; where it acts has to show in the results."""
    return [_refuses(subject.method, facts) for facts in geometries()], list(subject.method.branches())


def _results(subject: Subject) -> Any:
    """Return what comes of two requests about the same pictures: what is kept of a picture shows in the second."""
    try:
        tiny = stage(subject)
    except Skip:
        return None
    prompts, found = prompts_for(subject.method), []
    again = (Prompt("is the dog near the chair", prompts[0].pictures),)
    with _counting_last(tiny) as depth, quiet(), Stack([subject.method]).attach(tiny.model, tiny.processor) as handle:
        for given in (prompts, again):
            out = generate_with(handle, tiny, tiny.inputs(given), trace=True)
            counters = [{**sample[subject.name], "seconds": None} for sample in out.telemetry]
            found.append((out.tokens.tolist(), out.logits.tolist(), len(depth), repr(counters), repr(out.traces)))
    return found


def _refuses(method: Method, facts: ModelFacts) -> bool:
    try:
        quietly(method.subscriptions, facts)
    except MitigateError:
        return True
    return False


@contextmanager
def _counting_last(tiny: TinyModel) -> Iterator[list[None]]:
    """Count how often the last decoder block runs: a pass may end early."""
    runs: list[None] = []
    hook = tiny.adapter.decoder_layers(tiny.model)[-1].register_forward_pre_hook(lambda *args: runs.append(None))
    try:
        yield runs
    finally:
        hook.remove()
