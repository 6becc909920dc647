"""Captions, questions, and the words of the objects."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitigate.testbed.language import (
    OBJECT_WORDS,
    QUESTION_KINDS,
    caption,
    mentioned,
    object_table,
    pope_questions,
    sentences,
)
from mitigate.testbed.world import OBJECTS, PARTNER, SPLITS, THEME_OF, scene, scenes

PICTURES = list(scenes("test", 200))


@given(split=st.sampled_from(SPLITS), index=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_captions_say_exactly_what_is_there(split: str, index: int) -> None:
    made = scene(split, index)
    text = caption(made)
    assert mentioned(text) == [thing.name for thing in made.things]
    parts = sentences(text)
    assert len(parts) == len(made.things)
    for part, thing in zip(parts, made.things, strict=True):
        assert thing.name in part
        assert thing.color in part
        assert thing.place in part


def test_mentions_keep_order_and_repetition_and_know_plurals() -> None:
    assert mentioned("Two knives, a Cup and a cup; cupboards do not count.") == ["knife", "cup", "cup"]
    assert set(OBJECT_WORDS.values()) == set(OBJECTS)
    assert object_table()["knife"] == ("knife", "knifes", "knives")


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_questions_are_balanced_and_right(kind: str) -> None:
    questions = pope_questions(PICTURES, kind)
    truth = {made.id: made.objects for made in PICTURES}
    per_scene: dict[str, Counter[str]] = {made.id: Counter() for made in PICTURES}
    for question in questions:
        assert (question.object in truth[question.scene_id]) == (question.label == "yes")
        assert question.text == f"Is there a {question.object} in the image?"
        assert question.kind == kind
        per_scene[question.scene_id][question.label] += 1
    for made in PICTURES:
        wanted = min(3, len(made.objects))
        assert per_scene[made.id] == {"yes": wanted, "no": wanted}
    assert len({(q.scene_id, q.object) for q in questions}) == len(questions)


def test_questions_about_a_scene_do_not_depend_on_the_others() -> None:
    alone = pope_questions(PICTURES[7:8], "random")
    among = [q for q in pope_questions(PICTURES, "random") if q.scene_id == PICTURES[7].id]
    assert alone == among


def test_adversarial_questions_ask_for_what_usually_comes_along() -> None:
    def shares(kind: str) -> tuple[float, float]:
        truth = {made.id: made.objects for made in PICTURES}
        asked = [q for q in pope_questions(PICTURES, kind) if q.label == "no"]
        partner = sum(PARTNER[q.object] in truth[q.scene_id] for q in asked) / len(asked)
        related = sum(any(THEME_OF[o] == THEME_OF[q.object] for o in truth[q.scene_id]) for q in asked) / len(asked)
        return partner, related

    assert shares("adversarial")[0] > 0.8
    assert shares("adversarial")[1] > 0.95
    assert shares("random")[0] < 0.5


def test_popular_questions_ask_for_frequent_objects() -> None:
    frequency = Counter(name for made in scenes("train", 2000) for name in made.objects)
    asked = {kind: [q.object for q in pope_questions(PICTURES, kind) if q.label == "no"] for kind in QUESTION_KINDS}
    mean = {kind: sum(frequency[name] for name in names) / len(names) for kind, names in asked.items()}
    assert mean["popular"] > mean["random"]


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown question split 'hard'"):
        pope_questions(PICTURES[:1], "hard")
