"""A model over two devices: the bus, the operations and every method follow its tensors from part to part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from mitigate_vcd.vcd import VCD
from torch import nn

from mitigate.core import Access, Fidelity, Method, Point, Rows, Subscription, Tags
from mitigate.core.points import LAYER_POINTS
from mitigate.core.stack import Stack
from mitigate.registry import methods
from mitigate.testing.tiny import TinyModel, tiny_model
from tests.core.pretended_split import FIRST, SECOND, Mixed, TwoDevices, divide, put, where


@dataclass(frozen=True, kw_only=True)
class Everywhere(Method):
    """Writes at every point in and around the layers, in every row."""

    name: ClassVar[str] = "everywhere"
    summary: ClassVar[str] = "writes at every point"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    points: ClassVar[frozenset[Point]] = LAYER_POINTS - {Point.VISION, Point.LOGIT_LENS}
    tags: ClassVar[Tags] = Tags(reads=points | {Point.NEXT_TOKEN_LOGITS}, writes=points | {Point.NEXT_TOKEN_LOGITS})

    def subscriptions(self, model: Any) -> list[Subscription]:
        layers = {point: tuple(range(model.layers)) for point in sorted(self.points)} | {Point.NEXT_TOKEN_LOGITS: ()}
        return [
            Subscription(point=point, access=Access.WRITE, layers=wanted, rows=Rows.ALL, normalised=False)
            for point, wanted in layers.items()
        ]

    def on_attention_mask(self, event: Any, state: Any) -> torch.Tensor:
        bias: torch.Tensor = event.mask - torch.arange(event.mask.shape[-1], device=event.mask.device) % 3
        return bias

    def on_value_scale(self, event: Any, state: Any) -> torch.Tensor:
        return torch.full_like(event.values[..., 0], 0.9)

    def _scaled(self, event: Any, state: Any) -> torch.Tensor:
        names = ("scores", "probs", "heads", "mlp", "hidden", "logits")
        return 0.9 * next(getattr(event, name) for name in names if hasattr(event, name))

    on_attention_scores = on_attention_probs = on_head_output = on_mlp_output = _scaled
    on_hidden_states = on_next_token_logits = _scaled


OWN: dict[str, type[Method]] = {"vcd": VCD, "everywhere": Everywhere}
#: Stack -> its methods with their parameters, and arguments of ``generate``.
STACKS: dict[str, tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]] = {
    "none": ([], {}),
    "scr, dleaf": ([("scr", {}), ("dleaf", {})], {}),
    "clva": ([("clva", {"noise_source": "random", "gate": "bhattacharyya", "anchor_unit": "heads"})], {}),
    "clva, locore, beams": ([("clva", {"noise_source": "embedding"}), ("locore", {})], {"num_beams": 2}),
    "sgrs from the prompt's end": ([("sgrs", {"history_init": "prompt_tail"})], {}),
    "sgrs without a graph, locore": ([("sgrs", {"gradient": "direct"}), ("locore", {})], {}),
    "a branch": ([("vcd", {})], {}),
    "every point": ([("everywhere", {})], {}),
}
#: Where a device ends: layers by turns; in the middle, as ``device_map`` divides; before the first layer.
SPLITS: dict[str, Callable[[TinyModel, list[nn.Module]], list[nn.Module]]] = {
    "turns": lambda tiny, layers: layers[1::2],
    "halves": lambda tiny, layers: [
        *layers[2:],
        tiny.adapter.final_norm(tiny.model),
        tiny.adapter.unembedding(tiny.model),
    ],
    "all": lambda tiny, layers: layers,
}


def answered(tiny: TinyModel, stack: str) -> torch.Tensor:
    parts, options = STACKS[stack]
    made = [(OWN.get(name) or methods().get(name))(**values) for name, values in parts]
    inputs = {name: put(value, FIRST) for name, value in tiny.inputs().items()}
    with Stack(made).attach(tiny.model, tiny.processor) as handle:
        tokens: torch.Tensor = handle.generate(**inputs, max_new_tokens=3, do_sample=False, seed=1, **options)
        handle.telemetry()
    return tokens


@functools.cache
def whole(family: str, stack: str) -> list[list[int]]:
    tokens: list[list[int]] = answered(tiny_model(family), stack).tolist()
    return tokens


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("family", "stack"),
    [
        *(("llava", stack) for stack in STACKS),
        *(("qwen2_vl", stack) for stack in ("sgrs from the prompt's end", "a branch")),
        *((family, "clva, locore, beams") for family in ("gemma3", "internvl", "instructblip")),
    ],
)
def test_every_method_works_on_a_model_over_two_devices(family: str, stack: str, split: str) -> None:
    divided = tiny_model(family)
    divide(divided.model, SPLITS[split](divided, list(divided.adapter.decoder_layers(divided.model))))
    with TwoDevices():
        tokens = answered(divided, stack)
    assert tokens.tolist() == whole(family, stack)


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
