"""What must hold on every family: plain decoding stays what it is, reads are true, edits arrive, rows are apart."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

from mitigate.core import Access, Branch, Point, Rows, Subscription, Tags
from mitigate.core.layout import Role
from mitigate.core.points import MAIN_PHASES
from mitigate.core.stack import Stack
from mitigate.diagnostics.saliency_maps import forced
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing.tiny import Prompt, TinyModel, tiny_families, tiny_model
from mitigate.testing.tiny_words import END
from tests.core.test_points import Probe

FAMILIES = tiny_families()
STEPS = 5
#: What transformers itself may get wrong by between two ways of computing the same.
CLOSE = 2e-4


@cache
def tiny(family: str) -> TinyModel:
    """One model per family for all tests of this file: they only read it, and what they attach they detach."""
    return tiny_model(family)


@cache
def batch(family: str) -> dict[str, Any]:
    """A padded batch: one picture, none, two, one."""
    return tiny(family).inputs()


def layers(family: str) -> tuple[int, ...]:
    facts = tiny(family).facts
    return facts.attention_layers or tuple(range(facts.layers))


def options(family: str, **more: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": tiny(family).pad_token, "eos_token_id": [],
        "return_dict_in_generate": True, "output_logits": True, **more,
    }  # fmt: skip


def plain(family: str, inputs: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    return tiny(family).model.generate(**inputs, **options(family, **more))


def served(family: str, methods: list[Any], inputs: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    with Stack(methods).attach(tiny(family).model, tiny(family).processor) as handle:
        return handle.generate(**inputs, **options(family, **more))


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


def attention(family: str, access: Access, function: Any = lambda event: None, **more: Any) -> Probe:
    return Probe(
        subscription=Subscription(
            point=Point.ATTENTION_PROBS, access=access, layers=layers(family), **{"rows": Rows.LAST, **more}
        ),
        function=function,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "static"])
def test_a_stack_that_reads_leaves_decoding_as_it_is(family: str, way: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampling": {"do_sample": True, "temperature": 0.7},
        "beams": {"num_beams": 2, "output_logits": False, "length_penalty": 0.5, "eos_token_id": [END]},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    inputs, reader = batch(family), attention(family, Access.READ)
    expected = plain(family, inputs, **ways[way])
    found = served(family, [reader], inputs, **ways[way])
    assert torch.equal(found.sequences, expected.sequences)
    assert reader.seen
    if way != "beams":
        assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_the_same_weights_changes_next_to_nothing(family: str) -> None:
    expected = plain(family, batch(family))
    same = served(family, [attention(family, Access.WRITE, lambda event: event.probs.clone())], batch(family))
    assert torch.equal(same.sequences, expected.sequences)
    torch.testing.assert_close(logits(same), logits(expected), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_methods_see_is_what_eager_attention_computes(family: str) -> None:
    """Weights of every row and layer, against transformers' own eager attention; nothing lies on padding."""
    subject, inputs = tiny_model(family), batch(family)
    adapter, model = subject.adapter, subject.model
    reader = attention(family, Access.READ, rows=Rows.ALL)
    seen: dict[int, torch.Tensor] = {}
    with Stack([reader]).attach(model, subject.processor) as handle:
        handle.generate(**inputs, **options(family, max_new_tokens=1))
    for event in reader.seen:
        seen[event.layer] = event.probs
        weight = event.probs.sum(-1).transpose(1, 2)[event.row_mask]
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-5)
        hidden = ~event.layout.valid[:, None, None, : event.probs.shape[-1]]
        assert not bool((event.probs * hidden * event.row_mask[:, None, :, None]).any())
    config = adapter.decoder_config(model)
    config._attn_implementation_internal = "eager"
    given: dict[int, torch.Tensor] = {}
    modules = [adapter.attention(layer) for layer in adapter.decoder_layers(model)]
    for layer, module in enumerate(modules):
        module.register_forward_hook(lambda _, __, out, layer=layer: given.update({layer: out[1]}))
    model.generate(**inputs, **options(family, max_new_tokens=1))
    rows = reader.seen[0].row_mask
    for layer, probs in seen.items():
        expected = given[layer].transpose(1, 2)[rows]
        torch.testing.assert_close(probs.transpose(1, 2)[rows], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_arrives(family: str) -> None:
    """Taking all weight off the pictures changes what is said about them, and not what is said without one."""

    def blind(event: Any) -> torch.Tensor:
        keys = event.layout.image_mask[:, None, None, : event.probs.shape[-1]]
        kept: torch.Tensor = event.probs.masked_fill(keys, 0.0)
        return kept / kept.sum(-1, keepdim=True)

    probe = attention(family, Access.WRITE, blind, rows=Rows.ALL)
    expected = plain(family, batch(family), max_new_tokens=1)
    found = served(family, [probe], batch(family), max_new_tokens=1)
    moved = (logits(found) - logits(expected)).abs().amax((0, 2))
    for row, prompt in enumerate(tiny(family).askable()):
        assert bool(moved[row] > 1e-2) == bool(prompt.pictures), (prompt, moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_counts_what_the_processor_put_in(family: str) -> None:
    subject, inputs = tiny(family), batch(family)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    layout = subject.adapter.layout(subject.model, ids, mask, inputs, subject.processor)
    placeholders = torch.isin(ids, torch.tensor(subject.adapter.image_tokens(subject.model.config)))
    assert torch.equal(layout.image_mask, placeholders)
    assert torch.equal(layout.valid, mask.bool())
    number = 0
    for row, prompt in enumerate(tiny(family).askable()):
        spans = layout.images[row]
        assert sorted({span.image for span in spans}) == list(range(number, number + len(prompt.pictures)))
        number += len(prompt.pictures)
        inside = [column for span in spans for column in span.positions.tolist()]
        assert len(inside) == len(set(inside))
        assert all(bool(placeholders[row, column]) for column in inside)
        for span in spans:
            assert span.grid is None or span.grid[0] * span.grid[1] == len(span.positions)
            assert span.stop > int(span.positions.max())
        text = (layout.roles[row] == Role.PROMPT).nonzero().flatten()
        assert text.min() >= layout.after_image[row] if len(prompt.pictures) == 1 else len(text)
        words = subject.processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        said = ids[row, text].tolist()
        assert any(said[place : place + len(words)] == words for place in range(len(said)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_user_s_own_words_are_known(family: str) -> None:
    """What lies between the template's words after the picture and its end, with every family's own prompt."""
    subject, seen = tiny(family), []
    inputs = subject.inputs((Prompt("dog ?", (4,)), Prompt("are there two red cars", (2, 3))))
    probe = Probe(
        subscription=Subscription(point=Point.SAMPLE_BEGIN), function=lambda event: seen.append(event.layout.question)
    )
    served(family, [probe], inputs, max_new_tokens=1)
    words = subject.processor.tokenizer
    found = [words.decode(ids[mask]).strip() for ids, mask in zip(inputs["input_ids"], seen[0], strict=True)]
    unknown = words.decode(words("are there two red cars", add_special_tokens=False)["input_ids"])
    assert found == ["dog ?", unknown]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_template_that_was_given_is_used(family: str) -> None:
    processor = copy.deepcopy(tiny(family).processor)
    processor.chat_template = "Q:{{ messages[0].content[-1].text }} A:"
    assert tiny(family).adapter.prompt_text(processor, "what", 1).endswith("Q:what A:")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_pictures_that_do_not_belong_together_are_refused(family: str) -> None:
    one, two = (tiny(family).inputs([Prompt("dog ?", pictures)]) for pictures in ((4,), (2, 3)))
    reads = attention(family, Access.READ)
    of_tokens = {name for name, value in one.items() if value.shape[:2] == one["input_ids"].shape}
    for prompt, pictures in ((one, two), (two, one)):
        mixed = {name: (prompt if name in of_tokens else pictures)[name] for name in prompt}
        with pytest.raises(LayoutError, match=r"the prompts hold the tokens of|tokens, but|image tokens in a row"):
            served(family, [reads], mixed)
    dropped = {name: value for name, value in one.items() if not name.startswith("pixel_values")}
    with pytest.raises(LayoutError, match="bring no picture"):
        served(family, [reads], dropped)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_its_answer_is_what_generation_saw(family: str) -> None:
    """In one pass without a cache (saliency maps): positions and masks go on behind the prompt as in generation."""
    inputs = tiny(family).inputs((Prompt("dog ?", (4,)),))
    expected = plain(family, inputs)
    answer = expected.sequences[0, -STEPS:-1].tolist()
    with torch.no_grad():
        found = tiny(family).model(**forced(inputs, answer), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, expected.logits[-1], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_pictures_that_came_encoded_or_lie_in_a_cache_cannot_be_had(family: str) -> None:
    subject = tiny(family)
    inputs = subject.inputs([Prompt("dog ?", (4,))])
    layout = subject.adapter.layout(
        subject.model, inputs["input_ids"], inputs["attention_mask"], inputs, subject.processor
    )
    without = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
    with pytest.raises(UnsupportedModel, match="came encoded"):
        subject.adapter.images(without, layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_is_that_row_alone(family: str) -> None:
    subject = tiny(family)
    together = served(family, [attention(family, Access.READ)], batch(family), max_new_tokens=3)
    for row, prompt in enumerate(tiny(family).askable()):
        alone = served(
            family, [attention(family, Access.READ)], subject.inputs([Prompt(prompt.text, prompt.pictures)]),
            max_new_tokens=3,
        )  # fmt: skip
        torch.testing.assert_close(logits(together)[:, row], logits(alone)[:, 0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_of_the_same_pictures_goes_on_as_the_main_stream_does(family: str) -> None:
    beside = Beside(subscription=Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE))
    found = served(family, [beside], batch(family), max_new_tokens=3)
    assert torch.equal(found.sequences, plain(family, batch(family), max_new_tokens=3).sequences)
    for same, bare in beside.seen:
        torch.testing.assert_close(same[0], same[1], rtol=CLOSE, atol=CLOSE)
        for row, prompt in enumerate(tiny(family).askable()):
            moved = float((bare[0][row] - bare[1][row]).abs().max())
            assert (moved > 1e-2) == bool(prompt.pictures), (row, moved)


class Beside(Probe):
    """Notes what two branches say: one with the pictures, one without."""

    tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point), forwards_per_token=2)

    def branches(self) -> list[Branch]:
        return [Branch(name="same"), Branch(name="bare", images=False)]

    def on_next_token_logits(self, event: Any, state: Any) -> None:
        self.seen.append([(event.logits.clone(), event.branch_logits(name).clone()) for name in ("same", "bare")])


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_can_be_read_and_written(family: str) -> None:
    facts = tiny(family).facts
    written = Probe(
        subscription=Subscription(point=Point.HIDDEN_STATES, access=Access.WRITE, layers=(1,)),
        function=lambda event: event.hidden + 0.5,
    )
    expected = plain(family, batch(family), max_new_tokens=2)
    found = served(family, [written], batch(family), max_new_tokens=2)
    assert written.seen[0].hidden.shape[:2] == batch(family)["input_ids"].shape
    assert float((logits(found) - logits(expected)).abs().max()) > 1e-3
    assert facts.layers == len(tiny(family).adapter.decoder_layers(tiny(family).model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_on_the_last_block_shows_the_model_s_own_logits(family: str) -> None:
    seen: list[torch.Tensor] = []
    lens = Lens(
        subscription=Subscription(point=Point.LOGIT_LENS, layers=(tiny(family).facts.layers - 1,)),
        function=lambda event: seen.append(event.logits.float()),
    )
    found = served(family, [lens], batch(family))
    torch.testing.assert_close(torch.stack(seen), logits(found), rtol=1e-4, atol=1e-4)


class Lens(Probe):
    """Looks through the final norm and the head."""

    on_logit_lens = Probe._handle


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_one_cached_token_are_those_of_the_whole_sequence(family: str) -> None:
    """Double precision: d(logit)/d(last attention row) of a step equals that of one pass over the whole text."""
    subject = tiny_model(family).cast(torch.float64)
    inputs = subject.inputs((Prompt("are there two red cars", (2,)),))
    chooser = Chooser(
        subscription=Subscription(
            point=Point.ATTENTION_PROBS, access=Access.GRADIENT, layers=layers(family), rows=Rows.LAST
        )
    )
    with Stack([chooser]).attach(subject.model, subject.processor) as handle:
        # where prompts see themselves whole, one pass over prompt and answer is another computation
        count = 3 if subject.facts.causal_prompt else 1
        steps = handle.generate(**inputs, **options(family, max_new_tokens=count)).sequences
    expected = whole_gradients(subject, inputs, steps[:, :-1], layers(family))
    for layer, (weights, slope) in chooser.seen[-1].items():
        gradient = torch.nn.functional.pad(expected[layer], (slope.shape[-1] - expected[layer].shape[-1], 0))
        scale = float(gradient.abs().max())  # transformers' eager softmax is taken in single precision
        kept = weights > 0  # what a sliding window hides has a slope in the whole matrix only
        torch.testing.assert_close(slope[kept], gradient[kept], rtol=0, atol=1e-4 * scale)
        assert bool(kept.any())
        assert scale > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_direct_path_is_the_gradient_with_everything_else_held_fixed(family: str) -> None:
    """Attention of other layers and all MLPs detached, norms a fixed scale: what is left is exact, in any family."""
    layer = layers(family)[-2]
    found = tiny_model(family)
    inputs = found.inputs((Prompt("are there two red cars", (2,)),))
    chooser = Chooser(
        subscription=Subscription(
            point=Point.ATTENTION_PROBS, access=Access.DIRECT, layers=(layer,), rows=Rows.LAST, phases=MAIN_PHASES
        )
    )
    with Stack([chooser]).attach(found.model, found.processor) as handle:
        ids = handle.generate(**inputs, **options(family, max_new_tokens=1)).sequences[:, :-1]
    subject = tiny_model(family).cast(torch.float64)
    model, adapter = subject.model, subject.adapter
    for index, block in enumerate(adapter.decoder_layers(model)):
        block.mlp.register_forward_hook(lambda _, __, out: out.detach())
        if index != layer:
            projection = adapter.output_projection(block)
            projection.register_forward_hook(lambda _, __, out: out.detach())
    for name, module in adapter.entry(model).get_decoder().named_modules():
        if type(module).__name__.endswith("RMSNorm") and not name.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(lambda _, args, out: args[0] * (out / args[0]).detach())
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    expected = whole_gradients(subject, wide, ids, (layer,))[layer]
    _, slope = chooser.seen[-1][layer]
    torch.testing.assert_close(slope.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def whole_gradients(
    subject: TinyModel, inputs: dict[str, Any], ids: torch.Tensor, wanted: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    """One eager pass over prompt and answer, differentiated by transformers' own attention weights."""
    adapter, model = subject.adapter, subject.model
    adapter.decoder_config(model)._attn_implementation_internal = "eager"
    kept: dict[int, torch.Tensor] = {}
    for layer in wanted:
        module = adapter.attention(adapter.decoder_layers(model)[layer])
        module.register_forward_hook(lambda _, __, out, layer=layer: kept.update({layer: out[1]}))
    prompt = inputs["input_ids"].shape[1]
    given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": None}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            given[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - prompt))
    with torch.enable_grad():
        model.get_input_embeddings().weight.requires_grad_()
        output = model(**given, use_cache=False)
        top = output.logits[0, -1].max()
        slopes = torch.autograd.grad(top, list(kept.values()))
    return {layer: slope[:, :, -1] for layer, slope in zip(kept, slopes, strict=True)}


class Chooser(Probe):
    """Leaves the choice to plain decoding, and keeps the gradients of the likeliest token's logit."""

    tags: ClassVar[Tags] = Tags(
        reads=frozenset(Point), writes=frozenset(Point), gradient=True, selects_token=True, backwards_per_token=1
    )

    def subscriptions(self, model: Any) -> list[Subscription]:
        return [self.subscription, Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE)]

    def on_select_token(self, event: Any, state: Any) -> None:
        top = event.logits.argmax(-1)
        slope = torch.nn.functional.one_hot(top, event.logits.shape[-1])
        self.seen.append(event.attention_gradients(slope.to(event.logits.dtype)))


def test_families_without_spatial_grid_refuse_methods_that_need_one() -> None:
    from mitigate.methods.scr import SCR

    gridless = [family for family in FAMILIES if not tiny(family).facts.spatial_grid]
    for family in gridless:
        with (
            pytest.raises(UnsupportedModel, match="grid"),
            Stack([SCR()]).attach(tiny(family).model, tiny(family).processor),
        ):
            pass
