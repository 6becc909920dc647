"""A model over two devices: the bus, the operations and every method follow its tensors from part to part."""

from __future__ import annotations

import pytest
import torch

from mitigate.core.stack import Stack
from mitigate.registry import methods
from mitigate.testing.tiny import TinyModel, tiny_model
from tests.core.pretended_split import FIRST, SECOND, Mixed, TwoDevices, divide, put, where

STACKS = {
    "none": [],
    "locore": ["locore"],
    "scr": ["scr"],
    "dleaf": ["dleaf"],
    "clva": ["clva"],
    "sgrs": ["sgrs"],
    "forward-only": ["sgrs:forward-only"],
    "three": ["locore", "scr", "sgrs"],
}


def answered(tiny: TinyModel, names: list[str]) -> torch.Tensor:
    made = []
    for name in names:
        plugin, _, preset = name.partition(":")
        kind = methods().get(plugin)
        made.append(kind(**kind.presets[preset]) if preset else kind())
    inputs = {name: put(value, FIRST) for name, value in tiny.inputs().items()}
    with Stack(made).attach(tiny.model, tiny.processor) as handle:
        tokens: torch.Tensor = handle.generate(**inputs, max_new_tokens=3, do_sample=False, seed=1)
        handle.telemetry()
    return tokens


@pytest.mark.parametrize("stack", STACKS)
def test_every_method_works_on_a_model_over_two_devices(stack: str) -> None:
    whole = answered(tiny_model("llava"), STACKS[stack])
    divided = tiny_model("llava")
    layers = list(divided.adapter.decoder_layers(divided.model))
    divide(divided.model, layers[1::2])
    with TwoDevices():
        tokens = answered(divided, STACKS[stack])
    assert tokens.tolist() == whole.tolist()


def test_what_would_fail_on_two_gpus_fails_here() -> None:
    with TwoDevices():
        one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert (one.device, (one * 2).device, one[:1].device) == (FIRST, FIRST, FIRST)
        assert where(other.to(one.device)) == FIRST
        assert where(other) == SECOND
        with pytest.raises(Mixed, match="add"):
            _ = one + other
        with pytest.raises(Mixed, match="CPU"):
            _ = one + torch.ones(2)
        assert (one + other.to(one.device)).device == FIRST
