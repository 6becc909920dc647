from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from mitigate.report.html import render
from mitigate.report.markdown import markdown
from mitigate.report.pictures import collect, thumbnail
from mitigate.report.provenance import judges_of
from mitigate.report.samples import choose_samples, what_methods_did
from tests.report.worlds import Run, Words, World, made_comparison, record


def states(choice: Any) -> dict[str, dict[str, list[str]]]:
    return {sample.record.id: dict(sample.states) for sample in choice.shown}


def test_an_answer_is_fixed_or_broken_by_its_errors_and_changed_by_its_text() -> None:
    choice = choose_samples(Words(), World().runs(), "none")
    assert states(choice) == {
        "p1/fixed": {"good": ["changed", "fixed"]},
        "p2/broken": {"good": ["changed", "broken"]},
        "p1/question": {"good": ["changed", "fixed"]},
        "p3/changed": {"good": ["changed"]},
        "p4/same": {},
        "p5/same": {},
    }
    assert choice.total == 6
    assert list(choice.tally.values()) == [(3, 3), (1, 1), (2, 2)]


def test_the_telling_samples_come_first_and_the_rest_is_drawn_with_a_seed() -> None:
    answers = {f"s{index}": record(f"s{index}", "cat") for index in range(50)}
    runs = [Run("none", answers), Run("good", {**answers, "s33": record("s33", "dog"), "s7": record("s7", "the cat")})]
    first = choose_samples(Words(), runs, "none", limit=6, seed=0)
    assert [sample.record.id for sample in first.shown][:2] == ["s33", "s7"]
    drawn = [
        {sample.record.id for sample in choose_samples(Words(), runs, "none", limit=6, seed=n).shown} for n in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(each) == 6 and {"s33", "s7"} <= each for each in drawn)
    assert list(first.tally.values()) == [(1, 1), (1, 1), (4, 48)]


def test_more_changes_than_places_are_chosen_by_chance_not_by_order() -> None:
    before = {f"s{index}": record(f"s{index}", "cat") for index in range(40)}
    after = {key: record(key, "dog") for key in before}
    choice = choose_samples(Words(), [Run("none", before), Run("good", after)], "none", limit=5)
    chosen = [sample.record.id for sample in choice.shown]
    assert len(chosen) == 5
    assert chosen != list(before)[:5]
    assert next(iter(choice.tally.values())) == (5, 40)
    assert choose_samples(Words(), [Run("none", before)], "none", limit=0).shown == []


def test_errors_are_asked_once_per_answer_and_the_baseline_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Words, "errors", lambda self, answer: asked.append(answer.text))
    texts = {"first": "a cat", "none": "a dog", "second": "a bird"}
    runs = [Run(stack, {"a": record("a", text)}) for stack, text in texts.items()]
    (sample,) = choose_samples(Words(), runs, "none").shown
    assert sorted(asked) == sorted(texts.values())
    assert [line.givers[0][0] for line in sample.lines] == ["none", "first", "second"]


def test_a_failure_is_shown_and_no_change() -> None:
    failed = record("a", "", error="out of memory")
    choice = choose_samples(Words(), [Run("none", {"a": record("a", "cat")}), Run("good", {"a": failed})], "none")
    (sample,) = choice.shown
    assert sample.states == {"good": ["failed"]}
    assert [(line.error, line.givers) for line in sample.lines] == [
        ("", [("none", "none")]),
        ("out of memory", [("good", "good")]),
    ]


def test_what_a_judge_said_is_shown_and_who_it_was() -> None:
    runs = [
        Run(stack, {"a": record("a", "cat", meta={"judge": name, "judge_reply": said})})
        for stack, name, said in (("none", "judge-1", "Rating: 3"), ("good", "judge-2", "Rating: 4"))
    ]
    (sample,) = choose_samples(Words(), runs, "none").shown
    assert [(line.verdict, line.givers[0][0]) for line in sample.lines] == [
        ("Rating: 3", "none"),
        ("Rating: 4", "good"),
    ]
    judges = judges_of([*runs, Run("quiet", {"a": record("a", "cat")})])
    assert judges == {"none": ["judge-1"], "good": ["judge-2"]}
    html = render(made_comparison(), choose_samples(Words(), runs, "none"), judges=judges)
    assert "<summary>What the judge said</summary>Rating: 4<" in html
    assert "<dt>judged by</dt><dd><code>judge-2</code></dd>" in html
    assert "* judged by: judge-1" in markdown(made_comparison(), judges=judges)


def test_seeds_of_one_stack_are_compared_to_the_same_seed_and_named() -> None:
    runs = [
        Run("none", {"a": record("a", "dog")}, seed=0),
        Run("none", {"a": record("a", "cat")}, seed=1),
        Run("good", {"a": record("a", "dog")}, seed=0),
        Run("good", {"a": record("a", "the cat")}, seed=1),
    ]
    (sample,) = choose_samples(Words(), runs, "none").shown
    assert sample.states == {"good": ["changed"]}  # with seed 1; against seed 0 it would be fixed
    assert [label for line in sample.lines for _, label in line.givers] == [
        "none, seed 0",
        "good, seed 0",
        "none, seed 1",
        "good, seed 1",
    ]


def test_without_a_baseline_nothing_changed() -> None:
    choice = choose_samples(Words(), World().runs()[1:2], None)
    assert all(value == {} for value in states(choice).values())


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        ({"rows_edited": 4.0, "l1_change": 0.5}, ["attention rows edited: 4 of 8", "mean L1 change of a row: 0.125"]),
        ({"tokens_changed": 2.0, "seconds": 3.0}, ["tokens changed: 2"]),
        ({"extra_forwards": 3.0, "rejections": 0.0}, ["changed nothing", "extra forwards: 3"]),
        ({}, ["changed nothing"]),
    ],
)
def test_what_a_method_did_is_said_in_words(counters: dict[str, float], said: list[str]) -> None:
    assert what_methods_did({"beta": counters, "bus": {"attention_rows": 8.0}}) == {"beta": said}


def test_thumbnails_are_small_and_small_pictures_exact() -> None:
    photo = thumbnail(Image.effect_noise((3000, 2000), 90))
    assert (photo.width, photo.height, photo.pixelated) == (384, 256, False)
    assert photo.url.startswith("data:image/jpeg;base64,")
    assert len(photo.url) < 100_000
    drawn = thumbnail(Image.new("RGBA", (48, 32), "red"))
    assert (drawn.width, drawn.height, drawn.pixelated) == (48, 32, True)
    assert drawn.url.startswith("data:image/png;base64,")


def test_pictures_stop_at_their_budget_and_missing_data_is_told() -> None:
    records = [record(f"s{index}", "cat", image=f"p{index // 2}") for index in range(8)]
    whole = collect(Words(), records)
    assert [len(made) for made in whole.pictures.values()] == [1, 1, 1, 1]
    one = len(whole.pictures["p0"][0].url)
    capped = collect(Words(), records, budget=one + 1)
    assert [len(made) for made in capped.pictures.values()] == [1, 1, 0, 0]
    assert capped.left_out == 2
    missing = collect(Words(broken=True), records)
    assert missing.pictures == {}
    assert set(missing.unreadable.values()) == {"data/words does not exist; get it"}
