"""Checks on a tiny model: a stack leaves no trace on the model or in the process, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mitigate.core import Event
from mitigate.core.plan import BoundSubscription
from mitigate.core.stack import Stack
from mitigate.errors import HookError
from mitigate.testing import snapshots
from mitigate.testing.base import Subject, check, ensure, fail
from mitigate.testing.running import (
    SINGLE,
    apart,
    generate,
    generate_with,
    prompts_for,
    quiet,
    stage,
    tensors_of,
    where,
)
from mitigate.testing.tiny import Prompt, TinyModel

_REMEDY = "a method acts through what its handlers return and remembers on `state` only"


class _OnPurposeError(RuntimeError):
    """Raised by the checks inside the model and inside handlers."""


def _warm(tiny: TinyModel, prompts: Sequence[Prompt] = SINGLE) -> None:
    """Generate once without a stack: transformers puts its own hooks and notes on a model when it runs."""
    generate([], tiny, tiny.inputs(prompts), steps=2)


def _ensure_untouched(subject: Subject, tiny: TinyModel, before: snapshots.Snapshot, when: str) -> None:
    """Fail if the model or the process differs from what it was."""
    found = snapshots.differences(before, snapshots.of_model(tiny.model))
    ensure(not found, f"{subject.name} leaves something behind {when}: {'; '.join(found[:4])}. {_REMEDY}")


@check(needs_model=True)
def check_detach(subject: Subject) -> None:
    """Leave hooks, attributes, settings, flags, globals and random states as they were after the with block."""
    tiny, prompts = stage(subject), prompts_for(subject.method)
    _warm(tiny, prompts)
    before = snapshots.of_model(tiny.model)
    generate([subject.method], tiny, tiny.inputs(prompts))
    _ensure_untouched(subject, tiny, before, "after the with block")


@check(needs_model=True)
def check_detach_after_error(subject: Subject) -> None:
    """Leave nothing behind when the model, a handler or Ctrl-C ends a generation; then all works again."""
    tiny = stage(subject)
    _warm(tiny)
    inputs = tiny.inputs(SINGLE)
    expected = generate([subject.method], tiny, inputs)
    before, plain = snapshots.of_model(tiny.model), generate([], tiny, inputs)
    for when, trouble in _troubles(tiny).items():
        with quiet(), Stack([subject.method]).attach(tiny.model, tiny.processor) as handle:
            with contextlib.suppress(_OnPurposeError, KeyboardInterrupt, HookError), trouble() as around:
                generate_with(handle, tiny, inputs, around=around)
            again = generate_with(handle, tiny, inputs)
        _ensure_untouched(subject, tiny, before, f"after {when}")
        place = apart(expected, again)
        ensure(not place, f"{subject.name}: after {when} the same stack gives something else: {place}. {_REMEDY}")
    place = apart(plain, generate([], tiny, inputs))
    ensure(not place, f"{subject.name}: after errors the model alone gives something else: {place}. {_REMEDY}")


def _troubles(tiny: TinyModel) -> dict[str, Callable[[], Any]]:
    """Return ways in which a generation ends early; each one yields what goes around the handlers."""

    @contextmanager
    def in_model(error: type[BaseException], at: int) -> Iterator[None]:
        calls = 0

        def raising(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error("on purpose")

        hook = tiny.adapter.decoder_layers(tiny.model)[-1].register_forward_hook(raising)
        try:
            yield None
        finally:
            hook.remove()

    @contextmanager
    def in_handler(at: int) -> Iterator[Callable[..., Any]]:
        calls = 0

        def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
            nonlocal calls
            calls += 1
            value = call()
            if calls == at:
                raise _OnPurposeError("on purpose")
            return value

        yield around

    return {
        "an error in the model while it generates": lambda: in_model(_OnPurposeError, 3),
        "an error in its first handler": lambda: in_handler(1),
        "an error in a later handler": lambda: in_handler(4),
        "Ctrl-C": lambda: in_model(KeyboardInterrupt, 3),
    }


@check(needs_model=True)
def check_output_restored(subject: Subject) -> None:
    """Leave the model's logits bit for bit as they were before."""
    tiny = stage(subject)
    inputs = tiny.inputs()
    with torch.no_grad():
        before = tiny.model(**inputs).logits
        generate([subject.method], tiny, tiny.inputs(SINGLE))
        after = tiny.model(**inputs).logits
    ensure(
        torch.equal(before, after),
        f"{subject.name}: after the with block the model's logits differ by {float((before - after).abs().max()):.2g}; "
        f"expected bit-identical ones. {_REMEDY}",
    )


@check(needs_model=True)
def check_weights_untouched(subject: Subject) -> None:
    """Leave the weights and buffers of the model alone, also for the length of a forward."""
    tiny = stage(subject)
    _warm(tiny)
    before = snapshots.weights_of(tiny.model)

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        value = call()
        changed = snapshots.changed_weight(tiny.model, before)
        if changed is not None:
            fail(f"{subject.name}.{where(item, event)} edits the weight {changed} of the model. {_REMEDY}")
        return value

    generate([subject.method], tiny, tiny.inputs(SINGLE), around=around)
    changed = snapshots.changed_weight(tiny.model, before)
    ensure(changed is None, f"{subject.name} edits the weight {changed} of the model. {_REMEDY}")


@check(needs_model=True)
def check_inputs_untouched(subject: Subject) -> None:
    """Edit nothing in place: not the caller's inputs, not the tensors of events, not the cache."""
    tiny = stage(subject)
    inputs = tiny.inputs(prompts_for(subject.method))
    given = {name: value.clone() for name, value in inputs.items()}

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        watched = {**tensors_of(event), **_cache_of(event)}
        copies = {name: tensor.detach().clone() for name, tensor in watched.items()}
        with _lending(event, watched, copies):
            value = call()
        now = {**watched, **tensors_of(event)}
        for name, tensor in watched.items():
            if not (_equal(tensor, copies[name]) and _equal(now[name], copies[name])):
                fail(
                    f"{subject.name}.{where(item, event)} edits event.{name} in place; other methods and the model see "
                    f"it uncounted: return a new tensor (clone() first, or torch.where)"
                )
        return value

    generate([subject.method], tiny, inputs, around=around)
    for name, value in inputs.items():
        ensure(_equal(value, given[name]), f"{subject.name} edits the caller's {name} in place; work on a copy")


@contextmanager
def _lending(event: Event, watched: dict[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> Iterator[None]:
    """Watch the logits of branches too, from when the handler gets them: other methods may share the branch."""
    request = event.request
    lend, outer = request.branch_logits, vars(request).get("branch_logits")

    def branch_logits(key: str, name: str) -> torch.Tensor:
        logits = lend(key, name)
        watched[f"branch_logits({name!r})"], copies[f"branch_logits({name!r})"] = logits, logits.clone()
        return logits

    request.branch_logits = branch_logits  # type: ignore[method-assign]
    try:
        yield
    finally:
        del request.branch_logits
        if outer is not None:  # a handler inside a handler: of a pass that the outer one asked for
            request.branch_logits = outer  # type: ignore[method-assign]


def _cache_of(event: Event) -> dict[str, torch.Tensor]:
    layers = getattr(event.request.cache, "layers", ())
    known = [(index, layer) for index, layer in enumerate(layers) if getattr(layer, "keys", None) is not None]
    return {
        f"request.cache.layers[{i}].{part}": getattr(layer, part) for i, layer in known for part in ("keys", "values")
    }


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
