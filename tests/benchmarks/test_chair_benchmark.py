"""CHAIR on annotation files as COCO publishes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks.base import Span, check_samples
from mitigate.benchmarks.chair import Chair
from mitigate.benchmarks.coco import in_default_order
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.records import SampleRecord
from mitigate.registry import benchmarks
from tests.benchmarks.official_coco import write_coco

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "chair.json").read_text())
PICTURES = {int(number): (row["segments"], row["captions"]) for number, row in VECTORS["images"].items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data"), PICTURES, drawn=True)


def chair(root: Path, **parameters: Any) -> Chair:
    return Chair(**{"lemmatizer": "closed", "data_dir": str(root), **parameters})


def answered(benchmark: Chair, captions: Mapping[int, str], **changes: Any) -> list[SampleRecord]:
    samples = {sample.id: sample for sample in benchmark.samples()}
    return [
        replace(
            SampleRecord(
                id=str(number),
                image_id=str(number),
                task="caption",
                prompt="",
                text=text,
                tokens=0,
                finished=True,
                meta=samples[str(number)].meta,
            ),
            **changes,
        )
        for number, text in captions.items()
    ]


def score(benchmark: Chair, captions: Mapping[int, str], **changes: Any) -> dict[str, float]:
    return values(benchmark.counts(answered(benchmark, captions, **changes)), benchmark.metrics())


# --- samples and truth ------------------------------------------------------------------------------------------------


def test_samples(root: Path) -> None:
    benchmark = chair(root)
    samples = benchmark.samples()
    check_samples(samples)
    assert benchmarks().get("chair") is Chair
    assert {int(sample.id) for sample in samples} == set(PICTURES)
    first = next(sample for sample in samples if sample.id == "5")
    assert (first.task, first.prompt) == ("caption", "Please describe this image in detail.")
    assert first.meta["file"] == "val2014/COCO_val2014_000000000005.jpg"
    assert benchmark.images(first)[0].size == (64, 48)
    assert benchmark.max_new_tokens(first) is None
    assert chair(root, answer_tokens=64).max_new_tokens(first) == 64
    assert "COCO_val2014_000000000005.jpg" in benchmark.aliases(first)


def test_truth_is_what_the_official_scripts_take_for_it(root: Path) -> None:
    for sample in chair(root, lemmatizer="pattern").samples():
        assert sample.meta["objects"] == VECTORS["images"][sample.id]["gt_objects"]["standalone"]


def test_references_are_read_like_captions(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: (["dog"], ["A bus."])})
    assert chair(tmp_path, lemmatizer="pattern").samples()[0].meta["objects"] == ["dog"]
    assert chair(tmp_path, lemmatizer="closed").samples()[0].meta["objects"] == ["bus", "dog"]


def test_default_pictures_follow_a_rule(tmp_path: Path, root: Path) -> None:
    many = dict.fromkeys(range(1, 601), ([], ["A dog."]))
    write_coco(tmp_path, many)
    ids = [int(sample.id) for sample in chair(tmp_path).samples()]
    assert ids == sorted(many, key=lambda number: hashlib.sha256(str(number).encode()).hexdigest())[:500]
    assert [int(sample.id) for sample in chair(tmp_path, limit=7).samples()] == ids[:7]
    assert len(chair(tmp_path, limit=550).samples()) == 550
    with pytest.warns(UserWarning, match="has annotations of 600 pictures, not of 601"):
        assert len(chair(tmp_path, limit=601).samples()) == 600
    with pytest.warns(UserWarning, match="has annotations of 14 pictures, not of 500"):
        chair(root).samples()
    assert in_default_order([1, 2, 3, 42]) == in_default_order([42, 3, 2, 1])


def test_a_manifest_names_pictures_in_its_order(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(
        "# mine\n7\nCOCO_val2014_000000000003.jpg\r\nval2014/COCO_val2014_000000000001.jpg\n\n000000000002\n"
    )
    benchmark = chair(root, manifest=str(path))
    assert [sample.id for sample in benchmark.samples()] == ["7", "3", "1", "2"]
    assert [sample.id for sample in chair(root, manifest=str(path), limit=2).samples()] == ["7", "3"]
    hashed = benchmark.data_hash()
    path.write_text("7\n3\n1\n")
    assert benchmark.data_hash() != hashed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1\n99\n", r"mine.txt:2: the annotations of COCO 2014 do not know the picture 99"),
        ("1\nCOCO_val2014_000000000001.jpg\n", r"mine.txt:2: the picture 1 is listed already, at .*mine.txt:1"),
        ("1\ndog.png\n", r"mine.txt:2: 'dog.png' is neither an id of COCO nor a file name"),
        ("0\n", r"mine.txt:1: '0' is neither"),
        ("\n# nothing\n", r"mine.txt lists no pictures"),
    ],
)
def test_bad_manifests(root: Path, tmp_path: Path, lines: str, message: str) -> None:
    write_coco(root, {}, split="train")
    path = tmp_path / "mine.txt"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        chair(root, manifest=str(path)).samples()


def test_train_is_read_only_for_pictures_that_are_not_in_val(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: (["dog"], ["A dog."])})
    path = tmp_path / "mine.txt"
    path.write_text("1\n2\n")
    with pytest.raises(DataError, match=r"instances_train2014.json does not exist"):
        chair(tmp_path, manifest=str(path)).samples()
    write_coco(tmp_path, {2: (["cat"], ["A cat."])}, split="train")
    assert [sample.meta["file"] for sample in chair(tmp_path, manifest=str(path)).samples()] == [
        "val2014/COCO_val2014_000000000001.jpg",
        "train2014/COCO_train2014_000000000002.jpg",
    ]


# --- damaged annotations ----------------------------------------------------------------------------------------------


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("instances", lambda d: d.pop("categories"), "has no list 'categories'"),
        ("instances", lambda d: d["images"].append(d["images"][0]), "two pictures have the id 1"),
        (
            "instances",
            lambda d: d["annotations"][0].update(category_id=999),
            "picture 1 has the unknown category_id 999",
        ),
        ("instances", lambda d: d["annotations"][0].pop("category_id"), "no whole number as 'category_id'"),
        ("instances", lambda d: d["annotations"][0].update(image_id=7), "about the picture 7, which is not"),
        ("instances", lambda d: d["annotations"][0].update(image_id="1"), "no whole number as 'image_id'"),
        ("instances", lambda d: d["categories"][16].update(name="wolf"), "'wolf' is no category of COCO"),
        ("instances", lambda d: d["categories"][17].pop("name"), "the category 18 is there twice or has no name"),
        ("instances", lambda d: d["images"][0].update(file_name="../x.jpg"), "must be the name of a file"),
        ("captions", lambda d: d["annotations"][0].pop("caption"), "picture 1 has no caption"),
        ("captions", lambda d: d.update(images=[]), "about the picture 1, which is not"),
        ("captions", lambda d: d.update(images=[], annotations=[]), "do not know the picture 1"),
        ("captions", lambda d: d.update(images={}), "has no list 'images'"),
    ],
)
def test_damaged_annotations(tmp_path: Path, kind: str, change: Any, message: str) -> None:
    write_coco(tmp_path, {1: (["dog"], ["A dog."])})
    write_coco(tmp_path, {}, split="train")
    edit(tmp_path / "coco" / "annotations" / f"{kind}_val2014.json", change)
    with pytest.raises(DataError, match=message):
        chair(tmp_path).samples()


def test_truncated_or_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances_val2014.json does not exist\n.*annotations_trainval2014.zip"):
        chair(tmp_path).samples()
    write_coco(tmp_path, {1: (["dog"], ["A dog."])})
    path = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"captions_val2014.json:1: .*truncated"):
        chair(tmp_path).samples()


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: (["dog"], ["A dog."])})
    assert chair(tmp_path).samples()[0].meta["objects"] == ["dog"]
    write_coco(tmp_path, {1: (["dog"], ["A dog and a cat."])})
    assert chair(tmp_path).samples()[0].meta["objects"] == ["cat", "dog"]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_captions_score_as_officially(root: Path) -> None:
    benchmark = chair(root, lemmatizer="pattern")
    for row in VECTORS["captions"]:
        expected = row["standalone"]
        result = score(benchmark, {row["image_id"]: row["caption"]})
        found = (result["chair_s"], result["chair_i"], result["recall"], result["length"])
        assert found == (expected["CHAIRs"], expected["CHAIRi"], expected["Recall"], len(expected["words"])), row


def test_numbers_of_several_captions(root: Path) -> None:
    # 1: dog, frisbee, person; 4: elephant; 7: teddy bear, bed
    result = score(chair(root), {1: "A dog, a dog and a cat.", 4: "A car, a car.", 7: "Nothing to see"})
    assert result == {
        "chair_s": 2 / 3,
        "chair_i": 3 / 5,
        "recall": 1 / 6,
        "precision": 1 / 3,
        "f1": pytest.approx(2 / (6 + 3)),
        "length": (9 + 6 + 3) / 3,
    }


@given(st.dictionaries(st.sampled_from(sorted(PICTURES)), st.sampled_from([r["caption"] for r in VECTORS["captions"]])))
def test_sums_agree_with_the_parts(captions: dict[int, str]) -> None:
    benchmark = Chair(lemmatizer="closed")
    records = [
        SampleRecord(
            id=str(number),
            image_id=str(number),
            task="caption",
            prompt="",
            text=text,
            tokens=1,
            finished=True,
            meta={"objects": VECTORS["images"][str(number)]["gt_objects"]["opera"], "lemmatizer": "closed"},
        )
        for number, text in captions.items()
    ]
    result = values(benchmark.counts(records), benchmark.metrics())
    marks = [[span.kind for span in benchmark.marked(record, record.text)] for record in records]
    wrong, right = (sum(kinds.count(kind) for kinds in marks) for kind in ("hallucinated", "correct"))
    if records:
        assert result["chair_i"] == pytest.approx(wrong / (wrong + right) if wrong + right else 0.0)
        assert result["chair_s"] == pytest.approx(sum("hallucinated" in kinds for kinds in marks) / len(marks))
    assert all("".join(span.text for span in benchmark.marked(r, r.text)) == r.text for r in records)
    assert [benchmark.errors(record) for record in records] == [kinds.count("hallucinated") for kinds in marks]


def test_undefined_numbers_are_zero_with_a_warning(root: Path) -> None:
    benchmark = chair(root)
    counts = benchmark.counts(answered(benchmark, {13: "Nothing."}))
    assert values(counts, benchmark.metrics()) == {
        **{"chair_s": 0.0, "chair_i": 0.0, "recall": 0.0, "precision": 0.0, "f1": 0.0, "length": 2.0}
    }
    assert benchmark.warnings(counts) == [
        "no caption names an object: CHAIR_i and precision are undefined and shown as 0",
        "no picture has a known object: recall is undefined and shown as 0",
    ]
    assert benchmark.warnings(benchmark.counts(answered(benchmark, {1: "A dog."}))) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog. A cat and", "A dog."),
        ("A dog! A cat and", "A dog!"),
        ('He says "dog." A cat', 'He says "dog."'),
        ("A dog.", "A dog."),
        ("A dog. \n", "A dog."),
        ("A dog and a cat", ""),
        ("A dog of 3.5 years and", ""),
        ("", ""),
    ],
)
def test_an_unfinished_sentence_is_dropped(root: Path, text: str, kept: str) -> None:
    benchmark = chair(root, drop_incomplete_sentence=True)
    for cut in ({"tokens": 64, "finished": False}, {"tokens": 0, "finished": True}):
        assert score(benchmark, {1: text}, **cut) == score(chair(root), {1: kept})
    whole = {"tokens": 5, "finished": True}
    assert score(benchmark, {1: text}, **whole) == score(chair(root), {1: text})
    assert score(chair(root), {1: text}, tokens=64, finished=False) == score(chair(root), {1: text})


def test_marks_stand_at_their_words(root: Path) -> None:
    benchmark = chair(root, drop_incomplete_sentence=True)
    (record,) = answered(benchmark, {1: "A MAN, Hot  Dogs (dogs)! A bus and"})
    assert benchmark.marked(record, record.text) == [
        Span("A "),
        Span("MAN", "correct"),
        Span(", "),
        Span("Hot  Dogs", "hallucinated"),
        Span(" ("),
        Span("dogs", "correct"),
        Span(")! A bus and"),
    ]
    sample = next(sample for sample in benchmark.samples() if sample.id == "1")
    assert benchmark.marked(sample, "A bus")[-1] == Span("bus", "hallucinated")
    assert benchmark.marked(record, "") == []


def test_breakdown_by_objects_in_the_picture(root: Path) -> None:
    benchmark = chair(root)
    found = {
        number: benchmark.breakdowns(answered(benchmark, {number: ""})[0])["objects in the picture"]
        for number in PICTURES
    }
    assert (found[13], found[4], found[3], found[1], found[6]) == ("0 or 1", "0 or 1", "2", "3", "5 or more")
    assert benchmark.correct(answered(benchmark, {1: "A dog."})[0]) is None


def test_truth_of_another_lemmatizer_is_refused(root: Path) -> None:
    records = answered(chair(root), {1: "A dog."})
    with pytest.raises(DataError, match=r"'1' were found with lemmatizer=closed; .* with pattern"):
        chair(root, lemmatizer="pattern").counts(records)


@pytest.mark.parametrize("wrong", [{"lemmatizer": "stem"}, {"prompt": " "}, {"answer_tokens": 0}, {"limit": 0}])
def test_parameters_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark.{next(iter(wrong))}="):
        Chair(**wrong)
