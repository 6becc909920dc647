"""The family under mitigate: layout, parity with plain generate, what needs a raster is refused."""

import pytest
import torch
from mitigate.adapters import adapter_for
from mitigate.core.roles import Role
from mitigate.core.stack import Stack
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from PIL import Image

from mitigate_pocket.tiny import build

PROMPTS = ["is there a dog ?", "describe the cat and the dog please"]


def inputs(model, processor):
    pictures = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    return adapter_for(model).inputs(model, processor, PROMPTS, [pictures[:1], pictures[1:]])


def test_layout():
    """A picture is <Img>, six placeholders, </Img>."""
    model, processor = build()
    batch = inputs(model, processor)
    layout = adapter_for(model).layout(model, batch["input_ids"], batch["attention_mask"], batch, processor)
    assert [[(span.image, len(span.positions), span.grid) for span in row] for row in layout.images] == [
        [(0, 6, None)],
        [(1, 6, None), (2, 6, None)],
    ]
    for ids, roles in zip(batch["input_ids"], layout.roles, strict=True):
        assert set(ids[roles == Role.IMAGE].tolist()) == {4}
        assert set(ids[roles == Role.SEPARATOR].tolist()) == {5, 6}
    assert (batch["input_ids"][0, layout.after_image[0] - 1]) == 6


def test_prompts_of_another_processor_are_refused():
    model, processor = build()
    batch = inputs(model, processor)
    ids = batch["input_ids"].clone()
    ids[1, (ids[1] == 4).nonzero()[0]] = 20
    with pytest.raises(LayoutError, match="pocket_vl makes 6 of each image"):
        adapter_for(model).layout(model, ids, batch["attention_mask"], batch, processor)


def test_methods():
    model, processor = build()
    batch = inputs(model, processor)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**batch, **settings)
    with Stack([LocoRE(beta=0.0)]).attach(model, processor):
        assert torch.equal(model.generate(**batch, **settings), plain)
    with Stack([LocoRE(beta=0.9)]).attach(model, processor) as handle:
        handle.generate(**batch, **settings)
        assert all(row["locore"]["rows_edited"] > 0 for row in handle.telemetry())
    with pytest.raises(UnsupportedModel, match="scr needs image tokens that form a grid, but pocket_vl has none"):
        Stack([SCR()]).attach(model, processor).__enter__()
