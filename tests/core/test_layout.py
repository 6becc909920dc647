"""Token roles against an independent count over the ids."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mitigate.adapters.llava import LlavaAdapter
from mitigate.core.layers import parse_layers
from mitigate.core.layout import Role
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from tests.references.tiny import IMAGE, make_inputs, tiny_llava

PROMPT = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5)).filter(lambda prompt: sum(prompt) > 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=4), st.integers(0, 2))
def test_roles_of_any_batch(prompts, gap):
    model = _model()
    inputs = make_inputs(model, prompts, gap=gap)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    layout = LlavaAdapter().layout(model, ids, mask, inputs).grown(ids.shape[1] + 2)
    image = 0
    for row, (_, images, _) in enumerate(prompts):
        tokens, seen, last = ids[row].tolist(), 0, None
        for column, token in enumerate(tokens):
            if not mask[row, column]:
                expected = Role.PAD
            elif token == IMAGE:
                expected, seen, last = Role.IMAGE, seen + 1, column
            else:
                expected = Role.PROMPT if seen or not images else Role.SYSTEM
            assert layout.roles[row, column] == expected
        assert layout.roles[row, -2:].tolist() == [Role.GENERATED] * 2
        assert int(layout.after_image[row]) == (last + 1 if images else int(mask[row].argmax()))
        assert [span.image for span in layout.images[row]] == list(range(image, image + images))
        columns = [column for span in layout.images[row] for column in span.positions.tolist()]
        assert columns == [column for column, token in enumerate(tokens) if token == IMAGE]
        assert all(span.grid == (6, 6) and len(span.positions) == 36 for span in layout.images[row])
        image += images


_CACHE = {}


def _model():
    return _CACHE.setdefault("model", tiny_llava(seed=0))


def test_class_token_of_the_full_strategy_is_no_patch():
    model = tiny_llava(seed=0)
    model.config.vision_feature_select_strategy = "full"
    ids = torch.tensor([[1, 7, *[IMAGE] * 37, 8]])
    span = LlavaAdapter().layout(model, ids, None, {}).images[0][0]
    assert span.positions.tolist() == list(range(3, 39))
    assert span.stop == 39


def test_patches_that_do_not_fill_the_picture_are_not_counted():
    model = tiny_llava(seed=0)
    model.config.vision_config.patch_size = 5  # 24 pixels: 4 patches a side
    span = LlavaAdapter().layout(model, torch.tensor([[1, *[IMAGE] * 16]]), None, {}).images[0][0]
    assert span.grid == (4, 4)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_unknown_tower_is_refused(strategy):
    model = tiny_llava(seed=0)
    model.config.vision_feature_select_strategy = strategy
    model.config.vision_config = transformers.Dinov2Config(image_size=24, patch_size=4)
    with pytest.raises(UnsupportedModel, match="layout of a 'dinov2' tower is not known"):
        LlavaAdapter().layout(model, torch.tensor([[1, *[IMAGE] * 36]]), None, {})


def test_one_row_that_is_padded_on_the_right_is_refused():
    ids = torch.tensor([[1, 7, 8], [1, 7, 0]])
    with pytest.raises(LayoutError, match="padded on the right"):
        LlavaAdapter().layout(_model(), ids, (ids != 0).long(), {})


class Forgetful(LlavaAdapter):
    """Overlooks pictures, and takes the token that also fills up prompts for a mark."""

    def separators(self, model, processor):
        return frozenset({0, 9})

    def image_spans(self, row, batch):
        return super().image_spans(row, batch) if batch.inputs else []


def test_placeholders_that_an_adapter_overlooks_are_refused():
    with pytest.raises(LayoutError, match="image tokens that belong to no picture"):
        Forgetful().layout(_model(), torch.tensor([[1, 7, *[IMAGE] * 36, 8]]), None, {})


def test_padding_is_no_mark_and_marks_are_where_a_picture_is():
    ids = torch.tensor([[0, 0, 1, 9, *[IMAGE] * 36, 9, 0, 8]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    layout = Forgetful().layout(_model(), ids, mask, {"pixel_values": torch.zeros(1, 3, 24, 24)})
    roles = [Role.PAD] * 2 + [Role.SYSTEM, Role.SEPARATOR] + [Role.IMAGE] * 36 + [Role.SEPARATOR] * 2 + [Role.PROMPT]
    assert layout.roles[0].tolist() == roles
    assert layout.images[0][0].stop == 42


def test_marks_of_later_pictures_are_no_text_that_asks_about_earlier_ones():
    picture = [9, *[IMAGE] * 36, 9]
    ids = torch.tensor([[1, *picture, 7, *picture, 8, 10]])
    layout = Forgetful().layout(_model(), ids, None, {"pixel_values": torch.zeros(2, 3, 24, 24)})
    first, second = layout.images[0]
    assert layout.text_queries(0, first).tolist() == [39, 78, 79]
    assert layout.text_queries(0, second).tolist() == [78, 79]


def test_expansion_repeats_rows():
    inputs = make_inputs(_model(), [(2, 1, 3), (4, 0, 2)])
    layout = LlavaAdapter().layout(_model(), inputs["input_ids"], inputs["attention_mask"], {})
    twice = layout.repeated(2)
    assert twice.rows == 4
    assert torch.equal(twice.prompt_roles[1], layout.prompt_roles[0])
    assert twice.images[0] is twice.images[1]


@pytest.mark.parametrize(
    ("text", "depth", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("9-14", 32, (9, 10, 11, 12, 13, 14)),
        ("6,7,8", 32, (6, 7, 8)),
        ("1, 3-4", 8, (1, 3, 4)),
        ("0.1875-0.25", 32, (6, 7, 8)),
        ("0.1875-0.25", 28, (5, 6, 7)),
        ("0.25-0.5", 32, tuple(range(8, 17))),
        ("0.5-1.0", 4, (2, 3)),
        ("0.5", 8, (4,)),
        ("2-", 5, (2, 3, 4)),
        ("0, 3-", 5, (0, 3, 4)),
        ("0.5-", 8, (4, 5, 6, 7)),
    ],
)
def test_layer_ranges(text, depth, expected):
    assert parse_layers(text, depth) == expected


@pytest.mark.parametrize("text", ["", "a", "5-3", "0.5-1.5", "-1", "1..3", "0.7-0.2", "8", "6-9", "8-", "-"])
def test_bad_layer_ranges_name_the_parameter(text):
    with pytest.raises(ConfigError, match=r"methods\.x\.layers="):
        parse_layers(text, 8, name="methods.x.layers")
