"""The POPE benchmark reads the official files, in both of their forms, and refuses damaged ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks import pope
from mitigate.benchmarks.base import Sample, Span
from mitigate.benchmarks.pope import SPLITS, Pope
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.records import SampleRecord
from tests.benchmarks.official_yes_no import POPE_FILES, pope_rows, write_pope


def answered(sample: Sample, text: str) -> SampleRecord:
    parts = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt", "meta")}
    return SampleRecord(text=text, tokens=1, finished=True, **parts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pope(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dataset", POPE_FILES)
def test_every_dataset_is_read(tmp_path: Path, dataset: str) -> None:
    write_pope(tmp_path, dataset)
    benchmark = Pope(dataset=dataset, data_dir=str(tmp_path))
    samples = benchmark.samples()
    expected = [(split, row) for split in SPLITS for row in pope_rows(dataset, split, 3)]
    assert [(sample.id, sample.image_id, sample.prompt, sample.meta["label"]) for sample in samples] == [
        (f"{split}/{row['question_id']}", row["image"], row["text"], row["label"]) for split, row in expected
    ]
    assert {sample.task for sample in samples} == {"yes_no"}
    for sample in samples:
        (image,) = benchmark.images(sample)
        assert (image.mode, image.size) == ("RGB", (8, 6))
        assert benchmark.max_new_tokens(sample) == 10
        assert benchmark.aliases(sample) == (sample.id.split("/")[1],)


def test_objects_and_splits_are_the_breakdowns(root: Path) -> None:
    samples = Pope(data_dir=str(root)).samples()
    record = answered(samples[2], "Yes")
    assert Pope().breakdowns(record) == {"split": "random", "object": "fire hydrant"}
    odd = dataclasses.replace(samples[0], meta={"label": "yes", "pope": ["random"]})
    assert Pope().breakdowns(answered(odd, "Yes")) == {"split": "random"}


def test_older_files_spell_it_imange_and_objects_are_found_all_the_same(tmp_path: Path) -> None:
    row = {"question_id": "7", "image": "a.jpg", "text": "Is there an apple in the imange?", "label": "no"}
    folder = tmp_path / "pope"
    folder.mkdir()
    (folder / "coco_pope_random.json").write_text(json.dumps(row))
    (sample,) = Pope(splits=("random",), data_dir=str(tmp_path)).samples()
    assert (sample.id, sample.prompt, sample.meta["object"]) == ("random/7", row["text"], "apple")


def test_limit_counts_pictures_and_options_choose(root: Path) -> None:
    def ids(**options: Any) -> list[str]:
        return [sample.id for sample in Pope(data_dir=str(root), **options).samples()]

    assert ids(limit=2, splits=["popular"]) == ["popular/1", "popular/2", "popular/3", "popular/4"]
    assert len(ids(limit=1)) == 6
    assert ids(limit=99) == ids()
    suffixed = Pope(data_dir=str(root), prompt="{question} Please answer this question with one word.")
    assert suffixed.samples()[0].prompt.endswith("image? Please answer this question with one word.")
    assert Pope(answer_tokens=None).max_new_tokens(suffixed.samples()[0]) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dataset", "flickr"),
        ("splits", ()),
        ("splits", ("random", "random")),
        ("splits", ("hard",)),
        ("parser", "loose"),
        ("prompt", "Is it there?"),
        ("answer_tokens", 0),
        ("limit", 0),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"benchmark.{option}="):
        Pope(**{option: value})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label": "maybe"}, "label must be yes or no, not 'maybe'"),
        ({"label": None}, "label must be text"),
        ({"text": None}, "text must be text, not None"),
        ({"question_id": True}, "question_id must be text, not True"),
        ({"question_id": 1}, "question_id 1 is there twice"),
        ({"image": "../secret.jpg"}, "image must be the name of a file"),
        ({"image": ""}, "image must be the name of a file"),
    ],
)
@pytest.mark.parametrize("limit", [None, 1])
def test_damaged_rows_are_refused_with_their_line(
    root: Path, change: dict[str, Any], complaint: str, limit: int | None
) -> None:
    path = root / "pope" / "coco_pope_random.json"
    rows = path.read_text().splitlines()
    rows[4] = json.dumps({**json.loads(rows[4]), **change})
    path.write_text("\n".join(rows))
    with pytest.raises(DataError) as refusal:
        Pope(data_dir=str(root), limit=limit).samples()
    assert f"{path}:5: " in str(refusal.value)
    assert complaint in str(refusal.value)


def test_missing_keys_and_files_are_refused(root: Path) -> None:
    path = root / "pope" / "coco_pope_popular.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[1]["image"]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"coco_pope_popular\.json:2: the key 'image' is missing"):
        Pope(data_dir=str(root)).samples()
    path.unlink()
    with pytest.raises(DataError, match=r"coco_pope_popular\.json does not exist\n.*mitigate data fetch pope"):
        Pope(data_dir=str(root)).samples()
    write_pope(root, "gqa")
    (root / "gqa" / "images" / "2400000.jpg").unlink()
    gqa = Pope(dataset="gqa", data_dir=str(root))
    first = gqa.samples()[0]
    with pytest.raises(DataError, match=r"2400000\.jpg does not exist"):
        gqa.images(first)


def test_a_known_older_file_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "pope" / "coco_pope_random.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pope(data_dir=str(root)).samples()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sources = [dataclasses.replace(source, older=((digest, "of last year"),)) for source in pope.POPE]
    monkeypatch.setattr(pope, "POPE", sources)
    with pytest.warns(UserWarning, match=r"coco_pope_random\.json is the version of last year; its numbers"):
        Pope(data_dir=str(root)).samples()


def test_every_file_and_folder_that_is_read_is_a_source(tmp_path: Path) -> None:
    for dataset in POPE_FILES:
        write_pope(tmp_path, dataset)
        benchmark = Pope(dataset=dataset, data_dir=str(tmp_path))
        needed = [tmp_path / "pope" / POPE_FILES[dataset].format(split) for split in SPLITS]
        needed += [path for sample in benchmark.samples() for path in benchmark.image_files(sample)]
        places = {source.location(tmp_path / "pope"): source for source in Pope.sources}
        for path in needed:
            assert path in places or path.parent in places
            source = places.get(path) or places[path.parent]
            assert source.optional or dataset != "gqa"
            assert not source.optional or dataset != "coco"


def test_answers_are_judged_as_the_parser_reads_them(root: Path) -> None:
    yes, no = Pope(data_dir=str(root), splits=("random",), limit=1).samples()
    assert (yes.meta["label"], no.meta["label"]) == ("yes", "no")
    for parser, text, right in (
        ("official", "No!", False),
        ("strict", "No!", True),
        ("opera", "It isn't.", True),
        ("vcd", "I know", True),
    ):
        benchmark = Pope(parser=parser)
        assert benchmark.correct(answered(no, text)) is right
        assert benchmark.errors(answered(no, text)) == float(not right)
        assert benchmark.marked(no, text) == [Span(text, "correct" if right else "hallucinated")]
        counts = benchmark.counts([answered(no, text)])
        assert values(counts, benchmark.metrics())["pope/random/accuracy"] == float(right)
    assert Pope().marked(yes, "") == []
    assert set(Pope().headline) <= {metric.name for metric in Pope().metrics()}


def test_a_split_that_is_not_chosen_is_not_scored(root: Path) -> None:
    sample = Pope(data_dir=str(root)).samples()[0]
    with pytest.raises(DataError, match="split 'random'; scored are popular"):
        Pope(splits=("popular",)).counts([answered(sample, "Yes")])


def test_the_pictures_bytes_are_part_of_the_data_hash(root: Path) -> None:
    benchmark = Pope(data_dir=str(root))
    before = benchmark.data_hash()
    assert before == Pope(data_dir=str(root)).data_hash()
    path = benchmark.image_files(benchmark.samples()[0])[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert benchmark.data_hash() != before


def test_many_answers_are_scored_in_no_time() -> None:
    texts = ("Yes, there is a dog in the image.", "No", "There is no dog in the image.", "Not sure")
    records = [
        answered(
            Sample(
                id=f"random/{index}",
                image_id=f"{index // 6}.jpg",
                task="yes_no",
                prompt="?",
                meta={"label": ("yes", "no")[index % 2], "pope": ["random"]},
            ),
            texts[index % 4],
        )
        for index in range(20_000)
    ]
    start = time.process_time()
    Pope(splits=("random",)).counts(records)
    assert time.process_time() - start < 3.0  # it takes about 0.2


def test_reading_data_needs_no_model_library() -> None:
    code = (
        "import sys, mitigate.benchmarks.pope, mitigate.benchmarks.mme, mitigate.benchmarks.hallusionbench;"
        "print(sorted({'torch', 'transformers', 'openai', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
