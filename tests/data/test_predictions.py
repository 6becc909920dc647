"""Answers of other tools: matched to every sample exactly once, or refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mitigate.data.predictions import match, read_predictions
from mitigate.errors import DataError
from mitigate.records import SampleRecord
from tests.data.toy import ToyFiles, write_data

WHOLE = ({"id": "set/2", "text": ""}, {"id": "set/1", "text": "yes"}, {"id": "set/3", "text": "no"})


def matched(tmp_path: Path, rows: Any, *, partial: bool = False, **fields: str) -> list[SampleRecord]:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = ToyFiles(data_dir=str(write_data(tmp_path)))
    predictions = read_predictions(path, str(path), **fields)
    return match(benchmark, benchmark.samples(), predictions, str(path), partial=partial)


def test_answers_come_in_the_benchmarks_order_with_the_ground_truth(tmp_path: Path) -> None:
    records = matched(tmp_path, WHOLE)
    assert [(record.id, record.text) for record in records] == [("set/1", "yes"), ("set/2", ""), ("set/3", "no")]
    assert [(record.image_id, record.meta["label"]) for record in records] == [
        ("a.png", "yes"),
        ("a.png", "no"),
        ("b.png", "no"),
    ]
    assert all(record.error is None and record.task == "yes_no" for record in records)


def test_other_names_and_numbers_match_where_they_mean_one_sample(tmp_path: Path) -> None:
    rows = ({"key": 2, "said": "b"}, {"key": "b.png", "said": "c"}, {"key": "set/1", "said": "a"})
    records = matched(tmp_path, rows, id_field="key", text_field="said")
    assert [record.text for record in records] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((*WHOLE, {"id": 1, "text": "no"}), ":4: sample 'set/1' has an answer already, at {}:2; keep one of them"),
        ((*WHOLE, {"id": "set/4", "text": "no"}), ":4: the benchmark, with these options, has no sample 'set/4'"),
        (({"id": "a.png", "text": "no"},), ":1: the id 'a.png' may be 'set/1' or 'set/2'; write the whole id"),
        (({"id": None, "text": "no"},), ":1: 'id' must be text or a whole number, not null"),
        (({"id": True, "text": "no"},), ":1: 'id' must be text or a whole number, not true"),
        (({"id": 1.0, "text": "no"},), ":1: 'id' must be text or a whole number, not 1.0"),
        ((WHOLE[0], {"id": "set/1", "text": None}), ":2: 'text' must be the answer as text, not null; an empty"),
        ((WHOLE[0], {"id": "set/1", "text": ["no"]}), ":2: 'text' must be the answer as text, not [\"no\"]"),
        (({"question_id": 1, "text": ""},), ":1: there is no 'id', only question_id, text; name the key with --id-"),
        (({"id": 1, "answer": ""},), ":1: there is no 'text', only id, answer; name the key with --text-field KEY"),
        (({"\n".join(map(str, range(999))): 1},), f":1: there is no 'id', only {' '.join(map(str, range(28)))}"),
    ],
)
def test_what_does_not_fit_is_refused_even_where_a_part_is_enough(tmp_path: Path, rows: Any, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    for partial in (False, True):
        with pytest.raises(DataError) as caught:
            matched(tmp_path, rows, partial=partial)
        assert str(caught.value).startswith(f"{path}{message.format(path)}")


def test_a_sample_that_failed_has_no_answer_unless_it_was_answered_later(tmp_path: Path) -> None:
    failed = {"id": "set/1", "text": "", "error": "out of memory"}
    with pytest.raises(DataError, match=r":1: the sample failed \(out of memory\); answer it, or use --partial"):
        matched(tmp_path, (failed, WHOLE[0], WHOLE[2]))
    assert [record.id for record in matched(tmp_path, (failed, WHOLE[0]), partial=True)] == ["set/2"]
    assert [record.text for record in matched(tmp_path, (failed, *WHOLE))] == ["yes", "", "no"]


def test_missing_answers_are_counted_or_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        matched(tmp_path, WHOLE[:1])
    message = f"{tmp_path}/answers.jsonl has no answer for 2 of 3 samples, the first is 'set/1'\nadd them"
    assert str(caught.value).startswith(message)
    assert [record.id for record in matched(tmp_path, WHOLE[:1], partial=True)] == ["set/2"]
