"""Ways to drive the methods and the references through the same decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation import LogitsProcessor

from mitigate.core.stack import Stack
from tests.references.tiny import EOS, PAD, make_inputs, split_rows

#: One picture; two with a word between; none: of different lengths, so that rows are padded on the left.
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 0, 5)]
GRID = 6

#: One sample of `split_rows`, its number, the tokens so far -> logits ``[V]`` of the next one.
Reference = Callable[[dict[str, Any], int, list[int]], torch.Tensor]


def batch(model: Any, prompts: Sequence[tuple[int, int, int]] = PROMPTS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded batch in the model's precision."""
    inputs = make_inputs(model, prompts, seed=seed)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def generate(model: Any, methods: Any, inputs: dict[str, Any], steps: int, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Generate with a stack; returns transformers' output with raw logits, and the telemetry."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    with Stack(methods).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=steps, pad_token_id=PAD, **settings)
        return out, handle.telemetry()


def fresh(out: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Return the generated tokens of every row, up to and with the end token."""
    rows = []
    for row in out.sequences[:, inputs["input_ids"].shape[1] :].tolist():
        rows.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return rows


class FromReference(LogitsProcessor):
    """Replaces the logits of transformers' own decoding by those of a reference, row by row, from scratch."""

    def __init__(self, inputs: dict[str, torch.Tensor], reference: Reference) -> None:
        self._width = inputs["input_ids"].shape[1]
        self._samples, self._reference = split_rows(inputs, GRID), reference

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        copies = len(input_ids) // len(self._samples)
        rows = []
        for row, ids in enumerate(input_ids[:, self._width :].tolist()):
            sample = row // copies
            if EOS in ids:  # finished: what is chosen is not looked at
                rows.append(scores[row])
                continue
            rows.append(self._reference(self._samples[sample], sample, ids).to(scores))
        # beam search works on log probabilities, sampling and greedy search do not mind them
        return torch.stack(rows).log_softmax(-1)


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """Count the forwards of a module: a list with the batch size of each."""
    sizes: list[int] = []
    hook = module.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        hook.remove()
