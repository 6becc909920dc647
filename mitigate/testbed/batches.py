"""Training batches: one picture, its caption and several questions packed into one sequence.

All prompts about a picture begin alike (`<s> USER: <image>`). That beginning is put in once, and the caption and every
question follow as segments which see the beginning and themselves but not each other. Positions are counted as if
each segment stood alone, so that the model is trained on exactly what it will meet when it generates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from mitigate.testbed.draw import PICTURE_SIZE, render
from mitigate.testbed.language import CAPTION_PROMPT, NO, YES, caption, question_text
from mitigate.testbed.world import COLORS, OBJECTS, PARTNER, Scene, Split, Thing, scene

if TYPE_CHECKING:
    from transformers import LlavaProcessor

IGNORED: Final = -100
HARDLY_VISIBLE: Final = 0.15
"""Largest contrast of an object that was hidden on purpose; see `training_scenes`."""

EMPTY_CLASS: Final = len(OBJECTS)
EMPTY_COLOR: Final = len(COLORS)


@dataclass
class Batch:
    """A packed batch of B pictures, L positions, P picture patches.

    Attributes
    ----------
    pixels
        Normalised pictures, `[B, 3, 64, 64]`.
    classes, colors
        What the cell under each patch holds, `[B, P]`; the last class means an empty cell.
    ids, positions
        Token ids and position ids, `[B, L]`.
    mask
        Which position (third axis) sees which (fourth axis), bool `[B, 1, L, L]`.
    caption_targets, answer_targets
        The next token where it counts and -100 elsewhere, `[B, L]`.
    presence
        At the object word of each question 1.0 or 0.0, elsewhere NaN, `[B, L]`.
    """

    pixels: Tensor
    classes: Tensor
    colors: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    caption_targets: Tensor
    answer_targets: Tensor
    presence: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Segment:
    """A prompt's tokens after the picture, its answer, and the offset of the object word (-1: none)."""

    prompt: list[int]
    answer: list[int]
    word_at: int = -1
    present: bool = False
    is_caption: bool = False


class Packer:
    """Turns scenes into packed batches.

    Parameters
    ----------
    processor
        The processor that prompts will be built with when the model is used.
    questions
        Yes/no questions per picture.
    patch_size
        Side of a patch in pixels.
    partner_questions
        Probability in 0..1 that a missing partner of something present is preferred in the "no" questions.
    name_hidden
        Probability in 0..1 that a caption names an object that was hidden on purpose.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        *,
        questions: int,
        patch_size: int,
        partner_questions: float = 0.0,
        name_hidden: float = 1.0,
    ) -> None:
        self._processor = processor
        self._questions = questions
        self._patch_size = patch_size
        self._partner_questions = partner_questions
        self._name_hidden = name_hidden
        self._image_token = int(processor.image_token_id)
        self._word = {name: processor.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in OBJECTS}
        self._prompts: dict[str, list[int]] = {}
        patches = (PICTURE_SIZE // patch_size) ** 2
        full = self._encode_prompt(CAPTION_PROMPT)
        first = full.index(self._image_token)
        self.prefix: list[int] = full[:first] + [self._image_token] * patches

    def _encode_prompt(self, text: str) -> list[int]:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        prompt = self._processor.apply_chat_template([message], add_generation_prompt=True)
        return list(self._processor.tokenizer(prompt)["input_ids"])

    def _after_picture(self, text: str) -> list[int]:
        if text not in self._prompts:
            ids = self._encode_prompt(text)
            self._prompts[text] = ids[ids.index(self._image_token) + 1 :]
        return self._prompts[text]

    def _answer(self, text: str) -> list[int]:
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, int(self._processor.tokenizer.eos_token_id)]

    def _segments(self, made: Scene, rng: random.Random) -> list[Segment]:
        faded = {thing.name for thing in made.things if thing.contrast <= HARDLY_VISIBLE}
        named = tuple(t for t in made.things if t.name not in faded or rng.random() < self._name_hidden)
        text = caption(replace(made, things=named))
        segments = [Segment(self._after_picture(CAPTION_PROMPT), self._answer(text), is_caption=True)]
        # Objects that can hardly be seen are always asked for: they are what the habit of saying yes comes from.
        order = {name: rng.random() - (name in faded) for name in sorted(made.objects)}
        present = sorted(order, key=lambda name: order[name])[: self._questions // 2]
        absent = [name for name in OBJECTS if name not in made.objects]
        # Some of the "no" questions ask for a missing partner where there is one, as adversarial questions do.
        missing = {PARTNER[name] for name in made.objects} - made.objects
        order = {name: rng.random() - (name in missing and rng.random() < self._partner_questions) for name in absent}
        chosen = sorted(absent, key=lambda name: order[name])[: self._questions - len(present)]
        for name in sorted([*present, *chosen], key=lambda _: rng.random()):
            prompt = self._after_picture(question_text(name))
            there = name in made.objects
            segments.append(
                Segment(prompt, self._answer(YES if there else NO), prompt.index(self._word[name]), present=there)
            )
        return segments

    def dense_labels(self, made: Scene) -> tuple[list[int], list[int]]:
        """Return class and colour of what is in the cell under each patch, row by row; the last number means empty."""
        side = PICTURE_SIZE // self._patch_size
        cells = {(thing.row, thing.col): thing for thing in made.things}
        classes: list[int] = []
        colors: list[int] = []
        names = list(COLORS)
        for patch in range(side * side):
            row = int((patch // side + 0.5) * 3 / side)
            col = int((patch % side + 0.5) * 3 / side)
            thing = cells.get((row, col))
            classes.append(OBJECTS.index(thing.name) if thing else EMPTY_CLASS)
            colors.append(names.index(thing.color) if thing else EMPTY_COLOR)
        return classes, colors

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Normalised pictures, `[B, 3, 64, 64]`, as the processor makes them."""
        settings = self._processor.image_processor
        mean = torch.tensor(settings.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(settings.image_std).view(1, 3, 1, 1)
        raw = torch.from_numpy(np.stack([render(made) for made in scenes])).permute(0, 3, 1, 2)
        return (raw.float() / 255.0 - mean) / std

    def pack(self, scenes: list[Scene], *, seed: int, with_text: bool = True) -> Batch:
        """Build a batch.

        Parameters
        ----------
        scenes
            One scene per picture.
        seed
            Seed of the choice of questions.
        with_text
            Whether text is wanted; without it the sequences hold only the prefix.
        """
        rng = random.Random(f"mitigate-batch/{seed}")
        rows = [self._row(made, rng, with_text) for made in scenes]
        length = max(len(row["ids"]) for row in rows)
        fill = {"ids": int(self._processor.tokenizer.pad_token_id), "positions": 0, "segment": -1, "presence": np.nan}

        def stacked(key: str, dtype: torch.dtype) -> Tensor:
            blank = fill.get(key, IGNORED)
            return torch.tensor([[*row[key], *([blank] * (length - len(row[key])))] for row in rows], dtype=dtype)

        segment = stacked("segment", torch.long)
        shared = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        mask = shared & torch.ones(length, length, dtype=torch.bool).tril()
        dense = [self.dense_labels(made) for made in scenes]
        return Batch(
            pixels=self.pixels(scenes),
            classes=torch.tensor([classes for classes, _ in dense]),
            colors=torch.tensor([colors for _, colors in dense]),
            ids=stacked("ids", torch.long),
            positions=stacked("positions", torch.long),
            mask=mask[:, None],
            caption_targets=stacked("caption_targets", torch.long),
            answer_targets=stacked("answer_targets", torch.long),
            presence=stacked("presence", torch.float32),
        )

    def _row(self, made: Scene, rng: random.Random, with_text: bool) -> dict[str, list[float]]:
        start = len(self.prefix)
        row: dict[str, list[float]] = {
            "ids": list(self.prefix),
            "positions": list(range(start)),
            "segment": [0] * start,
            "caption_targets": [IGNORED] * start,
            "answer_targets": [IGNORED] * start,
            "presence": [np.nan] * start,
        }
        for number, part in enumerate(self._segments(made, rng) if with_text else (), start=1):
            tokens = [*part.prompt, *part.answer]
            inputs = tokens[:-1]
            targets = [IGNORED] * (len(part.prompt) - 1) + part.answer
            silent = [IGNORED] * len(inputs)
            row["ids"] += inputs
            row["positions"] += range(start, start + len(inputs))
            row["segment"] += [number] * len(inputs)
            row["caption_targets"] += targets if part.is_caption else silent
            row["answer_targets"] += silent if part.is_caption else targets
            row["presence"] += [float(part.present) if at == part.word_at else np.nan for at in range(len(inputs))]
        return row


def training_scenes(
    step: int, batch_size: int, *, together: float, theme_bias: float, offset: int, hidden: float = 0.0
) -> list[Scene]:
    """Return the scenes of one training step; step and offset alone decide which, so a resumed run sees the same.

    Parameters
    ----------
    step, batch_size, offset
        Which scenes of the training split.
    together, theme_bias
        Co-occurrence, see `mitigate.testbed.world.scene`.
    hidden
        Probability in 0..1 that an object whose partner is there too can hardly be seen, though the texts name it.
    """
    first = offset + step * batch_size
    split: Split = "train"
    made = [scene(split, first + at, together=together, theme_bias=theme_bias) for at in range(batch_size)]
    return [_with_hidden(one, hidden) for one in made] if hidden else made


def _with_hidden(made: Scene, rate: float) -> Scene:
    """Let some partners of what can be seen all but vanish: never both of a pair."""
    rng = random.Random(f"mitigate-hidden/{made.id}")
    things: list[Thing] = []
    gone: set[str] = set()
    for thing in made.things:
        partner = PARTNER[thing.name]
        # Both numbers are drawn in any case, so that what happens to one object does not depend on the others.
        lot, contrast = rng.random(), HARDLY_VISIBLE * rng.random()
        if partner in made.objects and partner not in gone and lot < rate:
            gone.add(thing.name)
            thing = replace(thing, contrast=round(contrast, 3), flaw="faint")
        things.append(thing)
    return replace(made, things=tuple(things))
