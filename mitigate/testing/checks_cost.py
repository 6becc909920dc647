"""Checks on a tiny model: gradients are asked for, and extra passes are paid as the tags say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch

from mitigate.core import Event, Method, Selection
from mitigate.core.plan import BoundSubscription
from mitigate.testing.base import Skip, Subject, check, ensure, fail
from mitigate.testing.running import SINGLE, TOLERANCE, Call, apart, generate, record, stage, where
from mitigate.testing.subjects import instances
from mitigate.testing.tiny import TinyModel

#: Lengths at which passes are counted: with two, costs per sample and per token can be told apart.
_LENGTHS = (2, 6)


@dataclass
class Passes:
    """How often the decoder ran forwards, and autograd backwards."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counting(tiny: TinyModel) -> Iterator[Passes]:
    """Count the passes of a model in every stream: forwards of the first decoder block, runs of autograd."""
    passes, autograd = Passes(), cast(Any, torch.autograd)
    engine = autograd._engine_run_backward  # the one way into the engine: of grad, backward and torch.func

    def forward(*args: Any) -> None:
        passes.forwards += 1

    def backward(*args: Any, **kwargs: Any) -> Any:
        passes.backwards += 1
        return engine(*args, **kwargs)

    hook = tiny.adapter.decoder_layers(tiny.model)[0].register_forward_pre_hook(forward)
    autograd._engine_run_backward = backward
    try:
        yield passes
    finally:
        autograd._engine_run_backward = engine
        hook.remove()


def extra_passes(method: Method, tiny: TinyModel, steps: int) -> tuple[Passes, dict[str, float]]:
    """Return the passes a method adds to a generation of one sample, and what its telemetry says."""
    inputs = tiny.inputs(SINGLE)
    with counting(tiny) as plain:
        generate([], tiny, inputs, steps=steps)
    with counting(tiny) as passes:
        outcome = generate({"method": method}, tiny, inputs, steps=steps)
    # with gradients the prompt's last token runs alone: one call more, no pass more
    forwards = passes.forwards - plain.forwards - int(method.needs_gradient)
    return Passes(forwards, passes.backwards), outcome.telemetry[0]["method"]


@check(needs_model=True)
def check_cost(subject: Subject) -> None:
    """Add no more forwards and backwards than the tags say, and count them in the telemetry."""
    tiny, method = stage(subject), subject.method
    tags = method.tags
    for steps in _LENGTHS:
        extra, telemetry = extra_passes(method, tiny, steps)
        allowed = tags.forwards_per_sample + tags.forwards_per_token * steps
        ensure(
            extra.forwards <= allowed,
            f"{subject.name} runs {extra.forwards} extra forwards for {steps} tokens, its tags allow {allowed:g}: "
            f"raise tags.forwards_per_sample or tags.forwards_per_token",
        )
        allowed = tags.backwards_per_sample + tags.backwards_per_token * steps
        ensure(
            extra.backwards <= allowed,
            f"{subject.name} runs {extra.backwards} backwards for {steps} tokens, its tags allow {allowed:g}: raise "
            f"tags.backwards_per_sample or tags.backwards_per_token",
        )
        for kind, number in {"forwards": extra.forwards, "backwards": extra.backwards}.items():
            ensure(
                number <= 0 or telemetry.get(f"extra_{kind}", 0) > 0,
                f"{subject.name} runs {number} extra {kind} but counts none: state.count('extra_{kind}', 1.0)",
            )


@check(needs_model=True, once=True)
def check_cost_is_paid(subject: Subject) -> None:
    """Declare no pass that no parameter set makes, and less than twice what the dearest one makes."""
    tiny, tags, steps = stage(subject), subject.method.tags, _LENGTHS[-1]
    declared = {
        "forwards": tags.forwards_per_sample + tags.forwards_per_token * steps,
        "backwards": tags.backwards_per_sample + tags.backwards_per_token * steps,
    }
    if not any(declared.values()):
        raise Skip("declares no extra pass")
    most = dict.fromkeys(declared, 0)
    for method in instances(subject.plugin):
        with suppress(Skip):
            stage(Subject(method, subject.tiny))
            extra, _ = extra_passes(method, tiny, steps)
            most = {kind: max(number, getattr(extra, kind)) for kind, number in most.items()}
    for kind, allowed in declared.items():
        ensure(
            allowed == 0 or allowed < 2 * most[kind],
            f"{subject.name}: its tags declare {allowed:g} extra {kind} for {steps} tokens, but the dearest parameter "
            f"set of test_params() makes {most[kind]}: lower tags.{kind}_per_sample or tags.{kind}_per_token, or add "
            f"a set that makes more than half of them",
        )


@check(needs_model=True, once=True)
def check_draws(subject: Subject) -> None:
    """Declare random draws only if the seed matters in some parameter set."""
    tiny = stage(subject)
    if not subject.method.tags.stochastic:
        raise Skip("declares no random draws: check_deterministic sees that it makes none")
    for method in instances(subject.plugin):
        with suppress(Skip):
            stage(Subject(method, subject.tiny))
            one, other = (generate([method], tiny, tiny.inputs(SINGLE), seed=seed, trace=True) for seed in (5, 6))
            if apart(one, other) or repr(one.traces) != repr(other.traces):
                return
    fail(
        f"{subject.name}: tags.stochastic is True, but no parameter set of test_params() gives another result with "
        f"another seed: take the tag away, add a set that draws, and draw from request.generators only"
    )


@check(needs_model=True)
def check_gradients(subject: Subject) -> None:
    """Work in every grad mode of the caller, leave it alone, and leave no gradient and no graph behind."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(SINGLE)
    expected, calls = record([method], tiny, inputs)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}
    for name, mode in modes.items():
        with mode(), _trainable(tiny) if name == "enable_grad" else nullcontext():
            outcome = generate([method], tiny, inputs, around=_grad_mode_guard(subject))
        place = apart(expected, outcome, TOLERANCE)
        ensure(not place, f"{subject.name} gives another result when the caller is in {name}: {place}")
        ensure(not outcome.logits.requires_grad, f"{subject.name} leaves a graph on the logits in {name}; detach()")
    for parameter_name, parameter in tiny.model.named_parameters():
        ensure(parameter.grad is None, f"{subject.name} leaves a gradient on {parameter_name}: use autograd.grad")
    _ensure_no_graph(subject, calls)
    if not method.needs_gradient:
        with counting(tiny) as passes:
            generate([method], tiny, inputs)
        ensure(not passes.backwards, f"{subject.name} runs backwards without saying so: set tags.gradient")


def _grad_mode_guard(subject: Subject) -> Callable[..., Any]:
    """Fail when a handler leaves another grad mode than it found."""

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        value = call()
        if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != before:
            torch.set_grad_enabled(before[0])
            fail(
                f"{subject.name}.{where(item, event)} leaves the grad mode changed; use `with torch.enable_grad():`, "
                f"and only for what the tags declare"
            )
        return value

    return around


@contextmanager
def _trainable(tiny: TinyModel) -> Iterator[None]:
    tiny.model.requires_grad_(True)
    try:
        yield
    finally:
        tiny.model.requires_grad_(False)


def _ensure_no_graph(subject: Subject, calls: list[Call]) -> None:
    """Fail if something that outlives a step hangs on a graph: values returned, the state, the cache."""
    for call in calls:
        parts = call.value if isinstance(call.value, list | tuple) else [call.value]
        graph = any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts)
        inherited = any(
            tensor.requires_grad for tensor in vars(call.event).values() if isinstance(tensor, torch.Tensor)
        )
        ensure(
            inherited or not graph or isinstance(call.value, Selection),
            f"{subject.name}.{call.where} returns a value with a graph, though nothing asked for one; detach() it",
        )
    for request in {id(call.event.request): call.event.request for call in calls}.values():
        for name, value in vars(request.state(subject.name)).items():
            graph = isinstance(value, torch.Tensor) and value.requires_grad
            ensure(not graph, f"{subject.name} keeps a graph alive on state.{name} after the step; detach() it")
