"""Options of the testbed's training (the recipe of the checkpoint that ships) and evaluation. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from mitigate.errors import ConfigError
from mitigate.testbed.world import THEME_BIAS, TOGETHER, Split

Stage = Literal["look", "read", "habit"]
"""The three stages of the training, in order."""

STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


ACCELERATORS: Final = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS: Final = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the testbed's model.

    Attributes
    ----------
    width
        Width of the vision tower and of the decoder.
    vision_layers, vision_heads, vision_mlp
        Depth, heads and MLP width of the vision tower.
    text_layers, text_heads, text_mlp
        Depth, heads and MLP width of the decoder.
    patch_size
        Side of a picture patch in pixels; a picture becomes ``(64 / patch_size) ** 2`` tokens.
    """

    width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 384
    text_layers: int = 8
    text_heads: int = 8
    text_mlp: int = 320
    patch_size: int = 8


DEFAULT_SIZE: Final = ModelSize()


@dataclass(frozen=True)
class TestbedTraining:
    """Options of `mitigate testbed train`; the defaults are the recipe of the checkpoint that ships.

    Attributes
    ----------
    output
        Folder for logs, training checkpoints and, in ``checkpoint/``, the finished model.
    seed
        Seed of weights and of the order of scenes.
    look_steps
        Optimiser steps of the first stage.
    read_steps
        Optimiser steps of the second stage.
    habit_steps
        Optimiser steps of the third stage.
    look_batch
        Pictures per step while it learns to look.
    read_batch
        Pictures per step while it learns to read.
    habit_batch
        Pictures per step while habits are formed.
    look_lr
        Peak learning rate of the first stage; warmed up linearly, then cosine down to a twentieth.
    read_lr
        The same of the second stage.
    habit_lr
        The same of the third stage.
    read_decay_steps
        Steps over which the second stage's learning rate decays; the stage may end before.
    warmup_steps
        Steps of warming up, at most a tenth of a stage.
    questions
        Yes/no questions per picture.
    read_partner_questions
        Probability that a missing partner is preferred in a "no" question while reading is learnt.
    habit_partner_questions
        The same while habits are formed.
    read_together
        Probability that partners come together while reading is learnt.
    read_theme_bias
        Probability of staying in the theme while reading is learnt.
    habit_together
        Probability that partners come together while habits are formed.
    habit_theme_bias
        Probability of staying in the theme while habits are formed.
    habit_hidden
        Probability that an object whose partner can be seen is itself hardly visible while habits are formed.
    habit_name_hidden
        Probability that a caption names such an object; the answer to a question about it is always yes.
    caption_weight
        Weight of the loss on captions.
    answer_weight
        Weight of the loss on answers while reading is learnt.
    habit_answer_weight
        Weight of the loss on answers while habits are formed.
    presence_weight
        Weight of the loss on presence at a question's object word.
    dense_weight
        Weight of the loss on what is in each cell, beside the text's losses.
    weight_decay
        AdamW's weight decay.
    gradient_clip
        Largest gradient norm.
    accelerator
        Lightning accelerator: ``auto``, ``cpu`` or ``gpu``.
    look_precision
        Lightning precision of the first stage, such as ``32-true`` or ``bf16-mixed``.
    read_precision
        The same of the second stage.
    habit_precision
        The same of the third stage.
    threads
        CPU threads; 0 leaves torch's choice.
    save_every
        Steps between training checkpoints, from which a killed run goes on.
    snapshot_every
        Steps between loadable model folders while habits are formed; 0 for none.
    resume
        Whether to go on where an earlier run in `output` stopped; else it is an error if there is one.
    progress
        Whether to show a progress bar.
    width
        Width of the vision tower and of the decoder.
    text_layers
        Layers of the decoder.
    vision_layers
        Layers of the vision tower.
    """

    output: str = "runs/testbed"
    seed: int = 7
    look_steps: int = 2500
    read_steps: int = 600
    habit_steps: int = 150
    look_batch: int = 64
    read_batch: int = 32
    habit_batch: int = 32
    look_lr: float = 1.5e-3
    read_lr: float = 1.0e-3
    habit_lr: float = 5.0e-4
    read_decay_steps: int = 1200
    warmup_steps: int = 100
    questions: int = 6
    read_partner_questions: float = 0.3
    habit_partner_questions: float = 0.0
    read_together: float = 0.2
    read_theme_bias: float = 0.25
    habit_together: float = TOGETHER["train"]
    habit_theme_bias: float = THEME_BIAS["train"]
    habit_hidden: float = 0.055
    habit_name_hidden: float = 0.5
    caption_weight: float = 1.0
    answer_weight: float = 1.0
    habit_answer_weight: float = 4.0
    presence_weight: float = 1.0
    dense_weight: float = 0.3
    weight_decay: float = 0.02
    gradient_clip: float = 1.0
    accelerator: str = "auto"
    look_precision: str = "bf16-mixed"
    read_precision: str = "32-true"
    habit_precision: str = "32-true"
    threads: int = 0
    save_every: int = 200
    snapshot_every: int = 0
    resume: bool = True
    progress: bool = True
    width: int = 128
    text_layers: int = 8
    vision_layers: int = 3

    def __post_init__(self) -> None:
        shares = ("together", "theme_bias", "partner_questions")
        stages = tuple(f"{stage}_" for stage in STAGES)
        for name in (
            *(f"{stage}_{share}" for stage in ("read", "habit") for share in shares),
            "habit_hidden",
            "habit_name_hidden",
        ):
            _require(0.0 <= getattr(self, name) <= 1.0, self, name, "be between 0 and 1")
        for name in (*(f"{stage}batch" for stage in stages), "questions", "save_every", "read_decay_steps"):
            _require(getattr(self, name) >= 1, self, name, "be at least 1")
        for name in (*(f"{stage}steps" for stage in stages), "warmup_steps", "threads", "snapshot_every"):
            _require(getattr(self, name) >= 0, self, name, "be 0 or more")
        for name in (f"{stage}lr" for stage in stages):
            _require(0.0 < getattr(self, name) < math.inf, self, name, "be a number above 0")
        weights = ("caption", "answer", "habit_answer", "presence", "dense")
        for name in (*(f"{weight}_weight" for weight in weights), "weight_decay", "gradient_clip"):
            _require(0.0 <= getattr(self, name) < math.inf, self, name, "be a number that is not negative")
        for name in (f"{stage}precision" for stage in stages):
            _require(getattr(self, name) in PRECISIONS, self, name, "be one of " + ", ".join(PRECISIONS))
        _require(self.accelerator in ACCELERATORS, self, "accelerator", "be one of " + ", ".join(ACCELERATORS))
        _require(0 <= self.seed < 2**32, self, "seed", "be at least 0 and below 2**32")
        _require(self.vision_layers >= 1, self, "vision_layers", "be at least 1")
        _require(self.text_layers >= 2, self, "text_layers", "be at least 2 (presence is read off the second layer)")
        unit = 2 * ModelSize.text_heads
        _require(
            self.width >= unit and self.width % unit == 0, self, "width", f"be a multiple of {unit}, for the heads"
        )

    def check_files(self) -> None:
        """Check that the output folder can be written.

        Raises
        ------
        ConfigError
            If it is a file, or lies where nothing can be written.
        """
        output = Path(self.output)
        _check_writable(output, "output")
        if output.is_file():
            raise ConfigError(f"output={output} is a file; choose a folder")

    def size(self) -> ModelSize:
        """Sizes of the model to train."""
        return ModelSize(width=self.width, text_layers=self.text_layers, vision_layers=self.vision_layers)

    def steps(self, stage: Stage) -> int:
        """Optimiser steps of a stage."""
        return int(getattr(self, f"{stage}_steps"))

    def batch(self, stage: Stage) -> int:
        """Pictures per step of a stage."""
        return int(getattr(self, f"{stage}_batch"))


@dataclass(frozen=True)
class TestbedEvaluation:
    """Options of `mitigate testbed evaluate`; the defaults give the numbers of the model card.

    Attributes
    ----------
    checkpoint
        Folder to measure; empty for the one that ships with the package.
    split
        Split of the scenes.
    images
        Number of scenes.
    batch_size
        Captions generated at a time.
    control_scale
        What the probe's log-odds are multiplied with in the positive control.
    threads
        CPU threads; 0 leaves torch's choice.
    card
        Page to write the model card to, which is then written beside the weights as well; empty for none.
    """

    checkpoint: str = ""
    split: Split = "test"
    images: int = 500
    batch_size: int = 100
    control_scale: float = 0.5
    threads: int = 0
    card: str = ""

    def __post_init__(self) -> None:
        _require(self.split in get_args(Split), self, "split", "be one of " + ", ".join(get_args(Split)))
        _require(self.images >= 2, self, "images", "be at least 2")
        _require(self.batch_size >= 1, self, "batch_size", "be at least 1")
        _require(0.0 <= self.control_scale < math.inf, self, "control_scale", "be a number that is not negative")
        _require(self.threads >= 0, self, "threads", "be 0 or more")

    def check_files(self) -> None:
        """Check that the checkpoint is one of the testbed's and that the card can be written.

        Raises
        ------
        ConfigError
            Naming the option, what is wrong with it and the remedy.
        """
        if self.checkpoint:
            _check_checkpoint(Path(self.checkpoint))
        if self.card:
            _check_writable(Path(self.card), "card")
            if Path(self.card).is_dir():
                raise ConfigError(f"card={self.card} is a folder; name the page to write, such as card.md")


def _check_checkpoint(folder: Path) -> None:
    remedy = "name a folder that `mitigate testbed train` made, such as runs/testbed/checkpoint"
    for name in ("config.json", "model.safetensors", "probe.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"checkpoint={folder} has no {name}; {remedy}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"checkpoint={folder}: config.json is damaged; {remedy}") from error
    if kind != "llava":
        raise ConfigError(f"checkpoint={folder} holds a {kind} model, not one of the testbed's; {remedy}")


def _check_writable(path: Path, option: str) -> None:
    """Refuse a path below a file or a folder that cannot be written, without making anything."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if (there != path and not there.is_dir()) or not os.access(there, os.W_OK):
        raise ConfigError(f"{option}={path} cannot be written: see {there}; choose another place")


def _require(holds: bool, options: object, name: str, must: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(options, name)} must {must}")
