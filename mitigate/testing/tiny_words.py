"""What every tiny model shares: a tokenizer of a hundred words, and weights that attend far from uniformly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The first tokens of every tiny vocabulary.
PAD, BEGIN, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_WORDS = """
USER ASSISTANT : . , ? Yes No yes no is are there a an the in on of and or image picture describe this detail please
just answer question true false what who where how many color dog cat man woman car table person chair bottle cup tree
sky street red blue green two three red near left right big small
""".split()  # noqa: SIM905 - one word after another reads better
#: Special tokens a configuration names the same way as the tokenizer does.
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}


def tokenizer(
    special: Sequence[str], *, names: Mapping[str, str] | None = None, begins: bool = True
) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer that pads on the left.

    Parameters
    ----------
    special
        The family's own special tokens; their ids follow ``<pad> <s> </s> <unk>``, from 4 on, in this order.
    names
        Attributes under which the family's processor finds some of them (``image_token`` -> ``"<image>"``).
    begins
        Whether every prompt begins with ``<s>``.
    """
    marks = (*_SPECIAL, *special)
    words = [*marks, *dict.fromkeys(_WORDS)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in marks])
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(names or {}),
        padding_side="left",
    )


def randomise(model: PreTrainedModel, seed: int, never: Sequence[int]) -> None:
    """Draw weights under which attention is far from uniform; the global random state is left alone.

    Parameters
    ----------
    never
        Tokens that shall never be preferred: padding, placeholders.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2 and bool((parameter == parameter.flatten()[0]).all()):
                continue  # norms stay at one, biases at zero
            drawn = parameter.dim() < 2 or ("embed" in name and "patch" not in name)
            std = 1.0 if drawn else 1.6 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        model.get_output_embeddings().weight[list(never)] = 0.0
