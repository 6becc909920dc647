"""AMBER's files: read as they are, refused where they are damaged, scored to the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.amber import Amber
from mitigate.benchmarks.base import Sample, Span, check_samples
from mitigate.errors import ConfigError, DataError
from mitigate.metrics import amber as metric
from mitigate.metrics.amber_words import Noun, read_words
from mitigate.metrics.base import values
from mitigate.records import SampleRecord
from tests.benchmarks.official_amber import CAPTION, write_amber


@pytest.fixture
def data(tmp_path: Path) -> Path:
    read_words.cache_clear()
    return write_amber(tmp_path)


@pytest.fixture
def amber(data: Path, monkeypatch: pytest.MonkeyPatch) -> Amber:
    def nouns(text: str, vocabulary: frozenset[str]) -> tuple[Noun, ...]:  # all words, in place of nltk
        found = (Noun(word.group(), word.start(), word.end()) for word in re.finditer(r"\w+", text))
        return tuple(noun for noun in found if noun.lemma in vocabulary)

    monkeypatch.setattr(metric, "nouns", nouns)
    return Amber(data_dir=str(data.parent))


def answered(sample: Sample, text: str) -> SampleRecord:
    parts: dict[str, Any] = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt", "meta")}
    return SampleRecord(**parts, text=text, tokens=1, finished=True)


def right(sample: Sample) -> str:
    return " and ".join(sample.meta["truth"]) if sample.task == "caption" else sample.meta["truth"].capitalize()


def test_samples_are_those_of_the_files(amber: Amber) -> None:
    samples = amber.samples()
    check_samples(samples)
    assert [sample.id for sample in samples] == [str(number) for number in range(1, 10)]
    first, third = samples[0], samples[2]
    assert (first.task, first.image_id, first.prompt) == ("caption", "AMBER_1.jpg", CAPTION)
    assert first.meta == {"type": "generative", "truth": ["dog", "sky", "sea"], "hallu": ["cat", "person"]}
    assert (third.task, third.image_id, third.prompt) == ("yes_no", "AMBER_1.jpg", "Is the sky sunny in this image?")
    assert third.meta == {"type": "discriminative-attribute-state", "truth": "yes"}
    assert amber.images(first)[0].size == (12, 8)
    assert [amber.max_new_tokens(sample) for sample in (first, third)] == [None, 10]
    assert len(amber.data_hash()) == 64


@pytest.mark.parametrize(
    ("tasks", "ids"),
    [
        (["generative"], [1, 2]),
        (["existence"], [6, 7]),
        (["attribute"], [3, 4, 5]),
        (["relation"], [8, 9]),  # under both names
        (["relation", "existence"], [6, 7, 8, 9]),
    ],
)
def test_tasks_choose_samples(amber: Amber, tasks: list[str], ids: list[int]) -> None:
    chosen = Amber(tasks=tasks, data_dir=amber.data_dir)  # type: ignore[arg-type]
    assert [int(sample.id) for sample in chosen.samples()] == ids


def test_the_limit_counts_pictures(amber: Amber) -> None:
    few = Amber(limit=1, data_dir=amber.data_dir)
    assert [int(sample.id) for sample in few.samples()] == [1, 3, 4, 6, 9]
    asked = Amber(limit=1, tasks=("relation",), data_dir=amber.data_dir)
    assert [int(sample.id) for sample in asked.samples()] == [8]


def test_prompts_wrap_what_the_files_ask(amber: Amber) -> None:
    other = Amber(caption_prompt="Look.", prompt="{question}\nYes or No?", data_dir=amber.data_dir)
    assert other.samples()[0].prompt == "Look."
    assert other.samples()[2].prompt == "Is the sky sunny in this image?\nYes or No?"


def test_right_answers_score_full_marks(amber: Amber) -> None:
    records = [answered(sample, right(sample)) for sample in amber.samples()]
    found = values(amber.counts(records), amber.metrics())
    assert found["amber/chair"] == found["amber/cog"] == 0
    assert found["amber/cover"] == pytest.approx(5 / 6, abs=1e-3)  # of the two ships one is out of reach
    assert found["amber/accuracy"] == 1.0
    assert found["amber/relation/recall"] == pytest.approx(0.999)  # 1 of 1.001
    assert found["amber/words"] == 5
    assert set(amber.headline) == {"amber/chair", "amber/f1"}
    assert [amber.errors(record) for record in records] == [0.0] * 9
    assert [amber.correct(record) for record in records] == [None, None] + [True] * 7
    assert any("spaCy" in line for line in amber.warnings(amber.counts(records)))


def test_wrong_answers_are_counted_and_shown(amber: Amber) -> None:
    caption, question = amber.samples()[0], amber.samples()[3]
    text = "A dog, a cat and a camera."
    record = answered(caption, text)
    assert amber.errors(record) == 1.0
    spans = amber.marked(caption, text)
    assert "".join(span.text for span in spans) == text
    assert [(span.text, span.kind) for span in spans if span.text in ("dog", "cat", "camera")] == [
        ("dog", "correct"),
        ("cat", "hallucinated"),
        ("camera", "plain"),
    ]
    assert amber.correct(answered(question, "Yes")) is False
    assert amber.correct(answered(question, "No.")) is False
    assert amber.errors(answered(question, "Yes")) == 1.0
    assert Amber(parser="strict", data_dir=amber.data_dir).correct(answered(question, "No.")) is True
    assert amber.marked(question, "No") == [Span("No", "correct")]
    assert amber.marked(question, "Yes") == [Span("Yes", "hallucinated")]
    assert amber.marked(question, "") == amber.marked(caption, "") == []


def test_similar_words_come_from_a_table(amber: Amber, tmp_path: Path) -> None:
    table = tmp_path / "similar.tsv"
    table.write_text("boat\tship\t0.88\n")
    record = answered(amber.samples()[1], "a boat")
    assert amber.errors(record) == 1.0
    assert Amber(similarity=str(table), data_dir=amber.data_dir).errors(record) == 0.0


def test_breakdowns_name_the_task_and_the_kind_of_attribute(amber: Amber) -> None:
    found = [amber.breakdowns(answered(sample, "")) for sample in amber.samples()]
    assert found[0] == {"task": "generative"}
    assert found[2:5] == [{"task": "attribute", "attribute": kind} for kind in ("state", "number", "action")]
    assert found[5] == {"task": "existence"}
    assert found[7] == found[8] == {"task": "relation"}


def test_answers_of_other_tasks_are_refused(amber: Amber) -> None:
    record = answered(amber.samples()[0], "a dog")
    with pytest.raises(DataError, match="type 'generative'; scored are relation"):
        Amber(tasks=("relation",), data_dir=amber.data_dir).counts([record])


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"tasks": []}, "tasks"),
        ({"tasks": ["captions"]}, "tasks"),
        ({"tasks": ["relation", "relation"]}, "tasks"),
        ({"parser": "opera"}, "parser"),
        ({"prompt": "Well?"}, "prompt"),
        ({"answer_tokens": 0}, "answer_tokens"),
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark\.{says}="):
        Amber(**parameters)


def edited(data: Path, name: str, row: int, **changes: Any) -> None:
    path = data / name
    rows = json.loads(path.read_text())
    rows[row] |= changes
    path.write_text(json.dumps(rows, indent=4))


@pytest.mark.parametrize(
    ("name", "row", "changes", "says"),
    [
        ("annotations.json", 1, {"type": "other"}, r"annotations\.json:\d+: unknown type 'other'"),
        ("annotations.json", 2, {"truth": "maybe"}, r"annotations\.json:\d+: truth must be yes or no"),
        ("annotations.json", 0, {"truth": "dog"}, r"annotations\.json:2: truth must be a list"),
        ("annotations.json", 0, {"hallu": [1]}, r"annotations\.json:2: hallu must be a list"),
        ("annotations.json", 1, {"id": 1}, r"annotations\.json:\d+: the id 1 occurs twice"),
        ("annotations.json", 1, {"id": "2"}, r"annotations\.json:\d+: the id must be a whole number"),
        ("annotations.json", 1, {"id": 99}, r"query_all\.json:\d+: the id 2 has no annotation"),
        ("query_all.json", 1, {"id": 1}, r"query_all\.json:\d+: the id 1 occurs twice"),
        ("query_all.json", 1, {"id": True}, r"query_all\.json:\d+: the id must be a whole number"),
        ("query_all.json", 1, {"image": "../AMBER_1.jpg"}, r"query_all\.json:\d+: the image must be the name"),
        ("query_all.json", 1, {"query": ""}, r"query_all\.json:\d+: query must be text"),
    ],
)
def test_damaged_files_are_refused_by_line(data: Path, name: str, row: int, changes: dict[str, Any], says: str) -> None:
    edited(data, name, row, **changes)
    with pytest.raises(DataError, match=says):
        Amber(data_dir=str(data.parent)).samples()


def test_a_file_that_stops_early_is_refused(data: Path) -> None:
    rows = json.loads((data / "query_all.json").read_text())
    (data / "query_all.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(DataError, match="no query for the id 9"):
        Amber(data_dir=str(data.parent)).samples()


def test_missing_files_are_named_with_the_remedy(data: Path) -> None:
    (data / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"(?s)annotations\.json does not exist.*mitigate data fetch amber"):
        Amber(data_dir=str(data.parent)).samples()


def test_a_record_without_annotations_is_refused(amber: Amber) -> None:
    record = answered(Sample(id="1", image_id="a", task="yes_no", prompt="?"), "Yes")
    with pytest.raises(DataError, match="'type'"):
        amber.counts([record])
