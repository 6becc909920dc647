from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from mitigate.report.html import render
from mitigate.report.samples import Choice, choose_samples
from mitigate.runner.table import columns
from tests.report.worlds import HOSTILE, Words, World, interval, made_comparison, record

NOTHING = Choice(shown=[], total=70)
EMPTY = ("meta", "img", "br", "line", "circle", "input")


@pytest.fixture
def comparison() -> dict[str, Any]:
    return made_comparison()


def page_of(comparison: dict[str, Any], benchmark: Words | None = None, **options: Any) -> str:
    words = benchmark or Words()
    return render(comparison, choose_samples(words, World().runs(), comparison["baseline"]), words, **options)


class Page(HTMLParser):
    """Collects tags, checks that they close, and notes every address and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {key for key, _ in attrs}
        self.addresses += [
            value or "" for key, value in attrs if key in ("src", "href", "action", "data", "xlink:href")
        ]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data


def test_the_page_is_whole_and_needs_nothing_from_outside(comparison: dict[str, Any]) -> None:
    html = page_of(comparison, command="mitigate report")
    page = Page(html)
    assert page.open == []
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"style", "onclick", "onload"} & page.attributes
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == 5  # one per picture, not per sample
    assert not re.search(r"url\(|@import|https?://", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_nothing_runs_but_the_script_whose_hash_is_in_the_policy(comparison: dict[str, Any]) -> None:
    html = page_of(comparison)
    page = Page(html)
    assert [attrs for attrs, _ in page.scripts] == [{"type": "application/json", "id": "facts"}, {}]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = policy[1].replace("&#39;", "'")
    assert rules.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in rules
    assert "unsafe" not in rules


def test_the_filters_get_their_facts_as_data(comparison: dict[str, Any]) -> None:
    (_, facts), _ = Page(page_of(comparison)).scripts
    read = json.loads(facts)
    assert (read["stacks"], read["baseline"]) == (["none", "good", "unsure"], "none")
    # samples of one picture stand together, at the place of the first of them
    assert [sample["id"] for sample in read["samples"]][:3] == ["p1/fixed", "p1/question", "p2/broken"]
    assert read["samples"][0] == {
        "id": "p1/fixed",
        "task": "caption",
        "categories": ["topic=animals"],
        "states": {"good": ["changed", "fixed"]},
    }


@pytest.mark.parametrize("evil", HOSTILE)
def test_what_a_model_or_a_user_wrote_is_escaped(comparison: dict[str, Any], evil: str) -> None:
    plain = Page(hostile_page("x" * len(evil)))  # long names get a <title> of their own
    html = hostile_page(evil)
    page = Page(html)
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert page.open == []
    json.loads(page.scripts[0][1])
    assert "<!--" not in page.scripts[0][1]
    html.encode("utf-8", "backslashreplace")


def hostile_page(evil: str) -> str:
    """Return a page in which everything that is text is hostile."""
    comparison = made_comparison()
    comparison["name"] = comparison["model"] = comparison["data_hash"] = evil
    stacks = comparison["stacks"]
    stacks[f"{evil} good"] = stacks.pop("good")
    mine = stacks[f"{evil} good"]
    mine["methods"] = {evil: {evil: evil}}
    mine["effects"]["methods"] = {evil: {evil: 1.0}}
    mine["effects"]["idle"] = [evil]
    mine["provenance"] = {evil: evil, f"methods.{evil}.{evil}": evil}
    mine["notes"] = [evil]
    mine["record"] = {"created_at": evil, "versions": {evil: evil}, "git": {"sha": evil}, "weights": evil}
    comparison["config"] = {evil: evil}
    comparison["notes"] = [evil]
    comparison["benchmark"] = {"name": evil, "version": 1, evil: evil}
    comparison["breakdowns"] = {evil: {evil: copy.deepcopy(comparison["breakdowns"]["kind"]["often"])}}
    for metric in comparison["metrics"].values():
        metric["title"] = f"{evil} {metric['title']}"
        metric["unit"] = evil
    world = World(benchmark=Words(category=evil), prefix=f"{evil} ")
    runs = world.runs()
    for run in runs:
        for key, answer in list(run.answers.items()):
            names = {"prompt": evil, "image_id": f"{evil} {answer.image_id}", "id": f"{evil} {answer.id}"}
            run.answers[key] = dataclasses.replace(answer, **names)
    runs[1] = dataclasses.replace(runs[1], stack=f"{evil} good")
    choice = choose_samples(world.benchmark, runs, "none")
    return render(comparison, choice, world.benchmark, title=evil, command=evil)


def test_hallucinated_words_are_marked_by_more_than_colour(comparison: dict[str, Any]) -> None:
    html = page_of(comparison)
    assert '<mark class="hallucinated" title="not in the picture, or wrong">dog</mark>' in html
    assert '<mark class="correct">cat</mark>' in html
    assert re.search(r'mark\.hallucinated::before \{ content: "✗', html)


def test_stacks_that_say_the_same_share_a_line(comparison: dict[str, Any]) -> None:
    html = page_of(comparison)
    block = html[html.index("Ask p1/fixed") : html.index("Ask p1/question")]
    first, second = block.split('<div class="reply">')[1:]
    assert re.findall(r'data-stack="(\w+)"', first) == ["none", "unsure"]
    assert re.findall(r'data-stack="(\w+)"', second) == ["good"]
    assert '<span class="badge fixed">fixed</span>' in second
    assert "attention rows edited: 4 of 8, mean L1 change of a row: 0.125" in block


def test_pictures_are_enlarged_without_smoothing_only_if_small(comparison: dict[str, Any]) -> None:
    assert 'class="pixelated"' in page_of(comparison)
    assert 'class="pixelated"' not in page_of(comparison, Words(size=(900, 600)))


def test_without_scripts_all_samples_are_there_and_the_filters_are_not(comparison: dict[str, Any]) -> None:
    html = page_of(comparison)
    assert re.search(r'<form id="filters"[^>]* hidden>', html)
    assert html.count(" hidden>") == 1
    assert html.count('<div class="sample"') == 6
    assert "<noscript>" in html


def test_missing_pictures_are_told_and_the_answers_shown(comparison: dict[str, Any]) -> None:
    html = page_of(comparison, Words(broken=True))
    assert "<img" not in html
    assert "5 pictures could not be read and are not shown: data/words does not exist; get it" in html
    assert "Ask p3/changed" in html


def test_the_page_says_how_many_samples_it_shows(comparison: dict[str, Any]) -> None:
    assert "Shown are 6 of 6 samples:" in page_of(comparison)
    choice = choose_samples(Words(), World().runs(), "none", limit=4)
    html = render(comparison, choice, Words())
    assert "Shown are 4 of 6 samples, chosen by what became of them and then by chance (seed 0)" in html
    assert "No samples are shown (70 there are)" in render(comparison, NOTHING)


def test_tables_show_values_intervals_tests_marks_and_flags(comparison: dict[str, Any]) -> None:
    html = render(comparison, NOTHING)
    assert '<td>20.0<span class="interval">[15.0, 25.0]</span></td>' in html
    assert '<td class="better">−10.0*<span class="interval">[−15.0, −2.0]</span></td>' in html
    assert '<td class="worse">−20.0*' in html
    assert '<td class="flag">0.0</td>' in html
    assert "&lt; 0.001" in html
    assert "did nothing: beta" in html
    assert "not evidence about large models" in html
    row = html[html.index('<th scope="row"><span class="row">good') :]
    assert re.findall(r"<td[^>]*>([^<]*)<", row)[:8] == [
        "20.0", "−10.0*", "0.010", "0.020", "+0.25", "2.8", "9.0", "−2.0*",
    ]  # fmt: skip


def test_failures_are_a_column_where_there_are_any(comparison: dict[str, Any]) -> None:
    assert ">failed<" not in render(comparison, NOTHING)
    comparison["stacks"]["good"]["failures"] = 3
    html = render(comparison, NOTHING)
    assert "failed</th>" in html
    assert "Samples that failed: 3 with good." in html


def test_the_context_of_its_family_stands_beside_a_metric(comparison: dict[str, Any]) -> None:
    html = render(comparison, NOTHING)
    heads = [re.sub(r"<[^>]*>", "", head) for head in re.findall(r"<thead>(.*?)</thead>", html, re.S)]
    assert "Length" in heads[0]
    assert "yes-rate" not in heads[0]
    assert "yes-rate" in heads[1]
    assert "Length" not in heads[1]


def test_breakdowns_are_sorted_by_size_and_closed(comparison: dict[str, Any]) -> None:
    html = render(comparison, NOTHING)
    block = html[html.index('id="breakdowns"') : html.index('id="samples"')]
    assert "<details>" in block
    assert "By kind (2)" in block
    assert block.index(">often<") < block.index(">rare<")
    assert '<td class="better">−12.5*<span class="interval">[−25.0, −6.2]</span></td>' in block


def test_provenance_names_settings_seeds_hashes_judges_and_the_command(comparison: dict[str, Any]) -> None:
    text = Page(render(comparison, NOTHING, command="mitigate report runs/x")).text
    for shown in ("mitigate report runs/x", "judge-9", "d4d4", "e5e5", "sha256:f1f1", "9.9", "abc (with uncommitted"):
        assert shown in text
    assert "decoding.max_new_tokens (quick)" in text
    assert "0.2 (command line)" in text


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
    html = render(comparison, NOTHING)
    assert f'<span class="group">{heading}</span>' in html
    assert "<td>0.50</td>" in html


def test_undefined_numbers_are_dashes_and_infinite_ones_signs(comparison: dict[str, Any]) -> None:
    good = comparison["stacks"]["good"]
    good["metrics"]["chair_i"] = interval(None, None, None)
    good["differences"]["chair_i"] = {
        **interval(None, None, None), "p": None, "p_holm": None, "effect_size": "-inf", "mde": None,
        "excludes_zero": False,
    }  # fmt: skip
    good["mcnemar"]["odds_ratio"] = "inf"
    good["cost"]["ms_per_token"] = good["cost"]["overhead"] = None
    html = render(comparison, NOTHING)
    assert "<td>–</td>" in html
    assert "<td>−∞</td>" in html
    assert "<td>∞</td>" in html
    assert "None" not in Page(html).text.replace("none", "")
    assert ">nan<" not in html


def test_a_comparison_without_baseline_or_with_one_stack_has_a_report(comparison: dict[str, Any]) -> None:
    comparison["stacks"] = {"good": {**comparison["stacks"]["good"], "differences": {}, "mcnemar": None}}
    comparison["baseline"], comparison["breakdowns"] = None, {}
    html = page_of(comparison)
    assert "Difference to" not in html
    assert "Quality against cost" not in html
    assert 'value="changed"' not in html
    assert 'value="all"' in html
    assert "<fieldset hidden>" in html
    assert "<em>Fixed</em>" not in html


def test_failed_samples_can_be_filtered_where_there_are_any(comparison: dict[str, Any]) -> None:
    assert 'value="failed"' not in page_of(comparison)
    runs = World().runs()
    runs[1].answers["p4/same"] = record("p4/same", "", image="p4", error="out of memory")
    html = render(comparison, choose_samples(Words(), runs, "none"), Words())
    assert 'value="failed"' in html
    assert "failed: out of memory" in html


def test_every_column_has_a_cell_for_every_stack(comparison: dict[str, Any]) -> None:
    for column in columns(comparison):
        assert set(column.cells) == set(comparison["stacks"])
