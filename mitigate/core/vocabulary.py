"""What a token is as text: does it begin a word, does it carry content, is it special."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: English function words: they say how a sentence is built, not what is in a picture.
FUNCTION_WORDS = frozenset(
    """
    a about above across after again against all along also although am among an and another any are around as at away
    be because been before behind being below beneath beside besides between beyond both but by can could did do does
    doing down during each either else every few for from further had has have having he her here hers him his how i if
    in inside into is it its itself just may me might more most must my near neither next no nor not of off on one ones
    only onto or other others our ours out outside over own per rather same shall she should since so some still such
    than that the their theirs them then there these they this those through to together too toward towards under until
    up upon us very was we were what when where whether which while who whom whose why will with within without would
    yet you your yours
    """.split()  # noqa: SIM905 - one word after another reads better
)
#: Marks with which tokenizers begin a word: a blank (byte-level BPE) and the lower one eighth block (SentencePiece).
_WORD_MARKS = ("\u0120", "\u2581")
#: Mark with which WordPiece continues one.
_CONTINUES = "##"


@dataclass(frozen=True)
class Vocabulary:
    """Classes of tokens, one bool per token id.

    Parameters
    ----------
    word_start
        ``[V]`` tokens that begin a word (letters or digits after a word boundary).
    content
        ``[V]`` tokens that begin a word which is no English function word.
    special
        ``[V]`` the tokenizer's special tokens.
    """

    word_start: Tensor
    content: Tensor
    special: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device) -> Vocabulary:
        """Classify every token of a tokenizer.

        Parameters
        ----------
        size
            Number of logits V; ids the tokenizer does not know are in no class.
        """
        known = min(len(tokenizer), size)
        pieces = [str(piece or "") for piece in tokenizer.convert_ids_to_tokens(list(range(known)))]
        marks = [mark for mark in _WORD_MARKS if any(piece.startswith(mark) for piece in pieces)]
        special = set(tokenizer.all_special_ids)
        word_start = torch.zeros(size, dtype=torch.bool)
        content = torch.zeros(size, dtype=torch.bool)
        for token, piece in enumerate(pieces):
            begins = piece.startswith(tuple(marks)) if marks else not piece.startswith(_CONTINUES)
            word = piece.lstrip("".join(_WORD_MARKS))
            if token not in special and begins and word[:1].isalnum():
                word_start[token] = True
                content[token] = word.lower() not in FUNCTION_WORDS
        specials = torch.tensor(sorted(token for token in special if token < size), dtype=torch.long)
        mask = torch.zeros(size, dtype=torch.bool).scatter(0, specials, True)
        return cls(word_start.to(device), content.to(device), mask.to(device))
