"""Checks on geometries and tiny models: a method works or says no beforehand, alone and beside every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

from mitigate.compose.facts import facts_of
from mitigate.compose.session import session
from mitigate.core import (
    Access,
    Event,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Point,
    Rows,
    Subscription,
    Tags,
)
from mitigate.core.plan import SERVED, bind, plan_stack
from mitigate.core.points import LAYER_POINTS
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, UnsupportedModel
from mitigate.registry import BUILTIN_DISTRIBUTION, methods
from mitigate.testing.base import Skip, Subject, check, ensure, fail
from mitigate.testing.running import (
    PROMPTS,
    REFUSALS,
    SINGLE,
    TOLERANCE,
    apart,
    generate,
    generate_with,
    prompts_for,
    quiet,
    stage,
    usable,
)
from mitigate.testing.subjects import geometries, instances
from mitigate.testing.tiny import TinyModel, tiny_families, tiny_model

#: Depths and heads no model file has, where layer ranges go wrong first.
_ODD = tuple(
    ModelFacts(family="odd", layers=layers, heads=heads, kv_heads=1, spatial_grid=grid)
    for layers, heads, grid in ((1, 1, True), (2, 2, False), (80, 64, True))
)
#: What a model file may leave out.
_UNKNOWN = {"path": "", "family": None, "layers": None, "heads": None, "kv_heads": None, "spatial_grid": True}


@cache
def _known_models() -> tuple[tuple[str, ModelFacts], ...]:
    """Return the geometry of every model there is a file for."""
    with session() as hydra:
        files = {option: hydra.load_raw(f"model/{option}") for option in hydra.options("model")}
    geometry = {option: facts_of({**_UNKNOWN, **cast(Any, file)}) for option, file in files.items()}
    return tuple((option, facts) for option, facts in geometry.items() if facts is not None)


@check(needs_model=True)
def check_families(subject: Subject) -> None:
    """Work on a tiny model, and plan for every known one or refuse it with UnsupportedModel or ConfigError."""
    _ensure_served(subject)
    named = [*_known_models(), *((f"{facts.layers} layers, {facts.family}", facts) for facts in (*geometries(), *_ODD))]
    for name, facts in named:
        try:
            with quiet():
                subject.method.check_model(name, facts)
                plan_stack({subject.name: subject.method}, facts)
        except REFUSALS:
            continue
        except Exception as error:
            fail(
                f"{subject.name} cannot be planned for {name} ({facts.layers} layers, {facts.heads} heads): "
                f"{type(error).__name__}: {error}. Derive layers from ModelFacts, and refuse with UnsupportedModel"
            )


def _ensure_served(subject: Subject) -> None:
    """Fail if no parameter set serves any tiny model: then the other checks see nothing."""
    reasons = []
    for family in tiny_families():
        for method in (subject.method, *instances(subject.plugin)):
            try:
                stage(Subject(method, tiny_model(family)))
            except Skip as skip:
                reasons.append(f"{family}: {skip}")
            else:
                return
    fail(
        f"{subject.name} refuses every tiny model ({reasons[0] if reasons else 'there is none'}), so nothing can be "
        f"checked: give test_params() that fit a decoder of four layers"
    )


def needs_grid(method: Method) -> str | None:
    """Say why a method is on no model whose image tokens form no grid."""
    return "tags.spatial_grid: such a model is refused beforehand" if method.tags.spatial_grid else None


class _WithoutGrid:
    """An adapter whose images have no rows and columns, as where a few learned tokens sum up a picture."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def facts(self, model: Any) -> ModelFacts:
        facts: ModelFacts = self._adapter.facts(model)
        return dataclasses.replace(facts, spatial_grid=False)

    def layout(self, *args: Any) -> Any:  # as the adapter's
        layout = self._adapter.layout(*args)
        images = tuple(tuple(dataclasses.replace(span, grid=None) for span in spans) for spans in layout.images)
        return dataclasses.replace(layout, images=images)


@check(needs_model=True, applies=needs_grid)
def check_without_grid(subject: Subject) -> None:
    """Work where image tokens form no grid, or refuse such a model beforehand."""
    tiny, method = stage(subject), subject.method
    plain: Any = _WithoutGrid(tiny.adapter)
    try:
        with quiet():
            method.check_model("tiny", plain.facts(tiny.model))
            bind({subject.name: method}, plain.facts(tiny.model))
    except REFUSALS as refusal:
        raise Skip(f"refuses such a model: {refusal}") from refusal
    try:
        with quiet(), Stack([method]).attach(tiny.model, tiny.processor) as handle:
            if handle.bus is not None:
                handle.bus.adapter = plain
            generate_with(handle, tiny, tiny.inputs(prompts_for(method)))
    except Exception as error:
        fail(
            f"{subject.name} cannot work where image tokens form no grid (ImageSpan.grid is None): "
            f"{type(error).__name__}: {error}. Set tags.spatial_grid, so that such models are refused beforehand"
        )


# ------------------------------------------------------------------------------------------------------- compositions


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Looks at everything and changes nothing.

    Parameters
    ----------
    without
        Points that the model has not.
    """

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "looks at everything and changes nothing"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point))

    without: frozenset[Point] = frozenset()

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Read every point of the main stream and every attention row."""
        points = SERVED - {Point.TEXT_INPUT, Point.SELECT_TOKEN, Point.TOKEN_CHOSEN} - self.without
        layers = tuple(range(model.layers))
        return [
            Subscription(
                point=point,
                access=Access.READ,
                layers=layers if point in LAYER_POINTS - {Point.VISION} else (),
                rows=Rows.ALL,
            )
            for point in sorted(points)
        ]

    def _look(self, event: Event, state: MethodState) -> None:
        """Do nothing: that it is called brings every value and every row."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("on_"):
            return self._look
        raise AttributeError(attribute)


def _lacking(tiny: TinyModel) -> frozenset[Point]:
    """Return the points of pictures that a family has not, for want of a tower or of features."""
    lacking = set()
    for point, part in ((Point.VISION, tiny.adapter.vision_layers), (Point.VISUAL_EMBEDDINGS, tiny.adapter.projector)):
        try:
            part(tiny.model)
        except UnsupportedModel:
            lacking.add(point)
    return frozenset(lacking)


def _others(tiny: TinyModel) -> Iterator[tuple[str, Method]]:
    """Yield every built-in method that serves the model, with parameters that act on a small one."""
    for entry in methods().entries():
        if entry.distribution != BUILTIN_DISTRIBUTION or entry.broken:
            continue
        method = instances(methods().get(entry.name))[-1]
        try:
            method.check_model("tiny", tiny.facts)
        except ConfigError:
            continue
        yield entry.name, method


@check(needs_model=True)
def check_composes(subject: Subject) -> None:
    """Run before and after every built-in method, or be refused when the stack is built; never fail midway."""
    tiny = stage(subject)
    for name, other in _others(tiny):
        for order in ({"it": subject.method, name: other}, {name: other, "it": subject.method}):
            try:
                with quiet():
                    bind(order, tiny.facts)
            except REFUSALS:
                continue
            _ensure_runs(subject, tiny, order, " before ".join(order).replace("it", subject.name))


def _ensure_runs(subject: Subject, tiny: TinyModel, stack: Mapping[str, Method], how: str) -> None:
    batch = all(method.tags.batch for method in stack.values())
    try:
        outcome = generate(stack, tiny, tiny.inputs(PROMPTS[:2] if batch else SINGLE), steps=2)
    except Exception as error:
        fail(
            f"{how}: {type(error).__name__} while generating: {error}. A stack that cannot work is refused when it is "
            f"built: raise UnsupportedModel or ConfigError in subscriptions()"
        )
    ensure(usable(outcome.logits), f"{how}: the logits are not finite")
    missing = [key for key in stack if key not in outcome.telemetry[0]]
    ensure(not missing, f"{how}: {missing} left no telemetry")


@check(needs_model=True)
def check_is_observed(subject: Subject) -> None:
    """Give the same result when another method reads every value and every attention row beside it."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(PROMPTS if method.tags.batch else SINGLE)
    expected = generate({"it": method}, tiny, inputs)
    probe = Probe(without=_lacking(tiny))
    for order in ({"it": method, "probe": probe}, {"probe": probe, "it": method}):
        place = apart(expected, generate(order, tiny, inputs), TOLERANCE)
        ensure(
            not place,
            f"{subject.name} gives another result beside a method that only reads: {place}. An event can bring more "
            f"rows than asked for: use event.rows and event.row_mask",
        )
