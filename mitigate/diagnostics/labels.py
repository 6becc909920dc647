"""Which generated tokens are right and which are hallucinated, from the benchmark's own ground truth.

A benchmark marks spans of a reply (`Benchmark.marked`); here they are carried over to tokens through character
offsets, so that word pieces, plurals and names of several words need no special treatment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark, Sample
    from mitigate.records import SampleRecord

_ANSWER = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class Label(StrEnum):
    """What a generated token is, by the benchmark's ground truth."""

    GROUNDED = "grounded"
    HALLUCINATED = "hallucinated"
    OTHER = "other"


@dataclass(frozen=True)
class Piece:
    """A generated token in its reply.

    Parameters
    ----------
    start, stop
        Its characters ``text[start:stop]``, the space before it included; empty for tokens that are not shown.
    text
        These characters.
    label
        What it is.
    first
        Whether it is the first piece of its word or of its marked span.
    mention
        The marked span it belongs to, in lower case; empty outside.
    """

    start: int
    stop: int
    text: str
    label: Label = Label.OTHER
    first: bool = False
    mention: str = ""


def label_tokens(
    benchmark: Benchmark, sample: Sample | SampleRecord, tokens: Sequence[int], tokenizer: Any
) -> list[Label]:
    """Return one label per generated token; see `pieces`."""
    return [piece.label for piece in pieces(benchmark, sample, tokens, tokenizer)]


def pieces(benchmark: Benchmark, sample: Sample | SampleRecord, tokens: Sequence[int], tokenizer: Any) -> list[Piece]:
    """Place the generated tokens in their reply and label them.

    A token is grounded or hallucinated when one of its visible characters lies in a span so marked. Of a yes/no reply
    only the answering word counts: grounded if it is right, hallucinated if it is a wrong "yes", which claims what is
    not there. A wrong "no" claims nothing: other.

    Parameters
    ----------
    benchmark
        Marks the reply.
    sample
        What was asked; carries the ground truth.
    tokens
        Generated ids, the end token included.
    tokenizer
        Whatever has ``decode(ids, skip_special_tokens=True)``: a tokenizer or a processor.
    """
    text, spans = offsets(tokens, tokenizer)
    marked = [(start, stop, kind) for start, stop, kind in _marked(benchmark, sample, text) if kind is not Label.OTHER]
    found: list[Piece] = []
    begun: set[int] = set()
    for start, stop in spans:
        piece = Piece(start, stop, text[start:stop])
        visible = start + len(piece.text) - len(piece.text.lstrip())
        if visible < stop:
            piece = _labelled(piece, visible, text, marked, begun)
        found.append(piece)
    return found


def _labelled(
    piece: Piece, visible: int, text: str, marked: Sequence[tuple[int, int, Label]], begun: set[int]
) -> Piece:
    """Label one piece whose first visible character is at ``visible``; a hallucination wins over what is right."""
    touched = [span for span in marked if span[0] < piece.stop and visible < span[1]]
    if not touched:
        inside = visible > 0 and text[visible - 1].isalnum() and text[visible].isalnum()
        return replace(piece, first=not inside)
    start, stop, label = min(touched, key=lambda span: (span[2] is not Label.HALLUCINATED, span[0]))
    first = start not in begun
    begun.add(start)
    return replace(piece, label=label, first=first, mention=text[start:stop].lower())


def offsets(tokens: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the reply as it is scored and, per token, the characters that its coming adds.

    The reply is decoded prefix by prefix, since the text of a token depends on its neighbours. A token that only
    begins a character (bytes of a letter outside the vocabulary) gets the place of the token that completes it.

    Returns
    -------
    tuple
        The stripped text, and ``(start, stop)`` per token; ``start == stop`` for tokens that are not shown.
    """
    whole = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    text = whole.strip()
    shift = len(whole) - len(whole.lstrip())
    ends = [0]
    for count in range(1, len(tokens) + 1):
        part = str(tokenizer.decode(list(tokens[:count]), skip_special_tokens=True))
        ends.append(max(ends[-1], _shared(part, whole)))
    spans = []
    for index, token in enumerate(tokens):
        start, stop = ends[index], ends[index + 1]
        if start == stop and _is_shown(token, tokenizer):
            stop = next((end for end in ends[index + 1 :] if end > start), stop)
        spans.append(tuple(min(max(place - shift, 0), len(text)) for place in (start, stop)))
    return text, [(start, stop) for start, stop in spans]


def _shared(part: str, whole: str) -> int:
    """Return how many characters two texts share from the start."""
    if whole.startswith(part):
        return len(part)
    return next(place for place, pair in enumerate(zip(part, f"{whole}\0", strict=False)) if pair[0] != pair[1])


def _is_shown(token: int, tokenizer: Any) -> bool:
    return bool(str(tokenizer.decode([int(token)], skip_special_tokens=True)))


def _marked(benchmark: Benchmark, sample: Sample | SampleRecord, text: str) -> list[tuple[int, int, Label]]:
    """Return the benchmark's spans as ``(start, stop, label)``."""
    kinds = {"correct": Label.GROUNDED, "hallucinated": Label.HALLUCINATED}
    spans, place = [], 0
    for span in benchmark.marked(sample, text):
        spans.append((place, place + len(span.text), kinds.get(span.kind, Label.OTHER)))
        place += len(span.text)
    if sample.task != "yes_no":
        return spans
    answer = _ANSWER.search(text)
    if answer is None:
        return []
    label = next((kind for start, stop, kind in spans if start <= answer.start() < stop), Label.OTHER)
    if label is Label.HALLUCINATED and answer.group().lower() == "no":
        label = Label.OTHER
    return [(answer.start(), answer.end(), label)]
