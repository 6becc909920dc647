"""LLaVA-1.5 and ViP-LLaVA: every position holds its patch, with every tower that is served."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from mitigate.adapters.llava import LlavaAdapter, VipLlavaAdapter
from mitigate.errors import UnsupportedModel
from mitigate.testing import tiny_llava, tiny_vipllava
from tests.adapters.anyres import embedded, picture

IMAGE, SIDE = 4, 5


def with_tower(kind, strategy):
    """The tiny LLaVA on another tower, which sees the same 5 x 5 patches."""
    config = tiny_llava.build()[0].config
    sizes = {name: getattr(config.vision_config, name) for name in ("hidden_size", "image_size", "patch_size")}
    tower = kind(**sizes, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    changed = LlavaConfig(
        vision_config=tower,
        text_config=config.text_config,
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(changed)


def places(model, class_tokens):
    """What the columns of two pictures hold: the number of each token as it leaves the tower's projector."""
    pixels = tiny_llava.build()[1].image_processor([picture(20, 20), picture(30, 20)], return_tensors="pt")
    count = SIDE * SIDE + class_tokens
    ids = torch.tensor([[7, 8, *[IMAGE] * count, 9], [7, *[IMAGE] * count, 9, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    marks = embedded(model, inputs, lambda shape: torch.arange(float(shape[1])).repeat(shape[0], 1)[..., None])
    return inputs, marks[..., 0]


@pytest.mark.parametrize(
    ("adapter", "model", "class_tokens"),
    [
        (LlavaAdapter(), lambda: with_tower(CLIPVisionConfig, "default"), 0),
        (LlavaAdapter(), lambda: with_tower(CLIPVisionConfig, "full"), 1),
        (LlavaAdapter(), lambda: with_tower(SiglipVisionConfig, "full"), 0),
        (VipLlavaAdapter(), lambda: tiny_vipllava.build()[0], 0),
    ],
)
def test_every_position_holds_its_patch(adapter, model, class_tokens):
    model = model()
    inputs, held = places(model, class_tokens)
    layout = adapter.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)
    for row, (span,) in enumerate(layout.images):
        assert (span.image, span.grid) == (row, (SIDE, SIDE))
        assert held[row, span.positions].tolist() == list(range(class_tokens, SIDE * SIDE + class_tokens))
    assert len(adapter.vision_layers(model)) == 2


def test_a_tower_that_loses_a_patch_is_refused():
    model = with_tower(SiglipVisionConfig, "default")
    ids = torch.tensor([[1, *[IMAGE] * (SIDE * SIDE - 1)]])
    with pytest.raises(UnsupportedModel, match="first patch is dropped"):
        LlavaAdapter().layout(model, ids, None, {})
