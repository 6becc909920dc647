"""Checks without a model: what the tags promise against handlers, subscriptions and each other."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator

from mitigate.core.method import Method, Tags
from mitigate.core.plan import bind
from mitigate.core.points import Access, Point, Subscription
from mitigate.errors import ConfigError, MitigateError, PluginError, UnsupportedModel
from mitigate.registry import suggestion
from mitigate.testing.base import Subject, check, ensure, fail
from mitigate.testing.subjects import geometries, quietly, variants

_COSTS = ("forwards_per_sample", "forwards_per_token", "backwards_per_sample", "backwards_per_token")


@check(once=True)
def check_tags(subject: Subject) -> None:
    """Give every tag a value of its type, and at least one point."""
    name, tags = subject.name, getattr(subject.plugin, "tags", None)
    if not isinstance(tags, Tags):
        fail(f"{name} has no tags: give the class tags: ClassVar[Tags] = Tags(...)")
    for field in dataclasses.fields(Tags):
        value = getattr(tags, field.name)
        if field.name in ("reads", "writes"):
            right = isinstance(value, frozenset) and all(isinstance(point, Point) for point in value)
            ensure(right, f"{name}: tags.{field.name} must be a frozenset of Point, not {value!r}")
        elif field.name in _COSTS:
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            ensure(right, f"{name}: tags.{field.name}={value!r} must be a number of passes, at least 0")
        else:
            ensure(isinstance(value, bool), f"{name}: tags.{field.name}={value!r} must be True or False")
    ensure(bool(tags.reads | tags.writes), f"{name}: tags name no point it reads or writes, so it can do nothing")


@check(once=True)
def check_handlers(subject: Subject) -> None:
    """Have handlers for known points that the tags declare, and for all of those."""
    plugin, name = subject.plugin, subject.name
    handlers = {f"on_{point.value}": point for point in Point}
    declared = plugin.tags.reads | plugin.tags.writes
    for attribute in dir(plugin):
        if not attribute.startswith("on_") or not callable(getattr(plugin, attribute)):
            continue  # a parameter may be called on_something
        ensure(
            attribute in handlers,
            f"{name}.{attribute} is called by nobody: no such point{suggestion(attribute, handlers)}",
        )
        ensure(
            handlers[attribute] in declared,
            f"{name} has a handler {attribute} but its tags do not say so: add the point to tags.reads or tags.writes",
        )
        try:
            inspect.signature(getattr(subject.method, attribute)).bind(object(), object())
        except TypeError as error:
            fail(f"{name}.{attribute} must take (event, state): {error}")
    for point in declared:
        ensure(
            hasattr(plugin, f"on_{point.value}"),
            f"{name}: tags declare {point.value} but there is no handler on_{point.value}",
        )


@check()
def check_subscriptions(subject: Subject) -> None:
    """Subscribe as tags and handlers say on every geometry it serves; refuse other models."""
    method, name, refusals = subject.method, subject.name, []
    for facts in geometries():
        try:
            wanted = quietly(method.subscriptions, facts)
            ensure(
                len(wanted) > 0 and all(isinstance(item, Subscription) for item in wanted),
                f"{name}.subscriptions() must return at least one Subscription, not {wanted!r}",
            )
            quietly(bind, {name: method}, facts)
        except PluginError as error:
            fail(str(error))
        except (ConfigError, UnsupportedModel) as error:
            refusals.append(str(error))
    ensure(len(refusals) < len(geometries()), f"{name} serves no model: {refusals[0] if refusals else ''}")


@check(once=True)
def check_declared_points(subject: Subject) -> None:
    """Declare no point that no parameter set or preset uses."""
    name, tags = subject.name, subject.plugin.tags
    asked = [item for method in variants(subject.plugin) for item in _asked(method)]
    used = {
        "writes": {item.point for item in asked if item.access is Access.WRITE},
        "reads": {item.point for item in asked if item.access is not Access.WRITE},
    }
    for kind, declared in (("writes", tags.writes), ("reads", tags.reads)):
        idle = [point.value for point in Point if point in declared - used[kind]]
        ensure(
            not idle,
            f"{name}: tags.{kind} has {', '.join(idle)}, but no parameter set or preset subscribes to it that way; "
            f"take it out, or add a set to test_params() that does",
        )


@check(once=True)
def check_capabilities(subject: Subject) -> None:
    """Declare gradients, token selection and the loop exactly where subscriptions ask for them."""
    name, tags, found = subject.name, subject.plugin.tags, variants(subject.plugin)
    asked = [item for method in found for item in _asked(method)]
    differentiates = any(item.access is Access.GRADIENT for item in asked)
    needs = any(method.needs_gradient for method in found)
    ensure(tags.gradient or not needs, f"{name}.needs_gradient is True but its tags do not say so: set tags.gradient")
    ensure(
        tags.gradient == differentiates,
        f"{name}: tags.gradient={tags.gradient}, but {'some' if differentiates else 'no'} subscription has "
        f"access=Access.GRADIENT",
    )
    ensure(
        tags.gradient or tags.backwards_per_sample + tags.backwards_per_token == 0,
        f"{name}: tags.backwards_per_token={tags.backwards_per_token:g} without tags.gradient: set one of them right",
    )
    for flag, point in (("selects_token", Point.SELECT_TOKEN), ("owns_loop", Point.DRIVE_DECODING)):
        ensure(
            getattr(tags, flag) == (point in tags.writes),
            f"{name}: tags.{flag}={getattr(tags, flag)}, but tags.writes "
            f"{'has' if point in tags.writes else 'lacks'} {point.value}: they go together",
        )


def _asked(method: Method) -> Iterator[Subscription]:
    """Yield the subscriptions of a method on every geometry it serves."""
    for facts in geometries():
        try:
            yield from quietly(method.subscriptions, facts)
        except MitigateError:
            continue
