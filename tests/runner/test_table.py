from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mitigate.runner import compare
from mitigate.runner.progress import StackProgress
from mitigate.runner.standalone import notes_of
from mitigate.runner.table import number, print_table, units
from tests.runner.fake_world import FakeLoaded, FakeMethod, install, resolved


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    install(monkeypatch.setattr, FakeLoaded())
    runs = [resolved(), resolved("turned"), resolved("a+long+name", methods={"turn": FakeMethod(period=0)})]
    compare(runs, tmp_path / "c", console=Console(quiet=True))
    return json.loads((tmp_path / "c" / "comparison.json").read_text())  # type: ignore[no-any-return]


def printed(comparison: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_table(comparison, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 120, 160, 420])
def test_the_table_folds_to_the_width_and_loses_nothing(comparison: dict[str, Any], width: int) -> None:
    text = printed(comparison, width)
    table = text[: text.index("* the paired")]
    assert "…" not in text
    assert max(len(line.rstrip()) for line in table.splitlines()[1:]) <= width
    for stack, data in comparison["stacks"].items():
        rows = [line for line in table.splitlines() if line.strip().startswith(f"{stack} ")]
        assert len(rows) == (1 if width == 420 else len([line for line in table.splitlines() if "───" in line]))
        shown = " ".join(rows)
        for metric in ("chair_s", "chair_i", "recall"):
            assert number(100 * data["metrics"][metric]["value"]) in shown
        assert number(data["cost"]["overhead"], 2) + "×" in shown
    difference = comparison["stacks"]["turned"]["differences"]["chair_i"]
    ends = ", ".join(number(100 * difference[end], sign=True) for end in ("low", "high"))
    assert (
        f"{number(100 * difference['value'], sign=True)}{'*' if difference['excludes_zero'] else ''} [{ends}]" in table
    )


def test_a_difference_that_excludes_zero_is_starred(comparison: dict[str, Any]) -> None:
    difference = comparison["stacks"]["turned"]["differences"]["chair_i"]
    difference.update(value=-0.1, low=-0.2, high=-0.05, excludes_zero=True)
    assert "−10.0* [−20.0, −5.0]" in printed(comparison, 160)


def test_stack_names_and_notes_are_no_markup(comparison: dict[str, Any]) -> None:
    comparison["stacks"] = {f"[red]{name}": data for name, data in comparison["stacks"].items()}
    comparison["baseline"] = "[red]none"
    comparison["notes"] = ["[bold]plain"]
    text = printed(comparison, 160)
    assert "[red]turned" in text
    assert "[bold]plain" in text


def test_numbers() -> None:
    assert [number(value) for value in (None, float("nan"), -0.04, -1.25, 3.0)] == ["–", "–", "0.0", "−1.2", "3.0"]
    assert [number(value, sign=True) for value in (0.0, 0.06, -0.06)] == ["0.0", "+0.1", "−0.1"]


def lines(total: int, step: int, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with StackProgress(console, 2) as progress:
        progress.begin("first", total, 0)
        for _ in range(total // step):
            progress.advance(step)
        progress.end()
        progress.skip()
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_without_a_terminal_a_quick_stack_is_one_line() -> None:
    text = lines(100, 5, terminal=False)
    assert text.count("\n") == 1
    assert text.startswith("first: 100/100 samples, ")


def test_without_a_terminal_a_slow_stack_is_a_line_per_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 6))
    monkeypatch.setattr("mitigate.runner.progress.time.monotonic", lambda: float(next(clock)))
    counts = [line.split()[1] for line in lines(100, 5, terminal=False).splitlines()]
    assert counts == ["25/100", "50/100", "75/100", "100/100"]


def test_on_a_terminal_there_is_a_bar_per_stack_and_one_for_all() -> None:
    text = lines(100, 50, terminal=True)
    assert "all stacks" in text
    assert "first" in text
    assert "2/2" in text
    assert "100/100" in text


def test_the_title_says_what_the_numbers_are(comparison: dict[str, Any]) -> None:
    assert printed(comparison, 160).splitlines()[0].rstrip().endswith("rates in %, length in words")


@pytest.mark.parametrize(("benchmark", "path", "notes"), [("testbed", "maker/model", 1), ("coco", "maker/model", 0)])
def test_the_testbeds_note_goes_with_its_pictures_whatever_the_model(benchmark: str, path: str, notes: int) -> None:
    one = resolved(benchmark__name=benchmark, model__path=path)
    assert len(notes_of([one])) == notes


def test_units_are_named_once_and_many_of_a_kind_together() -> None:
    def metric(title: str, unit: str = "", *, percent: bool = False) -> dict[str, Any]:
        return {"title": title, "unit": unit, "percent": percent}

    rate, length, words = metric("F1", percent=True), metric("Length", "words"), metric("POPE words", "words")
    assert units([rate, length, words]) == "rates in %, length in words"
    scores = [metric(f"MME {name}", "points") for name in ("OCR", "count", "color")]
    assert units([rate, *scores[:2]]) == "rates in %, MME OCR, MME count in points"
    assert units([rate, *scores]) == "rates in %, all others in points"
    assert units(scores[:1]) == "MME OCR in points"


def test_failed_samples_are_a_column_only_where_there_are_any(comparison: dict[str, Any]) -> None:
    assert "failed" not in printed(comparison, 420)
    comparison["stacks"]["turned"]["failures"] = 3
    assert "failed" in printed(comparison, 420)


def test_the_smallest_detectable_difference_is_named_below(comparison: dict[str, Any]) -> None:
    for data in comparison["stacks"].values():
        for difference in data["differences"].values():
            difference["mde"] = None
    comparison["stacks"]["turned"]["differences"]["chair_i"]["mde"] = 0.0123
    assert "could have shown (power 80 %): CHAIR_i 1.2." in printed(comparison, 420)
