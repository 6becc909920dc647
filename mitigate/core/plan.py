"""What a stack will do on a model, checked before anything runs; printed by ``mitigate plan``. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mitigate.core.branches import StreamPlan, check_branches, streams_of
from mitigate.core.facts import ModelFacts
from mitigate.core.method import Method
from mitigate.core.points import (
    ATTENTION_POINTS,
    DIFFERENTIATES,
    LAYER_POINTS,
    MAIN,
    ROW_POINTS,
    Access,
    Phase,
    Point,
    Rows,
    Subscription,
)
from mitigate.errors import PluginError, StackConflict, UnsupportedModel

#: Points at most one method of a stack may own.
EXCLUSIVE = (Point.SELECT_TOKEN, Point.DRIVE_DECODING)

#: Points the bus of this version calls.
SERVED = frozenset(Point) - {Point.DRIVE_DECODING}
#: Points whose value can only be looked at -> where a method changes it instead.
READ_ONLY = {Point.TOKEN_CHOSEN: Point.SELECT_TOKEN, Point.LOGIT_LENS: Point.HIDDEN_STATES}


@dataclass(frozen=True)
class BoundSubscription:
    """A subscription together with the method of the stack it belongs to."""

    key: str
    method: Method
    subscription: Subscription
    handler: Callable[..., Any]


@dataclass(frozen=True)
class PlanLine:
    """One row of the printed plan: who acts where, when and how."""

    point: str
    layers: str
    phases: str
    rows: str
    access: str
    method: str
    where: str
    branch: str = MAIN


def bind(methods: Mapping[str, Method], facts: ModelFacts) -> list[BoundSubscription]:
    """Collect the subscriptions of a stack in stack order and check that it can run on the model.

    Raises
    ------
    StackConflict
        If two methods own a point that only one may own.
    UnsupportedModel
        If the model lacks what a method needs, or the bus does not serve a point.
    PluginError
        If a method's handlers, tags and subscriptions contradict each other.
    """
    bound: list[BoundSubscription] = []
    for key, method in methods.items():
        if method.tags.spatial_grid and not facts.spatial_grid:
            raise UnsupportedModel(
                f"{key} needs image tokens that form a grid, but {facts.family} has none; leave {key} out of the stack"
            )
        subscriptions = list(method.subscriptions(facts))
        check_branches(key, method, subscriptions)
        for subscription in subscriptions:
            _check(key, method, subscription, facts)
            handler = getattr(method, f"on_{subscription.point.value}")
            bound.append(BoundSubscription(key, method, subscription, handler))
    for point in EXCLUSIVE:
        owners = list(dict.fromkeys(item.key for item in bound if item.subscription.point is point))
        if len(owners) > 1:
            raise StackConflict(
                f"{owners[0]} and {owners[1]} both want {point.value}, which only one method of a stack can have;"
                f" keep one of them"
            )
    return bound


def _check(key: str, method: Method, subscription: Subscription, facts: ModelFacts) -> None:
    point = subscription.point
    if point not in SERVED:
        raise UnsupportedModel(f"{key} subscribes to {point.value}, which this version of the hook bus does not serve")
    if not hasattr(method, f"on_{point.value}"):
        raise PluginError(f"{key} subscribes to {point.value} but has no handler on_{point.value}")
    declared = method.tags.writes if subscription.access is Access.WRITE else method.tags.reads
    if point not in declared:
        kind = "writes" if subscription.access is Access.WRITE else "reads"
        raise PluginError(f"{key} {kind} {point.value} but its tags do not say so: add it to tags.{kind}")
    access = subscription.access
    if access is Access.GRADIENT and not method.needs_gradient:
        raise PluginError(f"{key} asks for gradients but its tags do not say so: set tags.gradient")
    if access in DIFFERENTIATES and (point, subscription.rows) != (Point.ATTENTION_PROBS, Rows.LAST):
        raise PluginError(f"{key}: access '{access.value}' is for {Point.ATTENTION_PROBS.value} with rows 'last' only")
    if access is Access.OBSERVE and point is not Point.ATTENTION_PROBS:
        raise PluginError(f"{key}: access 'observe' is for {Point.ATTENTION_PROBS.value} only; read there instead")
    if access is Access.WRITE and point in READ_ONLY:
        raise PluginError(f"{key} cannot write {point.value}: it can only be looked at; use {READ_ONLY[point].value}")
    if point is Point.SELECT_TOKEN and not method.tags.selects_token:
        raise PluginError(f"{key} selects tokens but its tags do not say so: set tags.selects_token")
    if (point in LAYER_POINTS) != bool(subscription.layers) and point is not Point.VISION:
        raise PluginError(
            f"{key}: a subscription to {point.value} needs {'' if point in LAYER_POINTS else 'no '}layers"
        )
    kept = facts.attention_layers
    if point in ATTENTION_POINTS and kept is not None and (other := sorted(set(subscription.layers) - set(kept))):
        raise UnsupportedModel(
            f"{key} acts on attention, but layer {other[0]} of {facts.family} has none that can be served; choose among"
            f" layers {layer_text(kept, facts.layers)}"
        )
    if access is Access.GRADIENT and kept is not None:
        _check_gradients_pass(key, subscription.layers, kept, facts)
    part, depth = ("vision tower", facts.vision_layers) if point is Point.VISION else ("decoder", facts.layers)
    outside = [layer for layer in subscription.layers if layer < 0 or (depth is not None and layer >= depth)]
    if outside and depth is not None:
        raise UnsupportedModel(f"{key} wants layer {outside[0]}, but the {part} has layers 0-{depth - 1}")


def _check_gradients_pass(key: str, layers: Collection[int], kept: Collection[int], facts: ModelFacts) -> None:
    """Refuse gradients that would come through a layer without attention: it overwrites what it remembers."""
    closed = [layer for layer in range(min(layers), facts.layers) if layer not in kept]
    if closed:
        above = [layer for layer in kept if layer > closed[-1]]
        choice = f"layers {layer_text(above, facts.layers)}, or " if above else ""
        raise UnsupportedModel(
            f"{key} takes exact gradients, but layer {closed[-1]} of {facts.family} is none that is known to let them"
            f" through; choose {choice}a setting without exact gradients"
        )


def plan_streams(methods: Mapping[str, Method], facts: ModelFacts) -> list[StreamPlan]:
    """Return the extra streams of a stack; raises as `bind`."""
    bound = bind(methods, facts)
    return streams_of(methods, {key: [item.subscription for item in bound if item.key == key] for key in methods})


def plan_stack(methods: Mapping[str, Method], facts: ModelFacts) -> list[PlanLine]:
    """Describe what the stack does, in the order in which the bus calls it; raises as `bind`."""
    order = list(Point)
    lines = sorted(bind(methods, facts), key=lambda item: order.index(item.subscription.point))
    return [_line(item, facts) for item in lines]


def _line(item: BoundSubscription, facts: ModelFacts) -> PlanLine:
    subscription = item.subscription
    rows = ""
    if subscription.point in ROW_POINTS:
        rows = str(subscription.rows.value) if isinstance(subscription.rows, Rows) else "position set"
    return PlanLine(
        point=subscription.point.value,
        layers=_layers(subscription, facts),
        phases=", ".join(phase.value for phase in Phase if phase in subscription.phases),
        rows=rows,
        access=subscription.access.value,
        method=item.key,
        where=subscription.where,
        branch=", ".join(sorted(subscription.branches)),
    )


def _layers(subscription: Subscription, facts: ModelFacts) -> str:
    if subscription.point is Point.VISION:
        return "all" if not subscription.layers else layer_text(subscription.layers, facts.vision_layers or -1)
    return layer_text(subscription.layers, facts.layers)


def layer_text(layers: Sequence[int], depth: int) -> str:
    """Write layer indices as ``all``, ``0-3`` or ``0-1, 4``."""
    if not layers:
        return ""
    if len(layers) == depth:
        return f"all ({depth})"
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
