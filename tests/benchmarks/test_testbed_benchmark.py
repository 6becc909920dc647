"""The testbed's benchmark: samples that are what they claim, and scores that need nothing but the records."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitigate.benchmarks import BUILTIN
from mitigate.benchmarks.base import Benchmark, Sample, Span, check_samples
from mitigate.benchmarks.testbed import DEFAULT_SCENES, Testbed
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import values
from mitigate.metrics.pope import SPLITS
from mitigate.records import SampleRecord
from mitigate.statistics import intervals
from mitigate.testbed.language import caption, pope_questions
from mitigate.testbed.world import OBJECTS, scene

FEW = Testbed(limit=12)


def answered(sample: Sample, text: str, **changes: Any) -> SampleRecord:
    record = SampleRecord(
        id=sample.id,
        image_id=sample.image_id,
        task=sample.task,
        prompt=sample.prompt,
        text=text,
        tokens=1,
        finished=True,
        meta=sample.meta,
    )
    return replace(record, **changes)


def truth(sample: Sample) -> str:
    if sample.task == "yes_no":
        return str(sample.meta["label"]).capitalize()
    return caption(scene("test", int(sample.image_id.split("-")[1])))


def score(benchmark: Testbed, records: list[SampleRecord]) -> dict[str, float]:
    return values(benchmark.counts(records), benchmark.metrics())


def test_it_is_registered_under_its_own_name() -> None:
    module, name = BUILTIN["testbed"].split(":")
    assert (module, name) == (Testbed.__module__, Testbed.__qualname__)
    assert module.endswith(f".{Testbed.name}")
    assert issubclass(Testbed, Benchmark)


def test_each_scene_gives_a_caption_and_balanced_questions_per_split() -> None:
    samples = FEW.samples()
    check_samples(samples)
    assert samples == FEW.samples()
    assert sum(sample.task == "caption" for sample in samples) == 12
    asked = [sample for sample in samples if sample.task == "yes_no"]
    labels = Counter((sample.image_id, kind, sample.meta["label"]) for sample in asked for kind in sample.meta["pope"])
    assert set(labels.values()) <= {2, 3}
    for image in {sample.image_id for sample in samples}:
        assert len({labels[image, split, label] for split in SPLITS for label in ("yes", "no")}) == 1


def test_labels_and_objects_agree_with_the_scene() -> None:
    for sample in FEW.samples():
        present = scene("test", int(sample.image_id.removeprefix("test-"))).objects
        if sample.task == "caption":
            assert set(sample.meta["objects"]) == present
        else:
            assert (sample.meta["object"] in present) == (sample.meta["label"] == "yes")
            assert sample.meta["object"] in sample.prompt


def test_a_question_of_several_splits_is_answered_once_and_counts_in_each() -> None:
    """The sums are those of asking every split on its own, as the question generator lists them."""
    asked = [sample for sample in FEW.samples() if sample.task == "yes_no"]
    assert len({(sample.image_id, sample.prompt) for sample in asked}) == len(asked)
    assert max(len(sample.meta["pope"]) for sample in asked) == 3
    expected = Counter(
        (question.scene_id, kind, question.object, question.label)
        for kind in SPLITS
        for question in pope_questions([scene("test", index) for index in range(12)], kind)
    )
    listed = Counter(
        (sample.image_id, kind, sample.meta["object"], sample.meta["label"])
        for sample in asked
        for kind in sample.meta["pope"]
    )
    assert listed == expected
    records = [answered(sample, "Yes") for sample in asked]
    counts = Testbed(limit=12, tasks=("pope",)).counts(records)
    for kind in SPLITS:
        questions = sum(count for key, count in expected.items() if key[1] == kind)
        assert counts.columns[f"pope/{kind}/questions"].sum() == questions
        assert counts.columns[f"pope/{kind}/said_yes"].sum() == questions
        assert counts.columns[f"pope/{kind}/correct"].sum() == questions / 2


def test_limit_split_and_tasks_choose_samples() -> None:
    assert len({sample.image_id for sample in Testbed(tasks=("chair",)).samples()}) == DEFAULT_SCENES
    few = {sample.id for sample in Testbed(limit=3).samples()}
    assert few < {sample.id for sample in FEW.samples()}
    assert all(sample.image_id.startswith("validation-") for sample in Testbed(limit=3, split="validation").samples())
    assert {sample.task for sample in Testbed(limit=3, tasks=("chair",)).samples()} == {"caption"}
    assert {sample.task for sample in Testbed(limit=3, tasks=("pope",)).samples()} == {"yes_no"}
    assert Testbed(tasks=["chair"]) == Testbed(tasks=("chair",))  # type: ignore[arg-type]
    assert Testbed(tasks=("chair",)).params() == {
        "limit": None,
        "extra_metrics": [],
        "split": "test",
        "tasks": ["chair"],
        "parser": "strict",
    }


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("limit", 0), ("split", "train"), ("tasks", ()), ("tasks", ("chair", "bleu")), ("tasks", ("pope", "pope")),
     ("parser", "loose")],
)  # fmt: skip
def test_wrong_parameters_are_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark\.{parameter}="):
        Testbed(**{parameter: value})


def test_pictures_are_those_of_the_scene_and_cannot_be_spoilt() -> None:
    samples = {sample.image_id: sample for sample in FEW.samples()}
    first, other = samples["test-0"], samples["test-1"]
    (picture,) = FEW.images(first)
    before = picture.tobytes()
    picture.paste((0, 0, 0), (0, 0, 64, 64))
    assert FEW.images(first)[0].tobytes() == before
    assert FEW.images(other)[0].tobytes() != before
    with pytest.raises(DataError, match="'test-x'"):
        FEW.images(replace(first, image_id="test-x"))


def test_answers_are_short_and_captions_as_long_as_the_run_allows() -> None:
    assert {(s.task, FEW.max_new_tokens(s)) for s in FEW.samples()} == {("caption", None), ("yes_no", 4)}


def test_the_truth_scores_perfectly() -> None:
    result = score(FEW, [answered(sample, truth(sample)) for sample in FEW.samples()])
    assert (result["chair_s"], result["chair_i"], result["recall"], result["unparsed_rate"]) == (0, 0, 1, 0)
    for split in (*SPLITS, "mean"):
        assert result[f"pope/{split}/accuracy"] == result[f"pope/{split}/f1"] == 1.0
        assert result[f"pope/{split}/yes_rate"] == 0.5


def test_saying_yes_to_everything_and_naming_everything() -> None:
    everything = " ".join(f"A {name}." for name in OBJECTS)
    records = [answered(s, "Yes" if s.task == "yes_no" else everything) for s in FEW.samples()]
    result = score(FEW, records)
    assert (result["chair_s"], result["recall"], result["length"]) == (1.0, 1.0, 48.0)
    assert result["pope/random/accuracy"] == 0.5
    assert result["pope/random/f1"] == pytest.approx(2 / 3)
    assert result["pope/mean/yes_rate"] == 1.0


def test_scores_do_not_depend_on_the_order_of_records_and_have_intervals() -> None:
    records = [answered(s, "Yes" if s.task == "yes_no" else "A cup.") for s in FEW.samples()]
    one, other = (intervals(FEW.counts(each), FEW.metrics(), 200) for each in (records, records[::-1]))
    assert one == other
    assert one["recall"].low < one["recall"].value < one["recall"].high


def test_the_parser_is_a_choice() -> None:
    records = [answered(sample, "") for sample in FEW.samples() if sample.task == "yes_no"]
    strict = score(Testbed(tasks=("pope",)), records)
    official = score(Testbed(tasks=("pope",), parser="official"), records)
    assert (strict["pope/random/accuracy"], strict["pope/random/yes_rate"]) == (0.0, 0.0)
    assert (official["pope/random/accuracy"], official["pope/random/yes_rate"]) == (0.5, 1.0)
    assert strict["unparsed_rate"] == official["unparsed_rate"] == 1.0


def test_metrics_and_headline_follow_the_tasks() -> None:
    for tasks in (("chair",), ("pope",), ("chair", "pope")):
        benchmark = Testbed(tasks=tasks)
        names = [metric.name for metric in benchmark.metrics()]
        assert len(set(names)) == len(names)
        assert set(benchmark.headline) <= set(names)
        assert ("chair_i" in names, "pope/adversarial/f1" in names) == ("chair" in tasks, "pope" in tasks)


def test_what_cannot_be_scored_is_refused() -> None:
    sample = FEW.samples()[0]
    with pytest.raises(DataError, match=r"test-0/caption.*out of memory"):
        FEW.counts([answered(sample, "", error="out of memory")])
    with pytest.raises(DataError, match=r"test-0/caption.*tasks"):
        Testbed(tasks=("pope",)).counts([answered(sample, "A cup.")])
    with pytest.raises(DataError, match=r"test-0/caption.*'objects'"):
        FEW.counts([answered(sample, "A cup.", meta={})])


def test_correct_is_for_questions_only() -> None:
    question = next(sample for sample in FEW.samples() if sample.task == "yes_no")
    right, wrong = ("yes", "no") if question.meta["label"] == "yes" else ("no", "yes")
    assert FEW.correct(answered(question, right)) is True
    assert FEW.correct(answered(question, wrong)) is False
    assert FEW.correct(answered(question, "perhaps")) is False
    assert FEW.correct(answered(FEW.samples()[0], "yes")) is None


def test_marked_captions() -> None:
    sample = Sample(id="x", image_id="test-0", task="caption", prompt="", meta={"objects": ["cup", "tree"]})
    assert FEW.marked(sample, "The cup, two Cars!") == [
        Span("The "),
        Span("cup", "correct"),
        Span(", two "),
        Span("Cars", "hallucinated"),
        Span("!"),
    ]
    assert FEW.marked(sample, "") == []


def test_marked_answers() -> None:
    question = next(sample for sample in FEW.samples() if sample.meta.get("label") == "no")
    assert FEW.marked(question, "No.") == [Span("No.", "correct")]
    assert FEW.marked(question, "Yes.") == [Span("Yes.", "hallucinated")]
    assert FEW.marked(answered(question, "No."), "No.") == [Span("No.", "correct")]


@given(st.text() | st.lists(st.sampled_from(["The ", "cup", "s ", "tree", " ", "knives"])).map("".join))
def test_marked_spans_joined_are_the_text(text: str) -> None:
    for sample in FEW.samples()[:2]:
        spans = FEW.marked(sample, text)
        assert "".join(span.text for span in spans) == text
        assert all(span.text for span in spans)


def test_hashes_tell_data_from_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Testbed(limit=2)
    data, prompts = small.data_hash(), small.prompt_hash()
    assert (data, prompts) == (Testbed(limit=2).data_hash(), Testbed(limit=2).prompt_hash())
    assert data != Testbed(limit=3).data_hash()
    monkeypatch.setattr("mitigate.testbed.language.CAPTION_PROMPT", "Describe.")
    assert (small.data_hash() == data, small.prompt_hash() == prompts) == (True, False)
    other = FEW.images(FEW.samples()[-1])
    monkeypatch.setattr(Testbed, "images", lambda self, sample: other)
    assert small.data_hash() != data


def test_check_samples() -> None:
    sample = FEW.samples()[0]
    with pytest.raises(DataError, match="'test-0/caption'"):
        check_samples([sample, sample])
    with pytest.raises(DataError, match="no samples"):
        check_samples([])
