"""What follows from the processor, and what requests share while a stack stays attached."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mitigate.adapters import adapter_for
from mitigate.core import Point, Subscription
from mitigate.core.attachment import CAPACITY, Attachment
from mitigate.core.stack import Stack
from mitigate.core.vocabulary import Vocabulary
from mitigate.errors import ConfigError, HookError
from tests.core.test_choosing import Watch
from tests.references.tiny import PAD, make_inputs, tiny_llava, tiny_processor

BEGIN = Subscription(point=Point.SAMPLE_BEGIN)


def on_begin(function):
    return Watch(wishes=(BEGIN,), function=lambda event, state: function(event))


def picture(model, value=0):
    from PIL import Image

    side = model.config.vision_config.image_size
    return Image.new("RGB", (side, side), (value, 100, 50))


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model.config)


@pytest.mark.parametrize("words", ["Is there a dog ?", "dog", "", "ASSISTANT : dog"])
def test_the_users_words_are_found_in_the_template(model, processor, words):
    """Everything between the picture and the template's end, whatever the words are, with left padding."""
    kept = []
    prompts = [words, "Describe this image in detail . Please answer yes"]
    inputs = adapter_for(model).inputs(model, processor, prompts, [[picture(model)], [picture(model)] * 2])
    with Stack([on_begin(lambda event: kept.append(event.layout.question))]).attach(model, processor) as handle:
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)
    found = [processor.tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], kept[0], strict=True)]
    assert found == prompts


def test_words_between_picture_and_question_are_template(model):
    """A template may say something of its own on both sides of the user's words."""
    processor = tiny_processor(model.config)
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}USER <image> {% else %}"
        "question : {{ part['text'] }} . Please answer {% endif %}{% endfor %}ASSISTANT :"
    )
    kept = []
    inputs = adapter_for(model).inputs(model, processor, ["question : dog . Please"], [[picture(model)]])
    with Stack([on_begin(lambda event: kept.append(event.layout.question))]).attach(model, processor) as handle:
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)
    assert processor.tokenizer.decode(inputs["input_ids"][0][kept[0][0]]) == "question : dog . Please"


def test_no_words_without_processor_or_template(model, processor):
    kept = []
    watch = on_begin(lambda event: kept.append(event.layout.question))
    with Stack([watch]).attach(model) as handle:
        handle.generate(**make_inputs(model, [(3, 1, 4)]), max_new_tokens=1, pad_token_id=PAD)
    with Stack([watch]).attach(model, processor) as handle:
        handle.generate(**make_inputs(model, [(3, 1, 4)]), max_new_tokens=1, pad_token_id=PAD)
    assert kept == [None, None]


def test_vocabulary_of_a_word_level_tokenizer(model, processor):
    tokenizer = processor.tokenizer
    known = Vocabulary.of(tokenizer, 120, torch.device("cpu"))
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("dog", "the", ".", "<s>", "<image>")}
    assert [bool(known.word_start[ids[word]]) for word in ids] == [True, True, False, False, False]
    assert [bool(known.content[ids[word]]) for word in ids] == [True, False, False, False, False]
    assert known.special.nonzero().flatten().tolist() == sorted(set(tokenizer.all_special_ids))
    assert known.special.shape == (120,)


@pytest.mark.parametrize(
    ("pieces", "starts", "content"),
    [
        (["\u2581a", "\u2581dog", "gy", "\u2581", "\u2581,", "."], [0, 1], [1]),
        (["\u0120The", "\u0120dog", "gy", "cat", "\u0120.", "!"], [0, 1], [1]),
        (["the", "dog", "##gy", "cat", ".", "##a"], [0, 1, 3], [1, 3]),
    ],
)
def test_vocabulary_of_sub_word_tokenizers(pieces, starts, content):
    """SentencePiece, byte-level BPE and WordPiece mark the beginnings of words in three ways."""

    pieces = [*pieces, f"{pieces[0][0]}stop"]  # special, though it looks like the beginning of a word

    class Pieces:
        all_special_ids = (len(pieces) - 1,)

        def __len__(self):
            return len(pieces)

        def convert_ids_to_tokens(self, ids):
            return [pieces[place] for place in ids]

    known = Vocabulary.of(Pieces(), len(pieces), torch.device("cpu"))
    assert known.word_start.nonzero().flatten().tolist() == starts
    assert known.content.nonzero().flatten().tolist() == content


def test_words_need_the_processor(model):
    watch = on_begin(lambda event: event.request.vocabulary)
    inputs = make_inputs(model, [(3, 1, 4)])
    with Stack([watch]).attach(model) as handle, pytest.raises(ConfigError, match="attach with the processor"):
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)


def test_shared_memory_lasts_as_long_as_the_attachment(model):
    calls = []

    def remember(event):
        event.request.shared("key", lambda: calls.append(1))

    inputs = make_inputs(model, [(3, 1, 4)])
    for _ in range(2):
        with Stack([on_begin(remember)]).attach(model) as handle:
            for _ in range(3):
                handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)
    assert len(calls) == 2


def test_shared_memory_is_bounded(model):
    memory = Attachment(model, adapter_for(model), None)
    for key in range(CAPACITY + 1):
        memory.shared(key, lambda key=key: key)
        memory.shared(0, lambda: "again")  # used all the time: stays
    assert memory.shared(0, lambda: "new") == 0
    assert memory.shared(1, lambda: "new") == "new"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_told_apart_by_their_pixels(dtype):
    keys = []
    model = tiny_llava(seed=0).to(dtype)
    watch = on_begin(lambda event: keys.append([event.request.image_key(i) for i in range(3)]))
    inputs = make_inputs(model, [(3, 1, 4), (2, 2, 3)], seed=1)
    inputs["pixel_values"][2] = inputs["pixel_values"][0]
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with Stack([watch]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)
    first, second, third = keys[0]
    assert first == third != second


def test_pixels_are_not_kept(model):
    late = Watch(wishes=(Subscription(point=Point.STEP_END),), function=lambda event, state: event.request.image_key(0))
    inputs = make_inputs(model, [(3, 1, 4)])
    with Stack([late]).attach(model) as handle, pytest.raises(HookError, match="sample_begin"):
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)


def test_tiles_of_a_picture_share_its_number(model, monkeypatch):
    from mitigate.adapters.llava import LlavaAdapter

    plain = LlavaAdapter.image_spans
    monkeypatch.setattr(
        LlavaAdapter,
        "image_spans",
        lambda *args: [dataclasses.replace(span, image=(0, 0, 1, 2, 2)[span.image]) for span in plain(*args)],
    )
    kept = []
    inputs = make_inputs(model, [(2, 3, 2), (2, 2, 2)])
    with Stack([on_begin(lambda event: kept.append(event.layout.images))]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD)
    assert [[span.image for span in spans] for spans in kept[0]] == [[0, 0, 1], [2, 2]]
