"""Checks on a tiny model: batches, padding, caches and dtypes change nothing but the rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from mitigate.core import Event, Selection
from mitigate.core.plan import BoundSubscription
from mitigate.errors import HookError, StackConflict
from mitigate.testing.base import Skip, Subject, check, ensure, fail
from mitigate.testing.devices import PretendedDevice, Strayed, is_stray
from mitigate.testing.running import (
    PROMPTS,
    REFUSALS,
    TOLERANCE,
    Outcome,
    apart,
    generate,
    prompts_for,
    record,
    stage,
    usable,
    where,
)
from mitigate.testing.tiny import TinyModel

_DTYPES = (torch.bfloat16, torch.float16, torch.float64)
_WAYS: dict[str, dict[str, Any]] = {
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 17},
}
#: Columns of padding that are put before a prompt.
_PADDING = (1, 13)
_LAYOUT = "take positions from event.layout (valid, image_mask, after_image, images), per row, and never as numbers"


@check(needs_model=True)
def check_batch(subject: Subject) -> None:
    """Give every sample of a padded batch what it gets alone; or refuse batches, if tags.batch is False."""
    tiny, method = stage(subject), subject.method
    names = [f"sample {index}" for index in range(len(PROMPTS))]
    if not method.tags.batch:
        return _refuses_batches(subject, tiny)
    given = list(zip(PROMPTS, names, strict=True))
    first = generate([method], tiny, tiny.inputs(PROMPTS[:1]), seed=3, sample_ids=names[:1])
    ends = [int(first.tokens[0, 1])]  # the first sample ends early, the others go on
    singles = [
        generate([method], tiny, tiny.inputs([prompt]), seed=3, sample_ids=[name], ends=ends) for prompt, name in given
    ]
    batch = generate([method], tiny, tiny.inputs(PROMPTS), seed=3, sample_ids=names, ends=ends)
    for row, alone in enumerate(singles):
        place = apart(_until(alone, ends), _until(batch.row(row), ends), TOLERANCE)
        ensure(
            not place,
            f"{subject.name}: prompt {row} ({PROMPTS[row].text!r}) gets another result in a left-padded batch than "
            f"alone, {place}: {_LAYOUT}; or set tags.batch=False",
        )
        mine, other = (outcome.telemetry[0][subject.name] for outcome in (alone, batch.row(row)))
        own = [key for key in {**mine, **other} if key != "seconds" and not key.startswith("extra_")]
        for key in own:  # samples of a batch share the passes
            here, there = mine.get(key, 0.0), other.get(key, 0.0)
            ensure(
                math.isclose(here, there, rel_tol=TOLERANCE, abs_tol=TOLERANCE),
                f"{subject.name} counts {key}={there:g} for prompt {row} ({PROMPTS[row].text!r}) in a batch, {here:g} "
                f"alone: count per sample, and only where event.row_mask or ~event.request.finished says so",
            )
    return None


def _refuses_batches(subject: Subject, tiny: TinyModel) -> None:
    try:
        generate([subject.method], tiny, tiny.inputs(PROMPTS))
    except StackConflict:
        return
    fail(f"{subject.name} says tags.batch=False, but a batch was accepted")


def _until(outcome: Outcome, ends: list[int]) -> Outcome:
    """Cut a sample after its first end token."""
    tokens = outcome.tokens[0].tolist()
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return Outcome(outcome.tokens[:, :stop], outcome.logits[:, :stop], outcome.telemetry, outcome.traces)


@check(needs_model=True)
def check_padding(subject: Subject) -> None:
    """Give a prompt the same result however much padding stands before it."""
    tiny, method = stage(subject), subject.method
    for prompt in (*PROMPTS[:2], PROMPTS[-1]):  # with and without a picture, and with next to nothing after it
        inputs = tiny.inputs([prompt])
        expected = generate([method], tiny, inputs)
        for columns in _PADDING:
            place = apart(expected, generate([method], tiny, tiny.padded(inputs, columns)), TOLERANCE)
            ensure(
                not place,
                f"{subject.name}: {columns} columns of padding before {prompt.text!r} change its result at {place}: "
                f"{_LAYOUT}",
            )


@check(needs_model=True)
def check_cache(subject: Subject) -> None:
    """Give the same with and without a cache, and when the prompt comes in chunks; or refuse those."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(prompts_for(method))
    plain, expected, served = generate([], tiny, inputs), generate([method], tiny, inputs), []
    for how, options in _WAYS.items():
        try:
            alone = generate([], tiny, inputs, **options)
        except (ValueError, RuntimeError):
            continue  # the model alone cannot
        if apart(plain, alone, TOLERANCE):
            continue  # prompt tokens see later ones: to the model alone this is another prompt
        try:
            place = apart(expected, generate([method], tiny, inputs, **options), TOLERANCE)
        except REFUSALS:
            continue
        served.append(how)
        ensure(
            not place,
            f"{subject.name}: {how} the result differs at {place}. Without a cache every row is computed in every "
            f"step: subscribe with rows=Rows.PREDICTORS, and edit each row as when it was the last one",
        )
    if not served:
        raise Skip("generates neither without a cache nor in chunks")


@check(needs_model=True)
def check_dtypes(subject: Subject) -> None:
    """Work in bfloat16, float16 and float64: finite logits, and values in the dtype they came in."""
    tiny, method = stage(subject), subject.method
    for dtype in _DTYPES:
        outcome, calls = record([method], small := tiny.cast(dtype), small.inputs(prompts_for(method)), steps=3)
        for call in calls:
            for old, new in call.pairs():
                ensure(
                    new.dtype is old.dtype,
                    f"{subject.name}.{call.where} returns {new.dtype} for {old.dtype} in a {dtype} model; "
                    f"return value.to(event tensor's dtype)",
                )
        ensure(usable(outcome.logits), f"{subject.name}: logits of a {dtype} model are not finite")


@check(needs_model=True)
def check_device(subject: Subject) -> None:
    """Make tensors on the device of the event's, and return values there: on an accelerator nothing else works."""
    tiny, method = stage(subject), subject.method
    running = ""

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        nonlocal running
        running = f"{subject.name}.{where(item, event)}"
        with PretendedDevice():
            value = call()
        parts = [value.token, value.chosen] if isinstance(value, Selection) else [value]
        for part in parts:
            if isinstance(part, torch.Tensor) and (is_stray(part) or part.device != event.request.ids.device):
                fail(f"{running} returns a tensor that is not on the event's device; {_DEVICE}")
        return value

    try:
        generate([method], tiny, tiny.inputs(prompts_for(method)), around=around)
    except HookError as error:
        if not isinstance(error.__cause__, Strayed):
            raise
        fail(f"{running} mixes tensors of two devices in {error.__cause__}; {_DEVICE}")


_DEVICE = "give device=... of the event's tensors to every tensor you make, and move with .to(tensor.device)"
