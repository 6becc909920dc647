"""Short captions of COCO pictures, from annotation files as COCO publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.base import check_samples
from mitigate.benchmarks.coco_caption import CocoCaption
from mitigate.data.predictions import as_record
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.registry import benchmarks
from tests.benchmarks.official_coco import write_coco

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "cider.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = {int(number): ([], texts) for number, texts in VECTORS["refs"].items()}
    return write_coco(tmp_path_factory.mktemp("data"), pictures, drawn=True)


def test_samples(root: Path) -> None:
    benchmark = CocoCaption(data_dir=str(root))
    samples = benchmark.samples()
    check_samples(samples)
    assert benchmarks().get("coco_caption") is CocoCaption
    sample = next(sample for sample in samples if sample.id == "4")
    assert sample.meta["references"] == VECTORS["refs"]["4"]
    assert sample.prompt == "Provide a one-sentence caption for the provided image."
    assert benchmark.max_new_tokens(sample) == 64
    assert benchmark.images(sample)[0].size == (64, 48)
    assert "COCO_val2014_000000000004" in benchmark.aliases(sample)
    assert benchmark.headline == ("cider",)
    assert len(CocoCaption(data_dir=str(root), limit=2).samples()) == 2


@pytest.mark.parametrize("run", [run for run in VECTORS["runs"] if "refs_used" not in run], ids=lambda run: run["name"])
def test_a_set_scores_as_officially(root: Path, run: dict[str, Any]) -> None:
    benchmark = CocoCaption(data_dir=str(root))
    records = [as_record(sample, run["hyps"][sample.id]) for sample in benchmark.samples()]
    result = values(benchmark.counts(records), benchmark.metrics())
    assert result["cider"] == pytest.approx(run["scores"]["CIDEr"], abs=1e-12)
    words = [len(text.split()) for text in run["hyps"].values()]
    assert result["cider/length"] == pytest.approx(sum(words) / len(words))


def test_only_the_captions_are_needed(root: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, {1: (["dog"], ["A dog."])})
    (tmp_path / "coco" / "annotations" / "instances_val2014.json").unlink()
    assert [sample.id for sample in CocoCaption(data_dir=str(tmp_path)).samples()] == ["1"]
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(DataError, match=r"captions_val2014.json does not exist\n.*annotations_trainval2014.zip"):
        CocoCaption(data_dir=str(tmp_path)).samples()


@pytest.mark.parametrize("wrong", [{"tokenizer": "bert"}, {"prompt": ""}, {"answer_tokens": 0}])
def test_parameters_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark.{next(iter(wrong))}="):
        CocoCaption(**wrong)
