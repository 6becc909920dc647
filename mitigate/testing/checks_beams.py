"""A check on beam search, in which a row's past is not always that of the same place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mitigate.core import Event, Method
from mitigate.core.plan import BoundSubscription
from mitigate.errors import ConfigError
from mitigate.testing.base import Skip, Subject, check, ensure
from mitigate.testing.running import PROMPTS, TOLERANCE, generate, stage
from mitigate.testing.tiny import Prompt, TinyModel

_BEAMS = 3
_STEPS = 6

_Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@check(needs_model=True)
def check_beams(subject: Subject) -> None:
    """Give a sequence in a beam search the scores it gets when its tokens come one by one; or refuse beams."""
    tiny, method = stage(subject), subject.method
    prompts = PROMPTS[: 2 if method.tags.batch else 1]
    for row, (words, scores) in enumerate(_searched(method, tiny, prompts)):
        alone = _forced(method, tiny, prompts[row // _BEAMS], words)
        seen = scores.isfinite() & alone.isfinite()
        gap = float((scores - alone)[seen].abs().max()) if bool(seen.any()) else 0.0
        ensure(
            gap <= TOLERANCE,
            f"{subject.name}: in a beam search, beam {row % _BEAMS} of prompt {row // _BEAMS} gets other scores than "
            f"its tokens one by one (by up to {gap:.2g}): rows change places between steps. What is kept from step to "
            f"step for every row belongs on state.per_row",
        )


def _searched(method: Method, tiny: TinyModel, prompts: Sequence[Prompt]) -> list[tuple[Tensor, Tensor]]:
    """Return for every beam before the last step its tokens so far, and the scores of the next one ``[V]``."""
    inputs = tiny.inputs(prompts)
    seen: list[tuple[Tensor, Tensor]] = []
    drawn = False

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids[:, inputs["input_ids"].shape[1] :], scores))
        return scores

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        nonlocal drawn
        value = call()
        drawn = drawn or event.request.has_drawn
        return value

    try:
        _generate(method, tiny, inputs, watch, num_beams=_BEAMS, around=around)
    except ConfigError as refusal:
        raise Skip(f"refuses beams: {refusal}") from refusal
    if drawn and method.tags.stochastic:
        raise Skip("draws random numbers, which stay with the place of a row")
    return list(zip(*seen[-1], strict=True))


def _forced(method: Method, tiny: TinyModel, prompt: Prompt, words: Tensor) -> Tensor:
    """Return the scores ``[V]`` after a prompt and tokens that come one by one."""
    seen: list[Tensor] = []

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        step = len(seen)
        seen.append(scores.log_softmax(-1)[0])
        if step == len(words):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, words[step : step + 1], 0.0)

    _generate(method, tiny, tiny.inputs((prompt,)), force)
    return seen[len(words)]


def _generate(
    method: Method, tiny: TinyModel, inputs: Mapping[str, Tensor], processor: _Processor, **options: Any
) -> None:
    ends = [tiny.pad_token]  # a search needs one
    generate([method], tiny, inputs, steps=_STEPS, ends=ends, logits_processor=[processor], **options)
