"""SCR against the naive implementation of its equations: every switch, several layouts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from mitigate.adapters import adapter_for
from mitigate.adapters.llava import LlavaAdapter
from mitigate.core.layout import ImageSpan
from mitigate.core.stack import Stack
from mitigate.methods.scr import SCR
from tests.references import naive_scr, runs
from tests.references.naive_scr import Tile
from tests.references.tiny import (
    EOS,
    IMAGE,
    PAD,
    full_forward,
    image_spans,
    make_inputs,
    split_rows,
    tiny_llava,
    tiny_processor,
)

#: Text after the image, two images, an image at the end, text between the images only; left padding.
PROMPTS = [(3, 1, 6), (2, 2, 4), (5, 1, 0), (1, 2, 0)]
#: Two pictures of 36 tokens: 4x9 patches, and 5x7 patches with a separator after them.
UNEQUAL = [[Tile(0, 4, 9)], [Tile(0, 5, 7)]]
#: A picture in two tiles side by side and a thumbnail, and one in tiles above each other with a separator in between.
TILED = [
    [Tile(0, 3, 4, (0, 0)), Tile(12, 3, 3, (0, 1)), Tile(21, 3, 5, thumbnail=True)],
    [Tile(0, 3, 5, (0, 0)), Tile(16, 4, 5, (1, 0))],
]
#: What method and reference call the same.
SHARED = ("lam", "k_src", "text_queries", "head_fraction", "exclude_border", "neighbourhood", "ownership", "tile_mode")
SHARED += ("multi_image",)


def generate(model, method, inputs, steps=6, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


def give_shape(monkeypatch, pictures, size=36):
    """Let the adapter see images of ``size`` tokens as these rasters."""

    def image_spans(self, row, batch):
        where = (row == IMAGE).nonzero().flatten()
        spans = []
        for image, tokens in enumerate(where.split(size)):
            number = batch.picture()[0]
            for tile in pictures[image]:
                positions = tokens[tile.first : tile.first + tile.rows * tile.columns]
                stop = int(tokens[-1]) + 1
                spans.append(ImageSpan(number, positions, (tile.rows, tile.columns), stop, tile.place, tile.thumbnail))
        return spans

    monkeypatch.setattr(LlavaAdapter, "image_spans", image_spans)


def generator_of(row, seed=0):
    """The generator of a sample's own draws, as documented: seed, sample id and copy."""
    digest = hashlib.sha256(f"{seed}:{row}:0".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def drawn(method, row, pictures):
    """What a sample draws: a rank for every patch of every image, then the seed of its noise."""
    generator, found = generator_of(row), {}
    if method.source_selection == "random":
        found["ranks"] = [
            torch.rand(sum(tile.rows * tile.columns for tile in tiles), generator=generator).tolist()
            for tiles in pictures
        ]
    if method.injection == "gaussian_noise":
        seed = int(torch.randint(2**62, (), generator=generator))
        found["noise"] = lambda layer, n, width: torch.randn(
            n, width, generator=torch.Generator().manual_seed(seed + layer)
        )
    return found


def expect(model, method, inputs, out, steps=6, pictures=None, layers=range(3), ranking=range(1, 4), **more):
    """Compare a batch with the reference, sample by sample."""
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    settings = {name: getattr(method, name) for name in SHARED}
    for row, sample in enumerate(split_rows(inputs, 6)):
        geometry = (pictures or [[Tile(0, 6, 6)]] * 2)[: len(sample["pixel_values"])]
        tokens, logits = naive_scr.generate(
            model,
            **sample,
            **settings,
            **drawn(method, row, geometry),
            geometry=geometry,
            early_layers=layers,
            diag_layers=ranking,
            max_new_tokens=steps,
            eos=(EOS,),
            **{name: value[row] for name, value in more.items()},
        )
        assert fresh[row, : len(tokens)].tolist() == tokens
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


SWITCHES = [
    {},
    {"k_src": 99},
    {"k_src": 2, "neighbourhood": "radius2"},
    {"k_src": 5, "neighbourhood": "4"},
    {"k_src": 99, "neighbourhood": "4", "ownership": "greedy_nms"},
    {"ownership": "greedy_nms"},
    {"ownership": "greedy_nms", "neighbourhood": "radius2", "exclude_border": False},
    {"exclude_border": False},
    {"text_queries": "last"},
    {"head_fraction": 0.5},
    {"head_fraction": 0.2, "text_queries": "last", "multi_image": "pooled"},
    {"head_fraction": 0.3},  # 1.2 of 4 heads are 2
    {"multi_image": "pooled", "k_src": 6},
    {"source_selection": "random"},
    {"source_selection": "random", "multi_image": "pooled", "k_src": 5, "exclude_border": False},
    {"injection": "gaussian_noise"},
    {"injection": "gaussian_noise", "source_selection": "random", "neighbourhood": "4"},
]


@pytest.mark.parametrize("shape", ["square", "unequal"])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())) or "default")
def test_equals_naive_full_sequence(monkeypatch, switches, shape):
    """Grouped-query attention, left padding, one and two images, an image at the end, square and other grids."""
    seed = SWITCHES.index(switches)
    model = tiny_llava(seed=seed)
    inputs = make_inputs(model, PROMPTS, seed=seed)
    method = SCR(**{"lam": 1.6, "k_src": 3, "layers": "0-2", "diagnostic_layers": "1-3"} | switches)
    if shape == "unequal":
        give_shape(monkeypatch, UNEQUAL)
    out, _ = generate(model, method, inputs)
    expect(model, method, inputs, out, pictures=UNEQUAL if shape == "unequal" else None)


@pytest.mark.parametrize("multi_image", ["independent", "pooled"])
@pytest.mark.parametrize("tile_mode", ["pooled", "per_tile_k", "stitched"])
def test_tiles_equal_naive(monkeypatch, tile_mode, multi_image):
    model = tiny_llava(seed=4)
    inputs = make_inputs(model, PROMPTS, seed=4)
    give_shape(monkeypatch, TILED)
    method = SCR(lam=1.6, k_src=2, layers="0-2", diagnostic_layers="1-3", tile_mode=tile_mode, multi_image=multi_image)
    out, _ = generate(model, method, inputs)
    expect(model, method, inputs, out, pictures=TILED)


def test_thumbnails_only_equal_naive(monkeypatch):
    model = tiny_llava(seed=4)
    inputs = make_inputs(model, [(3, 1, 6), (2, 2, 4)], seed=4)
    pictures = [TILED[0], [Tile(0, 4, 9)]]  # the second picture is in one piece: its own thumbnail
    give_shape(monkeypatch, pictures)
    method = SCR(lam=1.6, k_src=2, layers="0-2", diagnostic_layers="1-3", tile_mode="thumbnail_only")
    out, telemetry = generate(model, method, inputs)
    expect(model, method, inputs, out, pictures=pictures)
    assert [sample["scr"]["sources"] for sample in telemetry] == [2, 4]


def test_once_edits_the_first_of_the_layers():
    model = tiny_llava(seed=7)
    inputs = make_inputs(model, PROMPTS, seed=7)
    method = SCR(lam=1.9, k_src=3, layers="1-3", diagnostic_layers="1-3", schedule="once")
    out, _ = generate(model, method, inputs)
    expect(model, method, inputs, out, layers=[1])


def test_equals_naive_to_1e_5():
    """In float64, where the reference's own rounding does not count; norms and rotary angles stay float32."""
    model = tiny_llava(seed=5).double()
    inputs = make_inputs(model, PROMPTS, seed=5)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out, _ = generate(model, SCR(lam=1.6, k_src=5, layers="0-2", diagnostic_layers="1-3"), inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, logits = naive_scr.generate(
            model, **sample, lam=1.6, k_src=5, early_layers=range(3), diag_layers=range(1, 4),
            max_new_tokens=6, eos=(EOS,),
        )  # fmt: skip
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        torch.testing.assert_close(ours, logits.float(), rtol=0, atol=1e-5)


def test_question_only_equals_naive():
    """The user's words as the chat template places them: all that follows the image except the template's end."""
    model = tiny_llava(seed=6)
    processor = tiny_processor(model.config)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    pictures = [[Image.fromarray(each)] for each in pixels]
    words = ["Is there a red car in the image ?", "Describe this image ."]
    inputs = dict(adapter_for(model).inputs(model, processor, words, pictures))
    method = SCR(lam=1.8, k_src=3, layers="0-2", diagnostic_layers="1-3", text_queries="question_only")
    with Stack([method]).attach(model, processor) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    questions = []
    for row, text in enumerate(words):
        ids = inputs["input_ids"][row]
        valid = int(inputs["attention_mask"][row].sum())
        count = len(text.split())
        assert processor.tokenizer.decode(ids[length - 2 :]) == "ASSISTANT :"
        assert processor.tokenizer.decode(ids[length - 2 - count : length - 2]) == text
        questions.append(range(valid - 2 - count, valid - 2))
    expect(model, method, inputs, out, question=questions)


# ------------------------------------------------------------------------------------------------- what is counted


def naive_roles(model, sample, row, method, pictures=None):
    geometry = (pictures or [[Tile(0, 6, 6)]] * 2)[: len(sample["pixel_values"])]
    settings = {name: getattr(method, name) for name in SHARED if name != "lam"}
    ranks = {name: value for name, value in drawn(method, row, geometry).items() if name == "ranks"}
    return naive_scr.roles(model, **sample, **settings, **ranks, geometry=geometry, diag_layers=range(1, 4))


@pytest.mark.parametrize("selection", ["attention", "random"])
def test_counters_equal_naive(monkeypatch, selection):
    model = tiny_llava(seed=8)
    inputs = make_inputs(model, PROMPTS, seed=8)
    give_shape(monkeypatch, UNEQUAL)
    method = SCR(lam=1.4, k_src=4, layers="0-2", diagnostic_layers="1-3", source_selection=selection, entropy="norm")
    _, telemetry = generate(model, method, inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        counted = telemetry[row]["scr"]
        ids, images = sample["input_ids"], len(sample["pixel_values"])
        chosen = naive_roles(model, sample, row, method, UNEQUAL)
        assert counted["sources"] == sum(len(sources) for sources, _ in chosen)
        assert counted["neighbours"] == sum(len(owners) for _, owners in chosen)
        spans = image_spans(model, ids, images)
        patches = [p for span, tiles in zip(spans, UNEQUAL, strict=False) for p in span[: 36 - (tiles is UNEQUAL[1])]]
        growth = (0.0, 0.0)
        if counted["sources"]:
            growth = naive_scr.growth(model, **sample, chosen=chosen, lam=1.4, early_layers=range(3), patches=patches)
        assert counted["norm_growth"] == pytest.approx(growth[0], rel=1e-4)
        assert counted["norm_growth_visual"] == pytest.approx(growth[1], rel=1e-4)
        if selection == "random":
            assert not {"attention_entropy", "images_ranked", "extra_forwards"} & counted.keys()
            continue
        maps = naive_scr.patch_scores(
            model, ids, sample["pixel_values"], diag_layers=range(1, 4), geometry=UNEQUAL[:images]
        )
        ranked = [scores for scores in maps if scores is not None]
        entropies = [naive_scr.entropy(scores.values()) for scores in ranked]
        hidden = torch.stack(full_forward(model, ids, sample["pixel_values"], collect=True).hidden[:3])
        norms = [naive_scr.entropy(hidden[:, list(s)].norm(dim=-1).mean(0).tolist()) for s in ranked]
        assert counted["images_ranked"] == len(ranked)
        assert counted["attention_entropy"] == pytest.approx(np.mean(entropies) if ranked else 0.0, rel=1e-4)
        assert counted["norm_entropy"] == pytest.approx(np.mean(norms) if ranked else 0.0, rel=1e-4)
        assert counted["extra_forwards"] == bool(ranked)  # no text after any picture: nothing to ask


def test_trace_says_who_gives_to_whom():
    model = tiny_llava(seed=9)
    inputs = make_inputs(model, PROMPTS, seed=9)
    method = SCR(lam=1.5, k_src=3, layers="0-2", diagnostic_layers="1-3")
    with Stack([method]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=2, pad_token_id=PAD, trace=True)
        (trace,) = handle.trace()
        entropies = [sample["scr"]["attention_entropy"] for sample in handle.telemetry()]
    assert (trace.method, trace.phase, trace.step, trace.layer) == ("scr", "prefill", 0, None)
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    for row, sample in enumerate(split_rows(inputs, 6)):
        chosen = naive_roles(model, sample, row, method)
        assert trace.values["sources"][row] == [pads[row] + s for sources, _ in chosen for s in sources]
        owners = {pads[row] + n: pads[row] + s for _, owned in chosen for n, s in owned.items()}
        assert trace.values["neighbours"][row] == sorted(owners)
        assert trace.values["owners"][row] == [owners[n] for n in sorted(owners)]
    assert trace.values["entropy"][:2] == pytest.approx(entropies[:2])
    assert np.isnan(trace.values["entropy"][2])
