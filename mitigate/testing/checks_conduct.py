"""Checks on a tiny model: a method remembers nothing between samples, draws from its seed, and says nothing."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mitigate.core.stack import Stack
from mitigate.testing import snapshots
from mitigate.testing.base import Subject, check, ensure
from mitigate.testing.running import (
    REFUSALS,
    SINGLE,
    Outcome,
    apart,
    generate,
    generate_with,
    prompts_for,
    quiet,
    stage,
)
from mitigate.testing.tiny import Prompt, TinyModel

#: Other samples: the same words with another picture, the same picture with other words, no picture.
_OTHERS = (
    Prompt(SINGLE[0].text, (9,)),
    Prompt("is the dog near the chair", SINGLE[0].pictures),
    Prompt("what is on the table"),
)


@check(needs_model=True)
def check_no_state_leak(subject: Subject) -> None:
    """Give a sample the same result whatever samples came before it and whatever other instances ran."""
    tiny, method = stage(subject), subject.method
    before, inputs = snapshots.of_method(method), tiny.inputs(SINGLE)
    others = [(other, tiny.inputs([other])) for other in _OTHERS]
    expected = [generate([copy.deepcopy(method)], tiny, given) for _, given in others]
    alone = generate([method], tiny, inputs)
    with quiet(), Stack([method]).attach(tiny.model, tiny.processor) as handle:
        for (other, given), own in zip(others, expected, strict=True):
            pair = generate_with(handle, tiny, given), generate_with(handle, tiny, inputs)
            _ensure_alike(subject, own, pair[0], "after others")
            _ensure_alike(subject, alone, pair[1], f"after the sample {other}")
            if other.pictures != SINGLE[0].pictures:  # what is kept of one picture is not another's
                _ensure_counts(subject, alone, pair[1], other)
    with contextlib.suppress(*REFUSALS):  # the defaults need not serve this model
        generate([type(method)()], tiny, others[0][1])
    _ensure_alike(subject, alone, generate([method], tiny, inputs), "after another instance of the class ran")
    found = snapshots.differences(before, snapshots.of_method(method))
    ensure(
        not found,
        f"{subject.name} remembers between requests: {'; '.join(found[:3])}. Keep it on `state`, which lives as long "
        f"as a request, or in request.shared(key, compute)",
    )


def _ensure_alike(subject: Subject, alone: Outcome, again: Outcome, when: str) -> None:
    place = apart(alone, again)
    ensure(
        not place,
        f"{subject.name} gives a sample another result {when} than alone: {place}. Keep what belongs to a request on "
        f"`state`; a key of request.shared must name everything its value depends on",
    )


def _ensure_counts(subject: Subject, alone: Outcome, again: Outcome, other: Prompt) -> None:
    mine, now = (outcome.telemetry[0][subject.name] for outcome in (alone, again))
    wrong = [key for key in mine if key != "seconds" and not key.startswith("extra_") and mine[key] != now.get(key)]
    ensure(
        not wrong,
        f"{subject.name} counts {', '.join(wrong[:3])} otherwise after the sample {other} than alone: a key of "
        f"request.shared must name everything its value depends on, such as request.image_key(image)",
    )


@check(needs_model=True)
def check_deterministic(subject: Subject) -> None:
    """Give the same result for the same seed, and leave the global random states alone."""
    tiny, method = stage(subject), subject.method
    inputs, results = tiny.inputs(SINGLE), []
    for seed in (1, 2):
        with _random_states_of(seed):
            before = snapshots.random_states()
            results.append(generate([method], tiny, inputs, seed=5))
            drawn = snapshots.differences(before, snapshots.random_states())
        ensure(not drawn, f"{subject.name} moves {'; '.join(drawn)}; draw from request.generators, one per sample")
    place = apart(results[0], results[1])
    ensure(
        not place,
        f"{subject.name} gives another result with the same seed: {place}. Draw from request.generators, one per "
        f"sample, and from nothing else",
    )
    if not method.tags.stochastic:
        place = apart(results[0], generate([method], tiny, inputs, seed=6))
        ensure(not place, f"{subject.name} depends on the seed: {place}. Set tags.stochastic, or draw nothing")


@contextmanager
def _random_states_of(seed: int) -> Iterator[None]:
    """Set the process's random generators for a while."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


@check(needs_model=True)
def check_quiet(subject: Subject) -> None:
    """Print nothing, warn of nothing but what a family lacks for the method, and log nothing while running."""
    tiny = stage(subject)
    usual = _said(subject, tiny, plain=True)
    lacking = f"warns: {subject.name}: {tiny.family} "
    new = [line for line in _said(subject, tiny, plain=False) if line not in usual and not line.startswith(lacking)]
    ensure(
        not new,
        f"{subject.name} {'; '.join(new[:2])}. Report through state.trace and state.count; refuse what cannot be right",
    )


def _said(subject: Subject, tiny: TinyModel, *, plain: bool) -> list[str]:
    """Generate and return what was printed, warned of and logged meanwhile."""
    inputs, lines, listener, root = tiny.inputs(prompts_for(subject.method)), io.StringIO(), _Listener(), logging.root
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(lines),
            contextlib.redirect_stderr(lines),
        ):
            warnings.simplefilter("always")
            with Stack([] if plain else [subject.method]).attach(tiny.model, tiny.processor) as handle:
                generate_with(handle, tiny, inputs)
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    printed = [f"prints {line!r}" for line in lines.getvalue().splitlines() if line.strip()]
    return [*printed, *(f"warns: {warning.message}" for warning in warned), *listener.said]


class _Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(f"logs: {record.name}: {record.getMessage()}")


@check(needs_model=True)
def check_trace(subject: Subject) -> None:
    """Give the same result when traced, and report plain values only."""
    tiny, method = stage(subject), subject.method
    inputs = tiny.inputs(prompts_for(method))
    traced = generate([method], tiny, inputs, trace=True)
    place = apart(generate([method], tiny, inputs), traced)
    ensure(not place, f"{subject.name} gives another result when it is traced: {place}. state.trace only reports")
    for trace in traced.traces:
        for name, value in trace.values.items():
            ensure(
                _is_plain(value),
                f"{subject.name} traces {name}={type(value).__name__} at step {trace.step}; give state.trace tensors "
                f"or plain values",
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    return value is None or isinstance(value, bool | int | float | str)
