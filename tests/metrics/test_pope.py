"""POPE: every parser reads as its script does, and the numbers are the official ones where those exist."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks.pope import Pope as PopeBenchmark
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts, values
from mitigate.metrics.pope import SPLITS, Pope, columns, pope_counts, pope_metrics
from mitigate.metrics.yes_no import PARSERS, parse
from mitigate.records import SampleRecord

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "pope.json").read_text("utf-8"))
STATISTICS = ("accuracy", "precision", "recall", "f1", "yes_rate")
OFFICIAL_NAMES = dict(zip(("acc", "precision", "recall", "f1", "yes_ratio"), STATISTICS, strict=True))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: repr(case["answer"]))
def test_parsers_read_as_the_scripts_do(case: dict[str, str]) -> None:
    for parser, script in (("official", "official"), ("opera", "opera"), ("opera", "pai"), ("vcd", "vcd")):
        assert parse(case["answer"], parser, case["label"]) == case[script], parser


@pytest.mark.parametrize(
    ("text", "label", "strict", "official", "opera", "vcd"),
    [
        ("NO", "no", "no", "yes", "no", "no"),
        (" **No**! ", "no", "no", "yes", "yes", "no"),
        ("No.", "yes", "no", "no", "no", "no"),
        ("Yes. There is no other.", "yes", None, "yes", "no", "yes"),
        ("", "no", None, "yes", "yes", "yes"),
        ("Not sure", "yes", None, "yes", "yes", "no"),
        ("It is not there", "no", None, "no", "no", "no"),
        ("Nope, nothing known", "no", None, "yes", "yes", "no"),
        ("It isn't.", "no", None, "yes", "no", "yes"),
        ("No\n", "no", "no", "yes", "yes", "no"),
        ("no, no", "no", "no", "no", "no", "no"),
        ("yes\u2019no", "yes", None, "yes", "yes", "yes"),
        ("__yes__", "yes", "yes", "yes", "yes", "yes"),
        ("YES-NO", "no", None, "yes", "yes", "no"),
        ("<b>no</b>", "yes", "no", "yes", "yes", "no"),
        ("eyes", "yes", None, "yes", "yes", "yes"),
        ("It wasn't there.", "no", None, "yes", "no", "yes"),
        ("Yes'm", "yes", None, "yes", "yes", "yes"),
    ],
)
def test_parsers(text: str, label: str, strict: str | None, official: str, opera: str, vcd: str) -> None:
    found = [parse(text, parser, label) for parser in ("strict", "official", "opera", "vcd")]
    assert found == [strict, official, opera, vcd]


@given(st.text(), st.sampled_from(PARSERS), st.sampled_from(["yes", "no"]))
def test_no_reply_breaks_a_parser(text: str, parser: str, label: str) -> None:
    assert parse(text, parser, label) in (("yes", "no", None) if parser == "strict" else ("yes", "no"))


WRAPPING = st.text(alphabet=string.punctuation + " \n\t\u201c\u201d\u2014", max_size=6)


@given(
    st.lists(st.sampled_from(["Yes", "no", "it", "is", "not", "eyes"]), max_size=4), WRAPPING, WRAPPING, st.booleans()
)
def test_strict_does_not_see_case_or_what_surrounds_a_reply(
    words: list[str], before: str, after: str, upper: bool
) -> None:
    text = " ".join(words)
    named = {word.lower() for word in words} & {"yes", "no"}
    expected = named.pop() if len(named) == 1 else None
    assert parse(before + (text.upper() if upper else text) + after) == expected


def test_unknown_parser_and_label_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'loose'.*official, opera, vcd, strict"):
        parse("yes", "loose")
    with pytest.raises(ConfigError, match="'loose'"):
        Pope(parser="loose")
    with pytest.raises(DataError, match="'maybe'"):
        pope_counts("yes", "maybe", "random")
    with pytest.raises(DataError, match="right answer"):
        parse("yes", "vcd")


def score(replies: list[tuple[str, str, str]], parser: str = "strict") -> dict[str, float]:
    rows = [("img", pope_counts(text, label, split, parser)) for text, label, split in replies]
    return values(ImageCounts.accumulate(rows, columns()), pope_metrics())


@pytest.mark.parametrize(
    "case",
    [case for case in VECTORS["edge_aggregates"] if isinstance(case["cases"], list)],
    ids=lambda case: case["name"],
)
def test_where_the_official_script_fails_there_is_a_number_and_a_warning(case: dict[str, Any]) -> None:
    official = case["official"]
    answers = [(text, label, "random") for text, label in case["cases"]]
    assert [parse(text, "official") for text, _, _ in answers] == official["parsed"]
    result = score(answers, "official")
    for theirs, ours in OFFICIAL_NAMES.items():
        known = official[theirs] if official[theirs] is not None else 0.0
        if theirs != "acc":
            assert result[f"pope/random/{ours}"] == pytest.approx(known)
    assert result["pope/random/accuracy"] == (official["TP"] + official["TN"]) / len(answers)
    rows = [("img", pope_counts(*answer, "official")) for answer in answers]
    sums = {name: float(column.sum()) for name, column in ImageCounts.accumulate(rows, columns()).columns.items()}
    warnings = Pope(parser="official").warnings(sums)
    assert bool(warnings) == (official["error"] is not None)
    assert all(line.startswith("pope/random") for line in warnings)


def test_warnings_name_what_is_undefined() -> None:
    def of(*answers: tuple[str, str]) -> str:
        rows = [("img", pope_counts(text, label, "popular")) for text, label in answers]
        counts = ImageCounts.accumulate(rows, columns())
        return "\n".join(Pope().warnings({name: float(column.sum()) for name, column in counts.columns.items()}))

    assert of(("yes", "yes"), ("no", "no")) == ""
    assert "precision is undefined" in of(("no", "yes"))
    assert "recall is undefined" in of(("yes", "no"))
    assert "no yes is right" in of(("yes", "no"), ("no", "yes"))
    assert Pope().warnings({}) == []


def by_hand(answers: list[tuple[str, str]]) -> dict[str, float]:
    """The official script's arithmetic, on answers that are yes, no or unparsed."""
    hits = sum(answer == label == "yes" for answer, label in answers)
    said = sum(answer == "yes" for answer, _ in answers)
    there = sum(label == "yes" for _, label in answers)
    precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
    both = precision + recall
    return {
        "accuracy": sum(answer == label for answer, label in answers) / len(answers),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_rate": said / len(answers),
    }


@given(
    st.dictionaries(
        st.sampled_from(SPLITS),
        st.lists(st.tuples(st.sampled_from(["yes", "no", "perhaps"]), st.sampled_from(["yes", "no"])), min_size=1),
        min_size=1,
    ),
    st.sampled_from(PARSERS),
)
def test_numbers_and_their_means(asked: dict[str, list[tuple[str, str]]], parser: str) -> None:
    result = score([(text, label, split) for split, rows in asked.items() for text, label in rows], parser)
    expected = {
        split: by_hand([(str(parse(text, parser, label)), label) for text, label in rows])
        for split, rows in asked.items()
    }
    for statistic in STATISTICS:
        for split, each in expected.items():
            assert result[f"pope/{split}/{statistic}"] == pytest.approx(each[statistic])
        mean = sum(each[statistic] for each in expected.values()) / len(expected)
        assert result[f"pope/mean/{statistic}"] == pytest.approx(mean)


def test_unparsed_replies_are_counted_whatever_the_parser() -> None:
    replies = [
        ("", "no", "random"),
        ("Perhaps", "yes", "random"),
        ("No", "no", "popular"),
        ("Yes, no", "no", "popular"),
    ]
    for parser in PARSERS:
        assert score(replies, parser)["unparsed_rate"] == 3 / 4
    assert score(replies)["pope/words"] == 4 / 4


def test_a_category_without_anything_to_find_has_no_f1_of_its_own() -> None:
    """The value shown for the whole data is 0; a breakdown leaves out what is not defined."""
    rows = [("img", pope_counts("No", "no", split)) for split in ("random", "popular")]
    counts = ImageCounts.accumulate(rows, columns())
    mean = next(metric for metric in pope_metrics() if metric.name == "pope/mean/f1")
    sums = counts.matrix(mean).sum(axis=0)
    assert math.isnan(mean.compute(sums))
    assert mean.value(sums) == 0.0


def test_nothing_is_said_about_splits_that_are_not_asked() -> None:
    result = score([("Yes", "yes", "popular")])
    assert math.isnan(result["pope/random/accuracy"])
    assert result["pope/mean/accuracy"] == 1.0
    assert math.isnan(score([])["pope/mean/accuracy"])


def test_a_scorer_counts_the_splits_it_is_for() -> None:
    def record(split: str, task: str = "yes_no") -> SampleRecord:
        meta = {"label": "yes", "pope": [split]}
        return SampleRecord(id="1", image_id="a", task=task, prompt="?", text="Yes", tokens=1, finished=True, meta=meta)

    benchmark = PopeBenchmark()
    scorer = Pope(splits=("random",))
    assert {metric.name.split("/")[1] for metric in scorer.metrics() if metric.name.count("/") == 2} == {
        "random",
        "mean",
    }
    assert scorer.score(record("random"), benchmark)["pope/random/correct"] == 1.0
    assert scorer.score(record("random", "caption"), benchmark) == {}
    with pytest.raises(DataError, match="'popular'"):
        scorer.score(record("popular"), benchmark)
