"""Checks on a tiny model: a method does something where it says so, nothing as its identity, and counts what it did."""

from __future__ import annotations

import math

from mitigate.core import Access, Method
from mitigate.testing.base import Skip, Subject, check, ensure, fail
from mitigate.testing.running import Outcome, apart, generate, prompts_for, record, stage

#: Tokens in which an effect has to show.
_STEPS = 6
_GRADIENT_TOLERANCE = 1e-4
#: What counts as another result: well above rounding.
_VISIBLE = 1e-4


def reads_only(method: Method) -> str | None:
    """Say why a method cannot have an effect."""
    return None if method.tags.writes else "declares no write: tags.writes is empty"


def _rounding(method: Method) -> float:
    """By how much logits may differ where nothing is edited: with gradients the last prompt token runs alone."""
    return _GRADIENT_TOLERANCE if method.needs_gradient else 0.0


@check(needs_model=True)
def check_identity(subject: Subject) -> None:
    """Leave tokens and logits bit for bit alone with the parameters of identity()."""
    tiny, own = stage(subject), type(subject.method)
    try:
        nothing = own.identity()
    except NotImplementedError:
        fail(f"{subject.name} has no identity(): return the parameters that leave the model bit-identical")
    inputs = tiny.inputs(prompts_for(subject.method))
    expected, got = generate([], tiny, inputs), generate([nothing], tiny, inputs)
    place = apart(expected, got, _rounding(nothing))
    ensure(
        not place,
        f"{subject.name}: with identity() the model differs from the model alone: {place}. Return None from a handler "
        f"whose parameters change nothing",
    )


@check(needs_model=True, applies=reads_only)
def check_has_effect(subject: Subject) -> None:
    """Change something at every point it writes, and with it what the model says."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(prompts_for(method))
    outcome, calls = record([method], tiny, inputs, steps=_STEPS)
    points = {item.point for item in method.subscriptions(tiny.facts) if item.access is Access.WRITE}
    for point in sorted(points):
        here = [call for call in calls if call.point is point and call.item.subscription.access is Access.WRITE]
        ensure(bool(here), f"{subject.name} subscribes to write {point}, but its handler was never called")
        ensure(
            any(call.changed for call in here),
            f"{subject.name}.on_{point} was called {len(here)} times and changed nothing: a silent no-op. Return the "
            f"new value, and choose test_params() strong enough to act on a small model",
        )
    ensure(bool(points), f"{subject.name} writes nothing with these parameters, though tags.writes says it does")
    ensure(
        _differs(generate([], tiny, inputs, steps=_STEPS), outcome),
        f"{subject.name} changes values at {', '.join(sorted(points))}, but in {_STEPS} steps no logit and no token "
        f"differs from those of the model alone: the edit has no effect",
    )


def _differs(plain: Outcome, outcome: Outcome) -> bool:
    return bool(apart(plain, outcome, _VISIBLE))


@check(needs_model=True, applies=reads_only)
def check_counts_what_it_did(subject: Subject) -> None:
    """Show every sample it changed in the telemetry, in finite numbers."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(prompts_for(method))
    plain, outcome = generate([], tiny, inputs, steps=_STEPS), generate([method], tiny, inputs, steps=_STEPS)
    for row, sample in enumerate(outcome.telemetry):
        counters = {name: value for name, value in sample[subject.name].items() if name != "seconds"}
        broken = [name for name, value in counters.items() if not math.isfinite(value)]
        ensure(not broken, f"{subject.name} counts {broken[:1]} as {counters.get(broken[0]) if broken else ''}")
        ensure(
            any(counters.values()) or not _differs(plain.row(row), outcome.row(row)),
            f"{subject.name} changed sample {row} but counted nothing for it; every edit has to show: "
            f"state.count('what', amount)",
        )


@check(needs_model=True)
def check_generate(subject: Subject) -> None:
    """Give the same through model.generate as through handle.generate, or refuse the former when attached."""
    from mitigate.core.stack import Stack
    from mitigate.errors import StackConflict
    from mitigate.testing.running import STEPS, generate_with, quiet

    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(prompts_for(method))
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": tiny.pad_token, "eos_token_id": []}
    with quiet(), Stack([method]).attach(tiny.model, tiny.processor) as handle:
        expected = generate_with(handle, tiny, inputs)
        try:
            tokens = tiny.model.generate(**inputs, **options)
        except StackConflict as refusal:
            raise Skip(f"chooses tokens itself: {refusal}") from refusal
    same = tokens[:, inputs["input_ids"].shape[1] :].tolist() == expected.tokens.tolist()
    ensure(same, f"{subject.name}: model.generate gives other tokens than handle.generate; act on events only")
