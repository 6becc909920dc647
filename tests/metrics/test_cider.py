"""CIDEr-D equals the official scorer, and a second implementation written from its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks.base import Benchmark
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts, values
from mitigate.metrics.cider import Cider, cider, ptb_tokens, simple_tokens
from mitigate.records import SampleRecord

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "cider.json").read_text())

texts = st.lists(st.sampled_from(["a", "b", "c", "dog"]), max_size=7)
collections = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4)


def record(number: int, text: str, references: list[str], task: str = "caption") -> SampleRecord:
    name = str(number)
    meta = {"references": references}
    return SampleRecord(id=name, image_id=name, task=task, prompt="", text=text, tokens=1, finished=True, meta=meta)


def score(scorer: Cider, *records: SampleRecord) -> tuple[dict[str, float], list[str]]:
    columns = {column for metric in scorer.metrics() for column in metric.columns}
    counts = ImageCounts.accumulate(scorer.score_all(records, Benchmark()), columns)
    return values(counts, scorer.metrics()), scorer.warnings({name: c.sum() for name, c in counts.columns.items()})


def by_definition(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Compute CIDEr-D with dense vectors over all n-grams of the collection."""
    total = np.zeros(len(captions))
    for n in (1, 2, 3, 4):

        def cut(words: list[str], n: int = n) -> list[tuple[str, ...]]:
            return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

        grams = sorted({g for text in [*captions, *(r for each in references for r in each)] for g in cut(text)})
        seen = [sum(any(g in cut(r) for r in each) for each in references) for g in grams]
        idf = np.array([math.log(len(captions) / max(1, count)) for count in seen])
        for i, (caption, each) in enumerate(zip(captions, references, strict=True)):
            mine = idf * np.array([cut(caption).count(g) for g in grams])
            for reference in each:
                theirs = idf * np.array([cut(reference).count(g) for g in grams])
                norm = np.linalg.norm(mine) * np.linalg.norm(theirs)
                gap = max(0, len(caption) - 1) - max(0, len(reference) - 1)
                if norm:
                    total[i] += np.minimum(mine, theirs) @ theirs / norm * math.exp(-gap * gap / 72) / len(each)
    return list(total / 4 * 10)


@pytest.mark.parametrize("run", VECTORS["runs"], ids=lambda run: run["name"])
def test_official_scores(run: dict[str, Any]) -> None:
    numbers = [str(number) for number in run.get("refs_used", VECTORS["refs"])]
    references = [[text.split() for text in VECTORS["refs"][number]] for number in numbers]
    found = cider([run["hyps"][number].split() for number in numbers], references)
    assert found == pytest.approx(run["scores"]["CIDEr_per_image"], abs=1e-12)
    result, _ = score(Cider(), *(record(int(i), run["hyps"][i], VECTORS["refs"][i]) for i in numbers))
    assert result["cider"] == pytest.approx(run["scores"]["CIDEr"], abs=1e-12)


@given(collections)
def test_the_definition_gives_the_same(pictures: list[tuple[list[str], list[list[str]]]]) -> None:
    captions, references = [caption for caption, _ in pictures], [each for _, each in pictures]
    found = cider(captions, references)
    assert found == pytest.approx(by_definition(captions, references), abs=1e-9)
    assert all(-1e-9 <= value <= 10 + 1e-9 for value in found)
    assert cider(captions[::-1], references[::-1])[::-1] == pytest.approx(found, abs=1e-12)


def test_nothing_to_score() -> None:
    assert cider([], []) == []


@pytest.mark.parametrize("row", VECTORS["ptb"], ids=lambda row: row["in"][:20])
def test_simple_tokens_are_those_of_the_official_tokenizer_on_usual_text(row: dict[str, str]) -> None:
    assert simple_tokens(row["in"]) == row["out"].split()


def test_simple_tokens_drop_punctuation_alone() -> None:
    assert simple_tokens('A "red" (dog) ... runs -- fast, at 3.5 mph!') == [
        *("a", "red", "-lrb-", "dog", "-rrb-", "runs", "fast", "at", "3.5", "mph")
    ]


def test_weights_belong_to_the_evaluated_pictures() -> None:
    first, second = record(1, "a cat", ["a cat"]), record(2, "a dog", ["a dog"])
    alone, warned = score(Cider(), first)
    both, _ = score(Cider(), first, second)
    assert (alone["cider"], both["cider"]) == (0.0, pytest.approx(5.0))  # only 1- and 2-grams exist
    assert "one picture is always 0" in warned[0]


def test_each_picture_is_a_row_of_its_own() -> None:
    scorer = Cider()
    rows = list(scorer.score_all([record(2, "a dog", ["a dog"]), record(1, "x", ["a cat"])], Benchmark()))
    assert [cluster for cluster, _ in rows] == ["2", "1"]
    assert [row["cider/captions"] for _, row in rows] == [1.0, 1.0]
    assert rows[1][1]["cider/scores"] == 0.0


def test_other_tasks_are_not_counted() -> None:
    assert list(Cider().score_all([record(1, "yes", [], task="yes_no")], Benchmark())) == []


def test_long_captions_are_warned_about() -> None:
    long = record(1, "word " * 60, ["a cat"])
    assert "near 0" in score(Cider(), long, record(2, "word " * 60, ["a dog"]))[1][0]


def test_what_cannot_be_scored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="sample '1' has no reference captions"):
        score(Cider(), record(1, "a cat", []))
    with pytest.raises(ConfigError, match="'bert' must be one of simple, ptb"):
        Cider(tokenizer="bert")
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    with pytest.raises(ConfigError, match="pip install pycocoevalcap"):
        score(Cider(tokenizer="ptb"), record(1, "a cat", ["a cat"]))


def test_the_official_tokenizer_where_it_is_installed() -> None:
    pytest.importorskip("pycocoevalcap")
    rows = VECTORS["ptb"]
    assert [" ".join(words) for words in ptb_tokens([row["in"] for row in rows])] == [row["out"] for row in rows]
