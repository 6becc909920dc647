"""Options of the testbed's training: the recipe of the checkpoint that ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from mitigate.testbed.model import ModelSize
from mitigate.testbed.world import THEME_BIAS, TOGETHER

Stage = Literal["look", "read", "habit"]
"""The three stages of the training, in order."""

STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


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
        for name in (
            *(f"{stage}_{share}" for stage in ("read", "habit") for share in shares),
            "habit_hidden",
            "habit_name_hidden",
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, but is {getattr(self, name)}")
        for name in ("look_batch", "read_batch", "habit_batch", "questions", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")

    def size(self) -> ModelSize:
        """Sizes of the model to train."""
        return ModelSize(width=self.width, text_layers=self.text_layers, vision_layers=self.vision_layers)

    def steps(self, stage: Stage) -> int:
        """Optimiser steps of a stage."""
        return int(getattr(self, f"{stage}_steps"))

    def batch(self, stage: Stage) -> int:
        """Pictures per step of a stage."""
        return int(getattr(self, f"{stage}_batch"))
