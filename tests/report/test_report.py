from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from mitigate.benchmarks.base import Sample, Span
from mitigate.report import choose_examples
from mitigate.report.examples import Entry, Example
from mitigate.report.html import render, summary
from mitigate.report.plots import cost_plot, difference_plot, ticks
from mitigate.runner.table import columns

SCRIPT = "<script>alert(1)</script>"


def interval(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "undefined": 0.0}


def difference(value: float, low: float, high: float) -> dict[str, Any]:
    clear = low > 0 or high < 0
    return {**interval(value, low, high), "p": 0.01, "p_holm": 0.02, "excludes_zero": clear}


def stack(chair: float, cost: float, differences: dict[str, Any], *, idle: list[str] | None = None) -> dict[str, Any]:
    effects = {
        "rows_edited_share": 0.0 if idle else 0.25,
        "rejections_per_token": 0.0,
        "extra_forwards_per_token": 1.5,
        "extra_backwards_per_token": 0.0,
        "texts_changed": 0.4,
        "idle": idle or [],
        "methods": {"bus": {"forwards": 10.0}, "beta": {"rows_edited": 12.0, "l1_change": 0.125}}
        if differences
        else {},
    }
    return {
        "methods": {"beta": {"gain": 0.2}} if differences else {},
        "provenance": {"methods.beta.gain": "command line"},
        "metrics": {
            "chair_i": interval(chair, chair - 0.05, chair + 0.05),
            "pope/adversarial/f1": interval(0.8, 0.7, 0.9),
        },
        "differences": differences,
        "mcnemar": {"only_first": 1, "only_second": 2, "p": 0.0004} if differences else None,
        "effects": effects,
        "cost": {"ms_per_token": cost, "overhead": cost / 2, "tokens": 10.0, "seconds": 1.0, "batch_size": 4},
        "notes": [f"{key} did nothing" for key in idle or []],
        "record": {
            "created_at": "2026-01-01T00:00:00+00:00",
            "versions": {"torch": "9.9"},
            "git": {"sha": "abc", "dirty": True},
            "weights": "sha256:f1f1",
        },
    }


@pytest.fixture
def comparison() -> dict[str, Any]:
    better = {"chair_i": difference(-0.1, -0.15, -0.02), "pope/adversarial/f1": difference(-0.2, -0.3, -0.1)}
    unsure = {"chair_i": difference(0.01, -0.03, 0.04), "pope/adversarial/f1": difference(0.0, 0.0, 0.0)}
    return {
        "name": "trial",
        "benchmark": {"name": "fake", "version": 1},
        "model": "small",
        "baseline": "none",
        "seed": 0,
        "n_images": 7,
        "n_samples": 70,
        "headline": ["chair_i", "pope/adversarial/f1"],
        "metrics": {
            "chair_i": {"title": "CHAIR_i", "short": "CHAIR_i", "percent": True, "higher_is_better": False},
            "pope/adversarial/f1": {
                "title": "POPE adversarial F1",
                "short": "F1",
                "percent": True,
                "higher_is_better": True,
            },
        },
        "stacks": {
            "none": stack(0.3, 2.0, {}),
            "good": stack(0.2, 3.0, better),
            "unsure": stack(0.31, 9.0, unsure, idle=["beta"]),
        },
        "notes": ["The testbed is a small test bench, not evidence about large models."],
        "config": {"seed": 0},
        "data_hash": "d4d4",
        "prompt_hash": "e5e5",
    }


def example(text: str = "a cat and ", *, name: str = "img-1") -> Example:
    sample = Sample(id="s", image_id=name, task="caption", prompt=f"Describe {text}")
    wrong = [Span(text), Span("dog", "hallucinated"), Span(". "), Span("cat", "correct")]
    entry = Entry(sample=sample, spans={"none": wrong, "good": [Span("nothing")], "unsure": list(wrong)})
    return Example(image_id=name, pictures=[Image.new("RGB", (16, 16), "red")], entries=[entry])


class Page(HTMLParser):
    """Collects tags, checks that they close, and notes every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for key, value in attrs if key in ("src", "href", "action", "data", "xlink:href")
        ]
        if tag not in ("meta", "img", "br", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_from_outside(comparison: dict[str, Any]) -> None:
    html = render(comparison, [example()], command="mitigate compare")
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 1
    assert not re.search(r"url\(|@import|https?://", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_what_a_model_or_a_user_wrote_is_escaped(comparison: dict[str, Any]) -> None:
    evil = copy.deepcopy(comparison)
    evil["name"] = evil["model"] = SCRIPT
    evil["stacks"] = {SCRIPT if name == "good" else name: data for name, data in comparison["stacks"].items()}
    evil["stacks"][SCRIPT]["methods"] = {SCRIPT: {SCRIPT: SCRIPT}}
    evil["stacks"][SCRIPT]["effects"]["methods"] = {SCRIPT: {SCRIPT: 1.0}}
    evil["config"] = {SCRIPT: SCRIPT}
    evil["notes"] = [SCRIPT]
    shown = example(SCRIPT, name=SCRIPT)
    spans = {SCRIPT if name == "good" else name: spans for name, spans in shown.entries[0].spans.items()}
    shown = Example(
        image_id=SCRIPT, pictures=shown.pictures, entries=[Entry(sample=shown.entries[0].sample, spans=spans)]
    )
    html = render(evil, [shown], command=SCRIPT)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10
    Page(html)


def test_hallucinated_words_are_marked_by_more_than_colour(comparison: dict[str, Any]) -> None:
    html = render(comparison, [example()])
    assert '<mark class="hallucinated" title="not in the picture, or wrong">dog</mark>' in html
    assert '<mark class="correct">cat</mark>' in html
    assert 'mark.hallucinated::before { content: "✗ "; }' in html


def test_stacks_that_say_the_same_share_a_line(comparison: dict[str, Any]) -> None:
    html = render(comparison, [example()])
    assert '<div class="who">none, unsure</div>' in html
    assert '<div class="who">good</div>' in html


def test_small_pictures_are_enlarged_without_smoothing_and_large_ones_made_smaller(comparison: dict[str, Any]) -> None:
    assert 'class="pixelated"' in render(comparison, [example()])
    large = Example(image_id="l", pictures=[Image.effect_noise((3000, 2000), 90)], entries=example().entries)
    html = render(comparison, [large])
    assert 'class="pixelated"' not in html
    assert len(html) < 1_000_000


def test_tables_show_values_intervals_marks_and_flags(comparison: dict[str, Any]) -> None:
    html = render(comparison, [])
    assert '<td>20.0<span class="interval">[15.0, 25.0]</span></td>' in html
    assert '<td class="better">−10.0*<span class="interval">[−15.0, −2.0]</span></td>' in html
    assert '<td class="worse">−20.0*' in html
    assert '<td class="flag">0.0</td>' in html
    assert "&lt; 0.001" in html
    assert "did nothing: beta" in html
    assert "not evidence about large models" in html


def test_the_summary_says_what_differs_beyond_its_interval(comparison: dict[str, Any]) -> None:
    assert summary(comparison) == [
        "CHAIR_i is 30.0 with none. Better (beyond the 95 % interval, uncorrected): "
        "good (−10.0, Holm-corrected p = 0.020). No difference beyond the 95 % interval: unsure.",
        "POPE adversarial F1 is 80.0 with none. Worse (beyond the 95 % interval, uncorrected): "
        "good (−20.0, Holm-corrected p = 0.020). No difference beyond the 95 % interval: unsure.",
    ]
    comparison["stacks"]["good"]["differences"]["chair_i"]["p_holm"] = 0.0001
    assert "Holm-corrected p < 0.001" in summary(comparison)[0]
    comparison["stacks"]["good"]["differences"]["chair_i"]["p_holm"] = None
    assert "good (−10.0)." in summary(comparison)[0]


def test_a_length_is_no_rate(comparison: dict[str, Any]) -> None:
    comparison["metrics"]["length"] = {
        "title": "Length", "short": "Length", "percent": False, "higher_is_better": None, "unit": "words",
    }  # fmt: skip
    for data in comparison["stacks"].values():
        data["metrics"]["length"] = interval(9.0, 8.0, 10.0)
    html = render(comparison, [])
    assert "<caption>Rates in %, length in words; with 95 % intervals (bootstrap over pictures)</caption>" in html
    assert "<caption>POPE: rates in %; with 95 % intervals (bootstrap over pictures)</caption>" in html


def test_numbers_and_names_stand_beside_the_difference_plot(comparison: dict[str, Any]) -> None:
    long = "a_stack_whose_name_is_very_long"
    comparison["stacks"][long] = comparison["stacks"]["good"]
    plot = difference_plot(comparison, "chair_i")
    assert plot is not None
    shown = plot["rows"][-1]["name"]
    assert shown.endswith("…")
    right = max(tick["x"] for tick in plot["ticks"])
    assert min(tick["x"] for tick in plot["ticks"]) >= 10 * len(shown)
    assert all(right <= 640 - 10 * len(row["text"]) for row in plot["rows"])
    assert f"<title>{long}</title>" in render(comparison, [])


def test_labels_of_the_cost_plot_cover_no_point_and_no_label(comparison: dict[str, Any]) -> None:
    for index in range(3):  # points that nearly coincide
        comparison["stacks"][f"close{index}"] = stack(0.2 + 0.003 * index, 3.0 + 0.05 * index, {})
    plot = cost_plot(comparison)
    assert plot is not None
    boxes = []
    for point in plot["points"]:
        wide = 10 * len(point["stack"])
        left = point["label_x"] if point["side"] == "start" else point["label_x"] - wide
        boxes.append((left, point["label_y"] - 9, left + wide, point["label_y"] + 9))
    for index, (left, upper, right, lower) in enumerate(boxes):
        assert left >= 0
        assert right <= 640
        for point in plot["points"]:
            assert not (left < point["x"] + 5 and point["x"] - 5 < right and upper < point["y"] < lower)
        for other in boxes[:index]:
            assert not (left < other[2] and other[0] < right and upper < other[3] and other[1] < lower)


def test_the_legend_says_what_is_judged(comparison: dict[str, Any]) -> None:
    assert "only the object is judged, not its place or colour" in render(comparison, [example()])


@pytest.mark.parametrize(
    ("effect", "heading"),
    [
        ("tokens_edited_per_sample", "states edited"),
        ("steps_edited_per_token", "logits edited"),
        ("tokens_changed_per_token", "tokens changed"),
    ],
)
def test_every_kind_of_effect_is_a_column_where_there_is_any(
    comparison: dict[str, Any], effect: str, heading: str
) -> None:
    def groups() -> list[str]:
        return [column.group for column in columns(comparison) if column.section == "effect"]

    always = ["texts", "rows", "rejections", "extra forwards", "extra backwards"]
    for data in comparison["stacks"].values():
        data["effects"][effect] = 0.0
    assert groups() == always
    comparison["stacks"]["good"]["effects"][effect] = 0.5
    assert groups() == [*always, heading]
    html = render(comparison, [])
    assert f'<span class="group">{heading}</span>' in html
    assert "<td>0.50</td>" in html


def test_undefined_numbers_are_dashes(comparison: dict[str, Any]) -> None:
    comparison["stacks"]["good"]["metrics"]["chair_i"] = interval(None, None, None)
    comparison["stacks"]["good"]["differences"]["chair_i"] = {
        **interval(None, None, None), "p": None, "p_holm": None, "excludes_zero": False,
    }  # fmt: skip
    comparison["stacks"]["good"]["cost"]["ms_per_token"] = comparison["stacks"]["good"]["cost"]["overhead"] = None
    html = render(comparison, [])
    assert "<td>–</td>" in html
    assert "None" not in Page(html).text.replace("none", "")
    assert "nan" not in html


def test_a_comparison_without_baseline_or_with_one_stack_has_a_report(comparison: dict[str, Any]) -> None:
    comparison["stacks"] = {"good": {**comparison["stacks"]["good"], "differences": {}, "mcnemar": None}}
    comparison["baseline"] = None
    html = render(comparison, [])
    assert "Difference to" not in html
    assert "Quality against cost" not in html


def test_the_difference_plot_puts_intervals_on_the_right_side_of_zero(comparison: dict[str, Any]) -> None:
    plot = difference_plot(comparison, "chair_i")
    assert plot is not None
    good, unsure = plot["rows"]
    assert good["low"] < good["x"] < good["high"] < plot["zero"]
    assert unsure["low"] < plot["zero"] < unsure["high"]
    assert (good["sure"], good["tone"], unsure["sure"], unsure["tone"]) == (True, "better", False, "same")
    html = render(comparison, [])
    assert html.count('class="hollow"') == 2  # unsure, in both plots


def test_the_cost_plot_has_one_labelled_point_per_stack_inside_the_frame(comparison: dict[str, Any]) -> None:
    plot = cost_plot(comparison)
    assert plot is not None
    points = {point["stack"]: point for point in plot["points"]}
    assert points["none"]["x"] < points["good"]["x"] < points["unsure"]["x"]
    assert points["good"]["y"] > points["none"]["y"]  # fewer hallucinations are lower, and SVG counts downwards
    for point in points.values():
        assert plot["left"] <= point["x"] <= plot["right"]
        assert plot["top"] <= point["high"] <= point["y"] <= point["low"] <= plot["bottom"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-0.3, 7.2), (-1e-4, 2e-4), (0.0, 12345.0), (-3.0, -2.0)])
def test_ticks_are_round_ordered_and_cover_the_range(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks == sorted(set(marks))
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low
    assert marks[-1] >= high
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)


class Marker:
    """Marks the word ``dog`` as hallucinated."""

    def marked(self, sample: Any, text: str) -> list[Span]:
        return [Span(word, "hallucinated" if word == "dog" else "plain") for word in text.split()]

    def images(self, sample: Any) -> list[Image.Image]:
        return []


def test_pictures_about_which_stacks_disagree_come_first_and_questions_are_few() -> None:
    samples, texts = [], {"one": {}, "two": {}}
    for index, (first, second) in enumerate([("cat", "cat"), ("cat", "dog"), ("cat", "cow")]):
        samples.append(Sample(id=f"{index}/c", image_id=str(index), task="caption", prompt="?"))
        texts["one"][f"{index}/c"], texts["two"][f"{index}/c"] = first, second
        for question in range(5):
            key = f"{index}/{question}"
            samples.append(Sample(id=key, image_id=str(index), task="yes_no", prompt=f"q{question % 4}?"))
            texts["one"][key], texts["two"][key] = "yes", "dog" if question == 3 and index == 1 else "yes"
    records = {
        name: {key: type("R", (), {"text": text})() for key, text in replies.items()} for name, replies in texts.items()
    }
    chosen = choose_examples(Marker(), samples, records, limit=2)  # type: ignore[arg-type]
    assert [item.image_id for item in chosen] == ["1", "2"]
    assert [entry.sample.task for entry in chosen[0].entries] == ["caption", "yes_no", "yes_no", "yes_no"]
    assert chosen[0].entries[1].sample.prompt == "q3?"  # the one that separates the stacks
    assert len({entry.sample.prompt for entry in chosen[0].entries}) == 4


def test_every_column_has_a_cell_for_every_stack(comparison: dict[str, Any]) -> None:
    for column in columns(comparison):
        assert set(column.cells) == set(comparison["stacks"])
