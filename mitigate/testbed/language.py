"""What is said about scenes: captions, questions, answers, and the words of the objects."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, get_args

from mitigate.testbed.world import COLORS, COLUMNS, OBJECTS, ROWS, WORLD_SEED, Scene, Thing
from mitigate.testbed.world import scene as make_scene

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CAPTION_PROMPT: Final = "Describe the image."
"""The prompt that asks for a caption."""

QUESTION_TEMPLATE: Final = "Is there a {} in the image?"
"""The prompt that asks for an object."""

YES, NO = "Yes", "No"

QuestionKind = Literal["random", "popular", "adversarial"]
QUESTION_KINDS: Final[tuple[QuestionKind, ...]] = get_args(QuestionKind)

OBJECT_WORDS: Final[dict[str, str]] = {word: name for name in OBJECTS for word in (name, f"{name}s")} | {
    "knives": "knife",
    "fishes": "fish",
}
"""Word -> object class, for CHAIR: every class and its plural. The captions themselves use the singular alone."""

WORDS: Final[tuple[str, ...]] = (
    *("USER", "ASSISTANT", "Describe", "the", "image", "Is", "there", "a", "in", YES, NO, "The", "at", "is"),
    *ROWS,
    *COLUMNS,
    *COLORS,
    *OBJECTS,
)
"""Every word the world speaks, each of them one token; punctuation aside."""


@dataclass(frozen=True)
class Question:
    """One yes/no question about a scene.

    Attributes
    ----------
    scene_id
        Scene it is about.
    object
        Class it asks for.
    label
        Right answer.
    text
        The prompt.
    kind
        How the objects of the "no" questions were chosen.
    """

    scene_id: str
    object: str
    label: Literal["yes", "no"]
    text: str
    kind: QuestionKind


def sentence(thing: Thing) -> str:
    """Say one thing with object, place and colour, such as ``The cup at top left is red.``."""
    return f"The {thing.name} at {thing.place} is {thing.color}."


def caption(scene: Scene) -> str:
    """Return the true caption: one sentence per object in theme order, so that mates and partners follow each other."""
    return " ".join(sentence(thing) for thing in scene.things)


def sentences(text: str) -> list[str]:
    """Split a caption into its sentences, without the full stops."""
    return [part.strip() for part in text.split(".") if part.strip()]


def mentioned(text: str) -> list[str]:
    """Object classes named in a text, in order, repetitions kept."""
    return [OBJECT_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in OBJECT_WORDS]


def question_text(name: str) -> str:
    """Return the yes/no question for an object."""
    return QUESTION_TEMPLATE.format(name)


@lru_cache(maxsize=8)
def _statistics(count: int, seed: int) -> tuple[Counter[str], dict[str, Counter[str]]]:
    frequency: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {name: Counter() for name in OBJECTS}
    for index in range(count):
        present = make_scene("train", index, seed=seed).objects
        frequency.update(present)
        for name in present:
            together[name].update(present - {name})
    return frequency, together


def _negatives(
    scene: Scene, kind: QuestionKind, count: int, frequency: Counter[str], together: dict[str, Counter[str]]
) -> list[str]:
    absent = [name for name in OBJECTS if name not in scene.objects]
    # The scene's own stream of random numbers: the questions about a scene do not depend on the scenes before it.
    rng = random.Random(f"mitigate-questions/{scene.id}/{scene.noise_seed}/{kind}")
    chance = {name: rng.random() for name in absent}
    if kind == "random":
        return sorted(absent, key=lambda name: chance[name])[:count]
    if kind == "popular":
        return sorted(absent, key=lambda name: (-frequency[name], chance[name]))[:count]
    pull = {name: sum(together[other][name] / frequency[other] for other in scene.objects) for name in absent}
    return sorted(absent, key=lambda name: (-pull[name], chance[name]))[:count]


def pope_questions(
    scenes: Iterable[Scene],
    split: QuestionKind = "random",
    *,
    per_label: int = 3,
    reference: int = 2000,
    seed: int = WORLD_SEED,
) -> list[Question]:
    """Balanced yes/no questions, built as POPE builds them.

    Each scene gets the same number of "yes" questions (about objects in it) and "no" questions. The objects of the
    "no" questions are drawn at random, or are the most frequent objects of the training scenes that are absent
    (popular), or the absent ones that most often come along with what is present (adversarial).

    Parameters
    ----------
    scenes
        Scenes to ask about.
    split
        How the "no" questions are chosen.
    per_label
        Questions per label and scene; fewer, for both labels alike, where a scene has fewer objects.
    reference
        Number of training scenes that frequency and co-occurrence are counted on.
    seed
        Seed of the world the counts are taken in.

    Raises
    ------
    ValueError
        If the split is unknown.
    """
    if split not in QUESTION_KINDS:
        raise ValueError(f"unknown question split {split!r}; it must be one of {', '.join(QUESTION_KINDS)}")
    frequency, together = _statistics(reference, seed)
    questions: list[Question] = []
    for scene in scenes:
        rng = random.Random(f"mitigate-questions/{scene.id}/{scene.noise_seed}/yes")
        order = {thing.name: rng.random() for thing in scene.things}
        positives = sorted(order, key=lambda name: order[name])[:per_label]
        negatives = _negatives(scene, split, len(positives), frequency, together)
        for yes, no in zip(positives, negatives, strict=True):
            questions.append(Question(scene.id, yes, "yes", question_text(yes), split))
            questions.append(Question(scene.id, no, "no", question_text(no), split))
    return questions


def object_table() -> dict[str, Sequence[str]]:
    """Object class -> the words that mean it, the class name first."""
    table: dict[str, list[str]] = {name: [name] for name in OBJECTS}
    for word, name in OBJECT_WORDS.items():
        if word != name:
            table[name].append(word)
    return {name: tuple(words) for name, words in table.items()}
