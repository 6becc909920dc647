"""The packaged model through the same promises as the random ones: parity, batches, every preset stack."""

from __future__ import annotations

import pytest
import torch

from mitigate import Stack, load_model
from mitigate.compose import compose_run
from mitigate.testbed.draw import draw
from mitigate.testbed.language import CAPTION_PROMPT
from mitigate.testbed.world import OBJECTS, scene

STACKS = ("locore", "scr", "sgrs", "sgrs+locore", "control_probe", "control_random")


@pytest.fixture(scope="module")
def loaded():
    return load_model("testbed")


def batch(loaded, count=8):
    """Captions and questions mixed: prompts of different lengths, so that rows are padded on the left."""
    prompts = [CAPTION_PROMPT if index % 2 else f"Is there a {OBJECTS[index]} in the image?" for index in range(count)]
    pictures = [[draw(scene("validation", index))] for index in range(count)]
    return loaded.inputs(prompts, pictures), [
        loaded.inputs([prompt], [picture]) for prompt, picture in zip(prompts, pictures, strict=True)
    ]


@pytest.mark.parametrize(
    "decoding",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_empty_stack_is_plain_generate(loaded, decoding):
    inputs, _ = batch(loaded)
    assert not inputs["attention_mask"].all()
    torch.manual_seed(1)
    expected = loaded.model.generate(**inputs, max_new_tokens=24, **decoding)
    with Stack().attach(loaded.model, loaded.processor) as handle:
        for generate in (loaded.model.generate, handle.generate):
            torch.manual_seed(1)
            assert torch.equal(generate(**inputs, max_new_tokens=24, **decoding), expected)


@pytest.mark.parametrize("name", STACKS)
def test_batch_equals_one_by_one(loaded, name):
    inputs, singles = batch(loaded)
    start = inputs["input_ids"].shape[1]
    names = [f"sample {index}" for index in range(8)]
    with Stack(compose_run([f"stack={name}"]).methods).attach(loaded.model, loaded.processor) as handle:
        tokens = handle.generate(**inputs, max_new_tokens=32, seed=3, sample_ids=names)[:, start:]
        telemetry = handle.telemetry()
        for row, single in enumerate(singles):
            own = handle.generate(**single, max_new_tokens=32, seed=3, sample_ids=[names[row]])
            own = own[0, single["input_ids"].shape[1] :]
            assert tokens[row, : len(own)].tolist() == own.tolist()
            for key, counters in handle.telemetry()[0].items():
                for counter in counters.keys() - {"seconds"}:
                    assert telemetry[row][key][counter] == pytest.approx(counters[counter], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", STACKS)
def test_logits_are_bit_identical_after_leaving(loaded, name):
    inputs, _ = batch(loaded, 3)
    before = loaded.model(**inputs).logits
    with Stack(compose_run([f"stack={name}"]).methods).attach(loaded.model, loaded.processor) as handle:
        handle.generate(**inputs, max_new_tokens=8)
    assert torch.equal(loaded.model(**inputs).logits, before)
    assert "generate" not in vars(loaded.model)
