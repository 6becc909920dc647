"""AMBER: the official numbers on every vector, and the rules behind them against a plain second writing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.errors import ConfigError, DataError
from mitigate.metrics import english
from mitigate.metrics.amber import (
    KINDS,
    TASKS,
    Amber,
    amber_metrics,
    answer_counts,
    caption_counts,
    read_answer,
    rounded,
)
from mitigate.metrics.amber_words import WordLists, judge, nouns, read_words
from mitigate.metrics.base import ImageCounts, values
from tests.benchmarks.official_amber import RELATION, SAFE
from tests.metrics.test_lemmatizers import needs_nltk_data

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "amber.json").read_text("utf-8"))
#: Of the official lists, what the captions of the vectors need.
OFFICIAL = WordLists(
    associates={
        "sky": (),
        "cloud": (),
        "sun": (),
        "flower": (),
        "ball": (),
        "cup": (),
        "plate": (),
        "umbrella": (),
        "dog": (),
        "cat": (),
        "plane": (),
        "bird": (),
        "chair": (),
        "beach": (),
        "forest": ("tree", "leave", "bush"),
        "tree": ("forest", "leave", "bush"),
        "grass": ("ground",),
        "person": ("people", "individual", "man", "woman", "boy", "girl"),
        "lake": ("sea", "water", "river"),
        "mountain": ("hill", "rock"),
        "road": ("path", "street", "ground"),
        "sea": ("water", "lake"),
        "table": ("desk",),
    },
    safe=frozenset({"orange", "snack", "line", "camera", "light", "shoe", "sign", "range", "individual"}),
    alike=frozenset(pair for a, b, score in VECTORS["similarity"] if score > 0.8 for pair in ((a, b), (b, a))),
)
ROWS = {
    "Descriminative Task": "",
    "Exsitence": "existence/",
    "Attribute": "attribute/",
    "State": "state/",
    "Number": "number/",
    "Action": "action/",
    "Relation": "relation/",
}


def score(rows: list[dict[str, float]], tasks: tuple[str, ...] = TASKS) -> dict[str, float]:
    metrics = amber_metrics(tasks)
    columns = [column for metric in metrics for column in metric.columns]
    counts = ImageCounts.accumulate([(str(index % 5), row) for index, row in enumerate(rows)], columns)
    return {name: value * 100 for name, value in values(counts, metrics).items()}


@pytest.mark.parametrize("case", VECTORS["captions"], ids=lambda case: case["response"][:30] or "empty")
def test_captions_score_as_the_official_script_says(case: dict[str, Any]) -> None:
    counts = caption_counts(case["nouns"], case["truth"], case["hallu"], OFFICIAL)
    assert bool(counts["amber/unassociated_captions"]) == (case["error"] is not None)
    if case["error"] is None:
        found = score([counts])
        official = {f"amber/{name.lower()}": pytest.approx(value) for name, value in case["result"].items()}
        assert {name: found[name] for name in official} == official


@pytest.mark.parametrize("name", VECTORS["answers"])
def test_answers_score_as_the_official_script_says(name: str) -> None:
    cases = VECTORS["answers"][name]["cases"]
    found = score([answer_counts(text, truth, KINDS[kind]) for kind, truth, text in cases])
    for row, numbers in VECTORS["answers"][name]["result"].items():
        for statistic, value in numbers.items():
            assert found[f"amber/{ROWS[row]}{statistic.lower()}"] == pytest.approx(value), (row, statistic)


# --- the rules for captions -------------------------------------------------------------------------------------------

SMALL = WordLists(
    associates={word: tuple(others) for word, others in RELATION.items()},
    safe=frozenset(SAFE),
    alike=frozenset({("boat", "ship"), ("ship", "boat"), ("lake", "sky"), ("sky", "lake")}),
)
ENTRIES = st.lists(st.sampled_from([*RELATION, "unicorn"]), max_size=5)
NOUNS = st.lists(st.sampled_from(sorted({*SMALL.vocabulary, "Dog", "unicorn", "pixel"})), max_size=8)
LIKENESS = st.frozensets(st.tuples(st.sampled_from(sorted(RELATION)), st.sampled_from(sorted(RELATION))), max_size=8)


def plainly(nouns: list[str], truth: list[str], hallu: list[str], words: WordLists) -> tuple[int, int, int, int]:
    """The same rules with lists of flags: nouns that count, hallucinated ones, covered and marked entries."""
    vocabulary = {*words.associates, *sum(words.associates.values(), ())}

    def flag(noun: str, entries: list[str], flags: list[bool], *, like: bool) -> bool:
        pairs = [(other, entry) for entry in range(len(entries)) for other in words.associates.get(entries[entry], ())]
        for word, entry in [*pairs, *((word, entry) for entry, word in enumerate(entries))]:
            if word == noun or (like and (word, noun) in words.alike):
                flags[entry] = True
                return True
        return False

    covered, marked, counted, wrong = [False] * len(truth), [False] * len(hallu), 0, 0
    for noun in nouns:
        if noun not in vocabulary:
            continue
        counted += 1
        if noun in words.safe or flag(noun, truth, covered, like=False):
            continue
        flag(noun, hallu, marked, like=False)
        flag(noun, hallu, marked, like=True)
        wrong += not flag(noun, truth, covered, like=True)
    return counted, wrong, sum(covered), sum(marked)


@given(NOUNS, ENTRIES, ENTRIES, LIKENESS)
def test_captions_follow_the_rules(
    found: list[str], truth: list[str], hallu: list[str], alike: frozenset[tuple[str, str]]
) -> None:
    both = alike | {(second, first) for first, second in alike}
    words = WordLists(SMALL.associates, SMALL.safe, both)
    counts = caption_counts(found, truth, hallu, words, length=3)
    names = ("nouns", "hallucinated_nouns", "covered_objects", "marked_hallucinations")
    assert tuple(counts[f"amber/{name}"] for name in names) == plainly(found, truth, hallu, words)
    assert counts["amber/clean_captions"] == (counts["amber/hallucinated_nouns"] == 0)
    assert (counts["amber/objects"], counts["amber/likely_hallucinations"]) == (len(truth), len(hallu))
    assert counts["amber/unassociated_captions"] == ("unicorn" in [*truth, *hallu])


@pytest.mark.parametrize(
    ("found", "truth", "hallu", "kinds", "covered", "marked"),
    [
        (["dog"], ["dog"], [], ["present"], {0}, set()),
        (["puppy"], ["sky", "dog"], [], ["present"], {1}, set()),
        (["camera"], ["dog"], ["camera"], ["ignored"], set(), set()),
        (["individual"], ["person"], [], ["ignored"], set(), set()),  # safe before it could cover the person
        (["ship", "ship"], ["ship", "ship"], [], ["present", "present"], {0}, set()),  # the second is out of reach
        (["lake"], ["lake", "sea"], [], ["present"], {1}, set()),  # as an associate of the sea, which comes first
        (["cat"], ["dog"], ["cat"], ["hallucinated"], set(), {0}),
        (["cat", "cat"], ["dog"], ["dog", "cat"], ["hallucinated"] * 2, set(), {1}),
        (["tree"], ["sky"], ["forest", "tree"], ["hallucinated"], set(), {0}),
        (["boat"], ["ship"], ["boat"], ["present"], {0}, {0}),  # like what is there, and marked all the same
        (["boat"], ["sky"], ["ship", "boat"], ["hallucinated"], set(), {0, 1}),  # equal to one, like an earlier one
        (["cat"], ["dog"], [], ["hallucinated"], set(), set()),
    ],
)
def test_each_rule(
    found: list[str], truth: list[str], hallu: list[str], kinds: list[str], covered: set[int], marked: set[int]
) -> None:
    result = judge(found, truth, hallu, SMALL)
    assert (list(result.kinds), result.covered, result.marked) == (kinds, covered, marked)


def test_case_counts_and_other_nouns_do_not() -> None:
    assert SMALL.kept(["Dog", "dog", "pixel", "puppy", "DOG"]) == ["dog", "puppy"]


# --- the rules for answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("yes", None, "yes"),
        ("No.", None, "no"),
        ("NO", None, "no"),
        (" No", None, "no"),
        ("No\n", None, "no"),
        ("Yes and no", None, None),
        ("", None, None),
        ("Unsure", None, None),
    ],
)
def test_answers_are_read_exactly_or_strictly(text: str, official: str | None, strict: str | None) -> None:
    assert read_answer(text, "official") == official
    assert read_answer(text, "strict") == strict


ANSWERS = st.tuples(
    st.sampled_from(sorted(set(KINDS.values()) - {"generative"})),
    st.sampled_from(["yes", "no"]),
    st.sampled_from(["Yes", "No", "No.", ""]),
)


@given(st.lists(ANSWERS, min_size=1, max_size=60))
def test_answers_follow_the_rules(cases: list[tuple[str, str, str]]) -> None:
    found = score([answer_counts(text, truth, kind) for kind, truth, text in cases])
    rows = {
        "": (("existence", "state", "number", "action", "relation"), 0.001, 0.0001),
        "existence/": (("existence",), 0.001, 0.001),
        "attribute/": (("state", "number", "action"), 0.003, 0.0001),
        "number/": (("number",), 0.001, 0.0001),
        "relation/": (("relation",), 0.001, 0.0001),
    }
    for row, (kinds, start, f1_start) in rows.items():
        own = [(truth, text) for kind, truth, text in cases if kind in kinds]
        right = sum((truth, text) in (("yes", "Yes"), ("no", "No")) for truth, text in own)
        both = own.count(("no", "No"))
        accuracy = round(right / (len(own) + start) * 100, 1)
        precision = round(both / (sum(text == "No" for _, text in own) + start) * 100, 1)
        recall = round(both / (sum(truth == "no" for truth, _ in own) + start) * 100, 1)
        f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + f1_start) * 100, 1)
        numbers = [found[f"amber/{row}{name}"] for name in ("accuracy", "precision", "recall", "f1")]
        assert numbers == pytest.approx([accuracy, precision, recall, f1]), row
    assert found["amber/yes_rate"] == pytest.approx(100 * sum(text == "Yes" for _, _, text in cases) / len(cases))
    unread = sum(text in ("No.", "") for _, _, text in cases)
    assert found["amber/unparsed_rate"] == pytest.approx(100 * unread / len(cases))


@given(st.lists(st.floats(0, 100) | st.integers(0, 2000).map(lambda tie: tie / 20), min_size=1, max_size=20))
def test_rounding_is_pythons(numbers: list[float]) -> None:
    assert rounded(np.array(numbers)).tolist() == [round(number, 1) for number in numbers]
    assert rounded(np.float64(numbers[0])) == round(numbers[0], 1)  # type: ignore[arg-type]


def test_resamples_are_scored_at_once() -> None:
    rows = [answer_counts(text, truth, "state") for text, truth in (("Yes", "yes"), ("No", "no"), ("No", "yes"))]
    metrics = amber_metrics(("attribute",))
    counts = ImageCounts.accumulate(
        [(str(i), row) for i, row in enumerate(rows)], [c for m in metrics for c in m.columns]
    )
    weights = np.array([[1.0, 1.0, 1.0], [0, 2, 1], [3, 0, 0]])
    for metric in metrics:
        single = [float(metric.compute(weights[i] @ counts.matrix(metric))) for i in range(3)]
        np.testing.assert_array_equal(metric.compute(weights @ counts.matrix(metric)), single)


# --- which metrics ----------------------------------------------------------------------------------------------------


def test_tasks_choose_the_rows() -> None:
    def names(*tasks: str) -> list[str]:
        return [metric.name.removeprefix("amber/") for metric in amber_metrics(tasks)]

    assert names("generative") == ["chair", "cover", "hal", "cog", "words"]
    assert names("existence")[:4] == ["existence/accuracy", "existence/precision", "existence/recall", "existence/f1"]
    assert "state/f1" in names("attribute")
    assert "score" not in names("generative", "existence", "attribute")
    assert "f1" not in names("existence", "relation")
    assert names(*TASKS).index("score") == 5
    assert {"f1", "score", "relation/f1"} <= set(names(*TASKS))


def test_what_was_not_asked_is_undefined_but_shown_as_the_script_shows_it() -> None:
    metrics = {metric.name: metric for metric in amber_metrics()}
    for metric in metrics.values():
        assert np.isnan(metric.compute(np.zeros(len(metric.columns)))), metric.name
    found = score([answer_counts("Yes", "yes", "state")])
    assert (found["amber/hal"], found["amber/chair"], found["amber/relation/accuracy"]) == (100.0, 0.0, 0.0)
    assert found["amber/state/precision"] == found["amber/state/f1"] == 0.0


def test_the_score_of_papers_is_the_mean_of_what_is_right() -> None:
    captions = [caption_counts(["dog", "cat", "sky"], ["dog", "sky"], ["cat"], SMALL)]
    answers = [answer_counts("No", "no", kind) for kind in ("existence", "state", "relation") for _ in range(50)]
    found = score(captions + answers)
    assert (found["amber/chair"], found["amber/f1"]) == (pytest.approx(33.3), pytest.approx(100.0))
    assert found["amber/score"] == pytest.approx((100 - 33.3 + 100.0) / 2)


def test_warnings_name_what_differs_from_the_script() -> None:
    rows = [caption_counts(["dog"], ["dog", "unicorn"], [], SMALL), answer_counts("No.", "no", "state")]
    sums: dict[str, float] = {}
    for row in rows:
        sums |= row
    said = " ".join(Amber().warnings(sums))
    assert "spaCy" in said
    assert "1 captions name words that relation.json does not have" in said
    assert "1 of 1 replies" in said
    assert "parser=strict" in said
    assert Amber(similarity="table.tsv", parser="strict").warnings({"amber/captions": 1.0}) == []
    assert Amber().warnings({}) == []
    assert "replies" not in " ".join(Amber(parser="strict").warnings(sums))


def test_parameters_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="official, strict"):
        Amber(parser="vcd")
    with pytest.raises(ConfigError, match="benchmark=amber"):
        Amber().words()


# --- reading the lists ------------------------------------------------------------------------------------------------


def lists(folder: Path, relation: str | None = None, safe: str = "orange\r\ncamera") -> Path:
    (folder / "relation.json").write_text(json.dumps(RELATION) if relation is None else relation)
    (folder / "safe_words.txt").write_bytes(safe.encode())
    read_words.cache_clear()
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.tsv", "boat\tship\t0.88\nkid\tchild\t0.8\n"),
        ("table.json", '[["boat", "ship", 0.88], ["kid", "child", 0.8]]'),
    ],
)
def test_lists_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    words = read_words(lists(tmp_path), tmp_path / name)
    assert words.associates["person"] == ("people", "man", "individual")
    assert words.safe == {"orange", "camera"}
    assert words.alike == {("boat", "ship"), ("ship", "boat")}
    assert {"puppy", "dog", "leave"} <= words.vocabulary
    assert read_words(tmp_path, None).alike == frozenset()


@pytest.mark.parametrize("relation", ["[]", '{"dog": "puppy"}', '{"dog": [1]}', '{"dog": ['])
def test_a_damaged_list_is_named(tmp_path: Path, relation: str) -> None:
    with pytest.raises(DataError, match=r"relation\.json"):
        read_words(lists(tmp_path, relation), None)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("t.tsv", "boat\tship\t0.9\nboat ship 0.9\n", r"t\.tsv:2"),
        ("t.tsv", "boat\tship\tmuch\n", r"t\.tsv:1"),
        ("t.tsv", "boat\tship\tnan\n", r"t\.tsv:1"),
        ("t.json", '[["boat", "ship"]]', r"t\.json: row 1"),
        ("t.json", '[["boat", 5, 0.9]]', r"t\.json: row 1"),
        ("t.json", "[5]", r"t\.json: row 1"),
        ("t.json", "{}", r"t\.json"),
        ("none.tsv", None, r"none\.tsv does not exist"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, text: str | None, where: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=where):
        read_words(lists(tmp_path), tmp_path / name)


def test_without_files_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mitigate data fetch amber"):
        read_words(tmp_path / "nowhere", None)


# --- nouns ------------------------------------------------------------------------------------------------------------


def test_nouns_keep_their_case_and_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Dogs run, red dogs. Rome dogs"
    tagged = ["NNS", "VB", ",", "JJ", "NNS", ".", "NNP", "VB"]
    words = ["Dogs", "run", ",", "red", "dogs", ".", "Rome", "dogs"]
    monkeypatch.setattr(english, "tokens", lambda text: english.locate(words, text))
    monkeypatch.setattr(english, "base", lambda word: {"dogs": "dog"}.get(word, word))
    monkeypatch.setattr(english, "tags", lambda words, wanted: {index: tagged[index] for index in wanted})
    nouns.cache_clear()
    found = nouns(text, frozenset({"Dogs", "dog", "red"}))
    assert [noun.lemma for noun in found] == ["Dogs", "dog"]
    assert [text[noun.start : noun.end] for noun in found] == ["Dogs", "dogs"]
    nouns.cache_clear()


@needs_nltk_data
def test_nouns_of_the_vectors() -> None:
    for case in VECTORS["captions"]:
        words = frozenset({*case["nouns"], "walking", "run", "chases"})
        assert [noun.lemma for noun in nouns(case["response"], words)] == case["nouns"]
