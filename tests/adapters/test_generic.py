"""The generic adapter: layouts it derives for families without an adapter, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mitigate_vcd.vcd import VCD
from PIL.Image import Image
from PIL.Image import new as picture_of
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    Gemma4Config,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    HyperCLOVAXConfig,
    HyperCLOVAXModel,
    LlamaConfig,
    MiniMaxM3VLConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PixtralVisionConfig,
    ProcessorMixin,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from mitigate.adapters import adapter_for
from mitigate.adapters.generic import GenericAdapter
from mitigate.adapters.processors import pictures_only
from mitigate.core import Access, Fidelity, Method, Point, Subscription, Tags
from mitigate.core.direct import DirectPath
from mitigate.core.roles import Role
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from mitigate.registry import methods
from mitigate.testing.tiny_words import SPECIAL_IDS, randomise, tokenizer

WIDTH = 32
VISION = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    **VISION,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    **SPECIAL_IDS,
}
#: A wide picture; a tall and a square one.
PICTURES = [[(40, 20)], [(30, 60), (50, 50)]]
PROMPTS = ["is there a dog ?", "describe the cat and the dog please"]


def template(image: str) -> str:
    return (
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
    )


def built(kind: Any, config: Any, special: int) -> Any:
    model = kind(config)
    randomise(model, 0, range(4 + special))
    return model.float().eval().requires_grad_(False)


def deepseek_vl() -> tuple[Any, Any]:
    """Every picture becomes 5 x 5 tokens."""
    words, side = tokenizer(["<image>"], names={"image_token": "<image>"}), 20
    pixels = DeepseekVLImageProcessorPil(size={"height": side, "width": side}, min_size=4)
    processor = DeepseekVLProcessor(pixels, words, template("<image>"), num_image_tokens=25)
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=side, patch_size=4),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_id=4,
        **SPECIAL_IDS,
    )
    return built(DeepseekVLForConditionalGeneration, config, 1), processor


class Rows(ProcessorMixin):
    """Writes pictures as ``PixtralProcessor`` does, which cannot be imported without torchvision."""

    image_token, token_side = "[IMG]", 8

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        return super()._process_images(images, **kwargs, patch_size={"height": 8, "width": 8})

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        rows, columns = (int(side) // self.token_side for side in image_inputs["image_sizes"][image_idx])
        return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = 4


def mistral3() -> tuple[Any, Any]:
    """A token for 8 x 8 pixels, rows with a mark between them; the longer side has at most 48 pixels."""
    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    pixels = PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 4, "width": 4})
    processor = Rows(pixels, words, template("[IMG]"))
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=48, patch_size=4),
        text_config=MistralConfig(**TEXT, vocab_size=len(words)),
        image_token_index=4,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **SPECIAL_IDS,
    )
    return built(Mistral3ForConditionalGeneration, config, 3), processor


def aya_vision() -> tuple[Any, Any]:
    """Tiles of 3 x 3 tokens between marks, each after its number; two layers see eight tokens only."""
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    words = tokenizer([*marks, "TILE"])
    pixels = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, max_patches=4, crop_to_patches=True)
    processor = AyaVisionProcessor(
        pixels, words, patch_size=4, img_size=24, downsample_factor=2, chat_template=template("<image>")
    )
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=24, patch_size=4),
        text_config=Cohere2Config(**TEXT, vocab_size=len(words), layer_types=kinds, sliding_window=8),
        image_token_index=7,
        downsample_factor=2,
        vision_feature_layer=-1,
        **SPECIAL_IDS,
    )
    return built(AyaVisionForConditionalGeneration, config, 7), processor


def glm4v() -> tuple[Any, Any]:
    """A token for 8 x 8 pixels; positions count time, rows and columns."""
    words = tokenizer(["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"])
    names = {"image_token_id": 4, "video_token_id": 5, "image_start_token_id": 6, "image_end_token_id": 7}
    sizes = {"patch_size": 4, "temporal_patch_size": 2}
    processor = pictures_only(Glm4vProcessor)(
        Glm4vImageProcessorPil(**sizes, merge_size=2, size={"shortest_edge": 64, "longest_edge": 16384}),
        words,
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    config = Glm4vConfig(
        vision_config={**vision, **sizes, "spatial_merge_size": 2, "image_size": 24},
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": rope},
        **names,
        **SPECIAL_IDS,
    )
    return built(Glm4vForConditionalGeneration, config, 4), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    function.__name__: cache(function) for function in (deepseek_vl, mistral3, aya_vision, glm4v)
}


def drawn(sizes: Sequence[Sequence[tuple[int, int]]]) -> list[list[Image]]:
    return [[picture_of("RGB", size, (20 * index, 90, 120)) for index, size in enumerate(row)] for row in sizes]


def batch(
    family: str, pictures: Sequence[Sequence[tuple[int, int]]] = PICTURES
) -> tuple[Any, Any, Any, dict[str, Any]]:
    model, processor = FAMILIES[family]()
    adapter = adapter_for(model, processor)
    assert type(adapter) is GenericAdapter
    return model, processor, adapter, dict(adapter.inputs(model, processor, PROMPTS, drawn(pictures)))


def layout_of(family: str, **changed: Any) -> Any:
    model, processor, adapter, inputs = batch(family)
    inputs |= changed
    return adapter.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


# ---------------------------------------------------------------------------------------------------------- the layouts

#: Rasters of the three pictures as each family's processor makes them, by hand from its rule.
GRIDS = {
    "deepseek_vl": [[(5, 5)], [(5, 5), (5, 5)]],
    # 30 x 60 shrinks to 24 x 48, 50 x 50 to 48 x 48; sides are rounded up to multiples of 8
    "mistral3": [[(3, 5)], [(6, 3), (6, 6)]],
    # a wide picture becomes two tiles and the whole, so does a tall one; a square one four and the whole
    "aya_vision": [[None] * 3, [None] * 3 + [None] * 5],
    # sides are rounded to multiples of 8: 20 to 16, 30 to 32, 60 to 64, 50 to 48
    "glm4v": [[(2, 5)], [(8, 4), (6, 6)]],
}
MARKS = {"mistral3": {5, 6}, "aya_vision": {5, 6, 9, 10}}
#: What the chat template writes around a picture, as the configuration tells.
FRAMED = {"glm4v": {6, 7}}


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family: str) -> None:
    """Rasters by hand; roles from the ids by another way: which tokens are placeholders, marks, words."""
    model, _, _, inputs = batch(family)
    layout, token = layout_of(family), model.config.image_token_id
    assert [[span.grid for span in row] for row in layout.images] == GRIDS[family]
    images = [[span.image for span in row] for row in layout.images]
    assert images == ([[0] * 3, [1] * 3 + [2] * 5] if family == "aya_vision" else [[0], [1, 2]])
    for ids, mask, roles, spans in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"], layout.roles, layout.images, strict=True
    ):
        places = [column for span in spans for column in span.positions.tolist()]
        assert places == [column for column, known in enumerate(ids) if known == token]
        assert (roles == Role.IMAGE).nonzero().flatten().tolist() == places
        assert torch.equal(roles == Role.PAD, ~mask.bool())
        words = [ids[column] for column in (roles == Role.PROMPT).nonzero().flatten().tolist()]
        assert not {*words} & {token, *MARKS.get(family, set()), *FRAMED.get(family, set())}
        assert all(span.grid is None or span.grid[0] * span.grid[1] == len(span.positions) for span in spans)
    ends = [spans[-1].stop for spans in layout.images]
    assert layout.after_image.tolist() == ends


def test_the_words_of_the_chat_template_are_not_the_picture() -> None:
    """``<|START_OF_IMG|> TILE _1`` stands before the first tile and belongs to the picture; ``USER :`` does not."""
    layout = layout_of("aya_vision")
    roles = [(Role(role).name, len(list(group))) for role, group in groupby(layout.roles[1].tolist())]
    assert roles[:3] == [("SYSTEM", 3), ("SEPARATOR", 3), ("IMAGE", 9)]
    tail = [role for role, _ in roles]
    assert tail.count("PROMPT") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family: str) -> None:
    _, _, adapter, _ = batch(family)
    facts = adapter.facts(FAMILIES[family]()[0])
    assert (facts.family, facts.layers, facts.kv_heads) == (family, 3, 2)
    assert facts.spatial_grid == (family != "aya_vision")


# ----------------------------------------------------------------------------------------------------- under a stack


class Reader(Method):
    """Looks at attention and changes nothing."""

    name = "reader"
    summary = "looks at attention"
    fidelity = Fidelity.CONTROL
    tags = Tags(reads=frozenset({Point.ATTENTION_PROBS}))

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [Subscription(point=Point.ATTENTION_PROBS, access=Access.READ, layers=tuple(range(model.layers)))]

    def on_attention_probs(self, event: Any, state: Any) -> None:
        inside = event.probs[..., : event.layout.length] * event.layout.image_mask[:, None, None]
        state.count("seen", inside.sum((1, 2, 3)) > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_that_only_reads_changes_nothing_and_sees_pictures(family: str) -> None:
    model, processor, _, inputs = batch(family)
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    with Stack([Reader()]).attach(model, processor) as handle:
        assert torch.equal(model.generate(**inputs, **settings), plain)
        assert all(row["reader"]["seen"] > 0 for row in handle.telemetry())


def test_methods_that_need_neighbours() -> None:
    scr = methods().get("scr")
    for family in ("mistral3", "aya_vision"):
        model, processor, _, inputs = batch(family)
        if family == "aya_vision":
            with pytest.raises(UnsupportedModel, match="scr needs image tokens that form a grid"):
                Stack([scr()]).attach(model, processor).__enter__()
            continue
        with Stack([scr()]).attach(model, processor) as handle:
            handle.generate(**inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", ["deepseek_vl", "mistral3", "glm4v"])
def test_pictures_can_be_taken_and_put_back(family: str) -> None:
    model, processor, adapter, inputs = batch(family)
    layout = layout_of(family)
    images = adapter.images(inputs, layout)
    assert len(images) == 3
    same = adapter.with_images(inputs, images, layout)
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    swapped = adapter.chosen_images(inputs, [2, 1], layout)
    expected = adapter.inputs(model, processor, PROMPTS[:1], drawn([[(50, 50), (30, 60)]]))
    for name, value in swapped.items():
        if name == "pixel_values" and family != "glm4v":  # colours differ, sizes do not
            assert value.shape[0] == 2
        else:
            assert value.shape == expected[name].shape
            assert name != "image_grid_thw" or torch.equal(value, expected[name])


# ------------------------------------------------------------------------------------------------------------ refusals


def test_without_its_processor() -> None:
    model, _ = deepseek_vl()
    with pytest.raises(ConfigError, match=r"deepseek_vl has no adapter of its own.*stack.attach\(model, processor\)"):
        Stack([Reader()]).attach(model).__enter__()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_the_processor_would_not_write(family: str) -> None:
    """One placeholder, or one mark, became a word."""
    model, _, _, inputs = batch(family)
    marks = [model.config.image_token_id, *sorted(MARKS.get(family, set()) & {5, 6})]
    for mark in marks:
        ids: Tensor = inputs["input_ids"].clone()
        ids[1, (ids[1] == mark).nonzero()[0]] = 20
        with pytest.raises(LayoutError):
            layout_of(family, input_ids=ids)


def test_a_placeholder_outside_of_the_marks() -> None:
    _, _, _, inputs = batch("aya_vision")
    ids = inputs["input_ids"].clone()
    ids[1, -2] = 7
    with pytest.raises(LayoutError, match="that its processor would not write"):
        layout_of("aya_vision", input_ids=ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_another_number_of_pictures(family: str) -> None:
    _, _, _, inputs = batch(family, [[(40, 20)], [(30, 60)]])
    inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with pytest.raises(LayoutError, match="in one call of the processor"):
        layout_of(family, **inputs)


def test_a_video() -> None:
    _, _, _, inputs = batch("glm4v")
    ids = torch.where(inputs["input_ids"] == 4, 5, inputs["input_ids"])
    with pytest.raises(LayoutError, match="videos need one"):
        layout_of("glm4v", input_ids=ids)


@pytest.mark.parametrize("family", ["deepseek_vl", "mistral3", "glm4v"])
def test_a_branch_needs_positions_that_do_not_depend_on_pictures(family: str) -> None:
    model, processor, _, inputs = batch(family)
    with Stack([VCD()]).attach(model, processor) as handle:
        if family == "glm4v":
            with pytest.raises(UnsupportedModel, match="its positions in a prompt depend on the pictures"):
                handle.generate(**inputs, max_new_tokens=2, do_sample=False)
            return
        handle.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert all(row["vcd"]["extra_forwards"] > 0 for row in handle.telemetry())


def test_tiles_are_not_told_apart() -> None:
    _, _, adapter, inputs = batch("aya_vision")
    with pytest.raises(UnsupportedModel, match="which part of pixel_values belongs to which picture"):
        adapter.with_images(inputs, [], layout_of("aya_vision"))


def test_a_decoder_that_looks_at_pictures_from_aside() -> None:
    text = {**TEXT, "vocab_size": 64, "cross_attention_layers": [1]}
    config = MllamaConfig(text_config=text, image_token_index=4)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    with pytest.raises(UnsupportedModel, match=r"'mllama', and layer 1 .*cross-attention.*\n.*mitigate.models"):
        adapter_for(model)


def gated(device: str = "meta") -> Any:
    """A gate between attention and its projection; only the second and the fourth block have attention."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    kinds = ["linear_attention", "full_attention"] * 2
    text = {**TEXT, "vocab_size": 64, "num_hidden_layers": 4, "rope_parameters": rope, "layer_types": kinds}
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen3_5Config(text_config=text, vision_config={**vision, "patch_size": 4}, image_token_id=4)
    with torch.device(device):
        return Qwen3_5ForConditionalGeneration(config)


def scaled() -> Any:
    """What attention adds is multiplied by a number."""
    model, _ = deepseek_vl()
    model.model.language_model = HyperCLOVAXModel(HyperCLOVAXConfig(**TEXT, vocab_size=64, residual_multiplier=0.5))
    model.config.text_config = model.model.language_model.config
    return model


@pytest.mark.parametrize("build", [gated, scaled])
def test_a_direct_path_with_something_on_it_is_refused(build: Callable[[], Any]) -> None:
    model = build()
    with pytest.raises(UnsupportedModel, match="with the output of attention before they add it is not known"):
        DirectPath(model, GenericAdapter(model), {1})


def test_exact_gradients_behind_the_last_block_without_attention() -> None:
    """Caches of the other blocks hold no keys; rows of a prompt cannot be run again behind them."""
    _, processor = FAMILIES["glm4v"]()
    model = built(lambda _: gated("cpu"), None, 4)
    model.config.vision_config.spatial_merge_size = 2
    inputs = GenericAdapter(model, processor).inputs(model, processor, ["is there a dog ?"], [[]])
    sgrs, settings = methods().get("sgrs"), {"max_new_tokens": 2, "do_sample": False, "eos_token_id": []}
    with Stack([sgrs(layers="3")]).attach(model, processor) as handle:
        assert handle.generate(**inputs, **settings).shape[1] == inputs["input_ids"].shape[1] + 2
        assert handle.telemetry()[0]["sgrs"]["extra_backwards"] == 2
    with (
        Stack([sgrs(layers="3", history_init="prompt_tail")]).attach(model, processor) as handle,
        pytest.raises(UnsupportedModel, match="layer 0 has no attention"),
    ):
        handle.generate(**inputs, **settings)


@pytest.mark.parametrize("family", ["deepseek_vl", "mistral3", "glm4v"])
def test_a_direct_path_as_most_decoders_have_it(family: str) -> None:
    model, processor = FAMILIES[family]()
    norm = GenericAdapter(model, processor).output_norm(model.get_decoder().layers[1])
    assert (norm is None) == (family != "glm4v")
    assert DirectPath(model, GenericAdapter(model, processor), {1})


def test_a_decoder_that_does_something_else_for_some_kernels() -> None:
    """MiniMax M3 shuts keys out by a mask for ``sdpa`` and ``eager``, and for another name it leaves that to it."""
    text = {**TEXT, "vocab_size": 64, "head_dim": 8, "mlp_layer_types": ["dense"] * 3}
    config = MiniMaxM3VLConfig(text_config=text, vision_config=VISION, image_token_id=4)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModel, match="layer 0 attends in another way with kernels that it does not know"):
        adapter_for(model)


def test_a_decoder_whose_layers_share_keys() -> None:
    """Gemma 4: in ``generate`` such layers are given the last token of a prompt only."""
    text = {**TEXT, "vocab_size": 64, "vocab_size_per_layer_input": 64, "head_dim": 8, "num_kv_shared_layers": 1}
    text |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 8}
    config = Gemma4Config(text_config=text, vision_config=None, audio_config=None, image_token_id=4)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModel, match="its last 1 layers take the keys of earlier ones"):
        adapter_for(model)


def test_a_decoder_whose_layers_differ_in_heads() -> None:
    model, processor = mistral3()

    def ambiguous(self: Any) -> int:
        raise RuntimeError("a per-layer attribute")

    config = model.config.text_config
    config.__class__ = type("Config", (type(config),), {"num_attention_heads": property(ambiguous)})
    with pytest.raises(UnsupportedModel, match="one number of layers and heads for the whole decoder"):
        adapter_for(model, processor)


def test_a_configuration_without_placeholders() -> None:
    model, processor = deepseek_vl()
    model.config = SimpleNamespace(model_type="blank")
    with pytest.raises(UnsupportedModel, match="names no image_token_id"):
        adapter_for(model, processor)


def test_a_processor_that_follows_no_known_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = deepseek_vl()
    words = iter("<image>" * (9 + number) for number in range(8))
    monkeypatch.setattr(type(processor), "replace_image_token", lambda *_, **__: next(words))
    with pytest.raises(UnsupportedModel, match=r"a rule that is not known \(900 x 300: 9 image tokens, 300 x 900: 10"):
        adapter_for(model, processor).facts(model)


def test_grids_that_do_not_explain_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = glm4v()
    monkeypatch.setattr(type(processor), "replace_image_token", lambda *_, **__: "<|image|>" * 7)
    with pytest.raises(UnsupportedModel, match="a rule that is not known"):
        adapter_for(model, processor).facts(model)


def test_a_number_of_tokens_that_is_no_known_raster() -> None:
    """25 tokens of 10 x 10 patches: something else than patches."""
    model, processor = deepseek_vl()
    model.config.vision_config.patch_size = 2
    adapter = adapter_for(model, processor)
    assert not adapter.facts(model).spatial_grid


def test_what_becomes_of_the_residual_stream_is_read_off_the_model() -> None:
    """A norm with a shift is no RMSNorm; logits that are scaled or capped after the unembedding are not its output."""
    model, _, adapter, _ = batch("aya_vision")
    with pytest.raises(UnsupportedModel, match="the norm before the unembedding is not known"):
        adapter.final_norm(model)
    raw = torch.randn(2, 3)
    assert adapter.logits(model, raw) is raw

    with pytest.raises(UnsupportedModel, match="what is done with the unembedding's output"):
        adapter.logits(Scaled(), raw)


class Scaled:
    """A forward that scales what its unembedding puts out."""

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)  # type: ignore[attr-defined]
        logits = logits * 0.5
        return logits
