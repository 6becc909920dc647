"""What a position of the sequence is. Needs no torch, so that a method can say which ones it touches."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """Role of a position in the padded sequence.

    ``SYSTEM`` is text before the sample's first image, ``PROMPT`` prompt text after it (also between images); a prompt
    without an image is all ``PROMPT``. ``IMAGE`` is every token in whose place the model puts something of an image,
    ``SEPARATOR`` a text token of an image's structure: its begin and end, marks between its tiles or frames.
    """

    PAD = 0
    SYSTEM = 1
    IMAGE = 2
    SEPARATOR = 3
    PROMPT = 4
    GENERATED = 5
