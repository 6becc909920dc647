"""bf16 and fp16 on every family: finite numbers, and the tokens of single precision wherever it is sure of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from mitigate.core.stack import Stack
from mitigate.methods.clva import CLVA
from mitigate.methods.dleaf import DLEAF
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from mitigate.testing.tiny import TinyModel, tiny_families, tiny_model
from tests.adapters.test_families import options

STEPS = 4
#: Families take turns: one compares tokens in the first and ranks in the second, the next one the other way round.
HALF = (torch.bfloat16, torch.float16)
#: Without a method, and with two that choose nothing by a ranking, which rounding may turn round.
COMPARED = {"none": (), "locore+sgrs": (LocoRE(), SGRS(proposal="greedy_order", alpha=0.1))}


@cache
def sharpened(family: str, dtype: torch.dtype) -> TinyModel:
    """A tiny model whose likeliest token is well apart from the others."""
    tiny = tiny_model(family)
    with torch.no_grad():
        tiny.adapter.unembedding(tiny.model).weight.mul_(2.0)
    return tiny.cast(dtype)


@cache
def answer(family: str, dtype: torch.dtype, methods: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    tiny = sharpened(family, dtype)
    inputs = tiny.inputs()
    with Stack(list(methods)).attach(tiny.model, tiny.processor) as handle:
        output = handle.generate(**inputs, **options(family, max_new_tokens=STEPS))
    found = torch.stack(output.logits, 1).float()
    assert bool(found.isfinite().any(-1).all())
    assert not bool(found.isnan().any())
    return output.sequences[:, inputs["input_ids"].shape[1] :], found


@pytest.mark.parametrize("family", tiny_families())
def test_tokens_of_single_precision(family: str) -> None:
    """Tokens agree as long as single precision is surer than rounding moves the plain model's logits."""
    dtype = HALF[tiny_families().index(family) % 2]
    half, single = (answer(family, kind, ())[1][:, :1] for kind in (dtype, torch.float32))
    moved = torch.where(single > -1e4, half - single, 0.0)  # excluded tokens have the lowest number of the type
    noise = moved.abs().amax(-1).clamp_min(0.05)  # [B, 1]: a picture that becomes other codes is another picture
    compared = 0
    for methods in COMPARED.values():
        exact, logits = answer(family, torch.float32, methods)
        rounded, _ = answer(family, dtype, methods)
        top = logits.topk(2, -1).values
        sure = top[..., 0] - top[..., 1] > 3 * noise
        same = torch.ones(len(exact), dtype=torch.bool)
        for step in range(STEPS):
            ours, theirs = exact[:, step], rounded[:, step]
            assert bool((ours == theirs)[same & sure[:, step]].all()), (family, len(methods), step)
            compared += int((same & sure[:, step]).sum())
            same &= ours == theirs
    assert compared >= 3, f"single precision is sure of {compared} tokens only"


@pytest.mark.parametrize("family", tiny_families())
def test_methods_that_rank_stay_finite(family: str) -> None:
    methods: list[Any] = [DLEAF(), CLVA()]
    if tiny_model(family).facts.spatial_grid:
        methods.append(SCR(layers="1-2", diagnostic_layers="1-2"))
    answer(family, HALF[1 - tiny_families().index(family) % 2], (*methods, LocoRE()))
