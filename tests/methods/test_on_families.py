"""Four methods at once on families with tiles, line breaks, windows and other masks, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from mitigate.core.stack import Stack
from mitigate.methods.clva import CLVA
from mitigate.methods.dleaf import DLEAF
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.testing.tiny import tiny_model
from tests.references import families

STEPS = 3
#: A question, and width and height of its pictures.
ASKED = (("are there two red cars", ((64, 24), (24, 40))), ("dog ?", ((40, 40),)))


def picture(width: int, height: int) -> Image.Image:
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(width * 100 + height))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return Image.fromarray((fine * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3", "paligemma", "llava_next"])
def test_a_stack_of_four_equals_brute_force(family: str) -> None:
    """Unequal pictures, several in a prompt, in a padded batch; every step's logits."""
    tiny = tiny_model(family)

    def inputs(asked: Any) -> dict[str, Any]:
        pictures = [[picture(*size) for size in sizes] for _, sizes in asked]
        return dict(tiny.adapter.inputs(tiny.model, tiny.processor, [text for text, _ in asked], pictures))

    batch = inputs(ASKED)
    methods = [SCR(lam=1.4, k_src=3), CLVA(alpha=1.5, beta=0.7), DLEAF(gamma=0.7), LocoRE(beta=0.5, window=12)]
    with Stack(methods).attach(tiny.model, tiny.processor) as handle:
        out = handle.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for row, asked in enumerate(ASKED):
        sample = families.Sample(tiny, inputs([asked]))
        hidden = families.scr(sample, 1.4, 3, ranking=(1, 2), edited=(0, 1))
        pull, read = families.clva(sample, 1.5, 0.7, early=0, middle=2, deep=3)
        weights = [read, families.dleaf(sample, 0.7), families.locore(sample, 0.5, 12)]
        tokens = out.sequences[row, batch["input_ids"].shape[1] :].tolist()
        plain = sample.forward(tokens[:-1])
        expected = sample.forward(tokens[:-1], scores=[pull], probs=weights, hidden=hidden)
        for step in range(1 + tokens.index(2) if 2 in tokens else STEPS):
            own, other = (logits[sample.length - 1 + step] for logits in (expected, plain))
            torch.testing.assert_close(out.logits[step][row], own, atol=1e-4, rtol=0)
            assert float((own - other).abs().max()) > 0.05
