"""Labels reach the right tokens, whatever the tokenizer makes of words."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mitigate.benchmarks.testbed import Testbed
from mitigate.diagnostics.labels import Label, label_tokens, offsets, pieces
from mitigate.testbed.model import checkpoint_path
from tests.diagnostics.worlds import Words, caption, question

G, H, OTHER = Label.GROUNDED, Label.HALLUCINATED, Label.OTHER
TEXT = "A cat sits by a traffic light; no dogma, two cats and a dog."


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer so small that it must cut words into pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "</s>"]
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=270, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=special)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=True)
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, continuing_subword_prefix="##")
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def words(found: list[Any], label: Label) -> str:
    """The characters of all pieces with a label."""
    return "|".join(piece.text.strip() for piece in found if piece.label is label)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "pieces"])
def test_pieces_of_words_are_labelled_through_characters(kind: str) -> None:
    tokenizer = trained(kind)
    tokens = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = pieces(Words(), caption("cat", "traffic light"), tokens, tokenizer)
    assert len(found) == len(tokens)
    text, spans = offsets(tokens, tokenizer)
    assert "".join(piece.text for piece in found) == text
    assert text.replace(" ", "") == TEXT.replace(" ", "")
    assert [piece.start for piece in found[1:]] == [stop for _, stop in spans][:-1]
    assert words(found, G).replace("|", "").replace(" ", "") == "cattrafficlightcats"
    assert words(found, H).replace("|", "") == "dog"
    assert len(tokens) > len(TEXT.split()) + 2, "the tokenizer did not cut words: the test tests nothing"
    firsts = [piece for piece in found if piece.first and piece.label is not OTHER]
    assert [piece.mention for piece in firsts] == ["cat", "traffic light", "cats", "dog"]
    assert (found[-1].label, found[-1].text, found[-1].first) == (OTHER, "", False)


def test_later_pieces_of_plain_words_are_not_first() -> None:
    tokenizer = trained("bytes")
    tokens = tokenizer(" sits by dogma", add_special_tokens=False)["input_ids"]
    found = pieces(Words(), caption(), tokens, tokenizer)
    assert sum(piece.first for piece in found) == 3
    assert all(piece.label is OTHER for piece in found), "dogma holds no dog"


def test_the_bytes_of_one_letter_share_its_place() -> None:
    tokenizer = trained("bytes")
    tokens = tokenizer("a pâté.", add_special_tokens=False)["input_ids"]
    found = pieces(Words(), caption(), tokens, tokenizer)
    marked = [piece for piece in found if piece.label is H]
    assert len(marked) == 6  # p, two bytes of a letter, t, two bytes of a letter
    assert {piece.mention for piece in marked} == {"pâté"}
    assert [piece.first for piece in marked] == [True] + [False] * 5
    assert all(piece.text.strip() for piece in marked)


def test_text_around_the_reply_is_stripped_as_for_scoring() -> None:
    tokenizer = trained("bytes")
    tokens = tokenizer("  \n cat ", add_special_tokens=False)["input_ids"]
    text, spans = offsets(tokens, tokenizer)
    assert text == "cat"
    assert "".join(text[start:stop] for start, stop in spans) == "cat"
    assert spans[0] == (0, 0)  # a space
    assert spans[-2][1] == 3  # the last piece of the word, before the last space
    assert spans[-2][0] < 3
    assert words(pieces(Words(), caption("cat"), tokens, tokenizer), G).replace("|", "") == "cat"
    assert label_tokens(Words(), caption("cat"), tokens, tokenizer).count(G) == sum(
        stop > start for start, stop in spans
    )


@pytest.mark.parametrize(
    ("reply", "label", "expected"),
    [
        ("Yes, there is a cat.", "yes", ("Yes", "")),
        ("No.", "no", ("No", "")),
        ("Yes.", "no", ("", "Yes")),
        ("No.", "yes", ("", "")),
        ("Perhaps.", "yes", ("", "")),
    ],
)
def test_only_the_answering_word_of_a_yes_no_reply_counts(reply: str, label: str, expected: tuple[str, str]) -> None:
    tokenizer = trained("bytes")
    tokens = tokenizer(reply, add_special_tokens=False)["input_ids"]
    found = pieces(Words(), question(label), tokens, tokenizer)
    assert tuple(words(found, kind).replace("|", "") for kind in (G, H)) == expected


def test_the_testbeds_own_words() -> None:
    benchmark = Testbed(limit=1, tasks=("chair",))
    (sample,) = benchmark.samples()
    present = sample.meta["objects"][0]
    absent = "drum" if "drum" not in sample.meta["objects"] else "boat"
    processor = AutoProcessor.from_pretrained(checkpoint_path())
    text = f"The {present} at top left is red. The {absent} at middle center is blue."
    tokens = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
    found = pieces(benchmark, sample, tokens, processor)
    assert words(found, G) == present
    assert words(found, H) == absent
    assert label_tokens(benchmark, sample, tokens, processor) == [piece.label for piece in found]
    boxes = benchmark.boxes(sample)
    assert present in boxes
    assert absent not in boxes
