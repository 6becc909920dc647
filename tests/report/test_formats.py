from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mitigate.report import latex as latex_module
from mitigate.report.latex import latex
from mitigate.report.markdown import escape, markdown
from mitigate.report.tidy import COLUMNS, tidy
from tests.report.worlds import HOSTILE, difference, made_comparison

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1", "＝1")


@pytest.fixture
def comparison() -> dict[str, Any]:
    return made_comparison()


def renamed(evil: str) -> dict[str, Any]:
    comparison = made_comparison()
    comparison["stacks"][evil] = comparison["stacks"].pop("good")
    comparison["stacks"][evil]["methods"] = {evil: {evil: evil}}
    comparison["name"] = comparison["model"] = evil
    comparison["notes"] = [evil]
    comparison["breakdowns"] = {evil: {evil: comparison["breakdowns"]["kind"]["often"]}}
    comparison["config"] = {evil: f"``` {evil}"}
    for metric in comparison["metrics"].values():
        metric["title"] = evil
    return comparison


def test_markdown_holds_summary_tables_breakdowns_and_provenance(comparison: dict[str, Any]) -> None:
    text = markdown(comparison, title="A title", command="mitigate report runs/x")
    assert text.startswith("# A title\n")
    assert r"Better: good (−10.0 \[−15.0, −2.0\], Holm p = 0.020)." in text
    assert r"| good | 20.0 \[15.0, 25.0\] | −10.0\* \[−15.0, −2.0\] | 0.010 | 0.020 | +0.25 | 2.8 |" in text
    assert "### By kind" in text
    assert text.index("| often | 9 |") < text.index("| rare | 2 |")
    assert "* command: mitigate report runs/x" in text
    assert "* data (sha256): d4d4" in text


@pytest.mark.parametrize(
    "evil", [*HOSTILE, "a|b", "# head", "- item", "1. item", "*bold* _it_ `code`", "[x](http://e.x)"]
)
def test_markdown_shows_hostile_text_as_it_is(evil: str) -> None:
    text = markdown(renamed(evil))
    lines = text.split("### Configuration")[0].splitlines()
    assert not re.search(r"<(?!!?$)[a-zA-Z/!]", "\n".join(lines))
    assert "http://" not in "\n".join(lines)
    plain = markdown(renamed("x")).split("### Configuration")[0].splitlines()
    # the same headings, items and cells: nothing in it made a new one
    kinds = [[re.match(r"(#+ |\* |\| |> )?", line)[0] for line in part] for part in (lines, plain)]  # type: ignore[index]
    assert kinds[0] == kinds[1]
    cells = [[len(re.findall(r"(?<!\\)\|", line)) for line in part] for part in (lines, plain)]
    assert cells[0] == cells[1]
    fence = text[text.index("### Configuration") :].splitlines()[2]
    assert fence == "````json"


def test_escape_keeps_words_whole() -> None:
    assert escape("a b_c\nd") == r"a b\_c d"
    assert escape("<b>&") == "&lt;b&gt;&amp;"


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_one_number_a_row_with_its_tests(comparison: dict[str, Any]) -> None:
    rows = rows_of(tidy(comparison))
    assert tuple(rows[0]) == COLUMNS
    (row,) = [row for row in rows if (row["stack"], row["metric"], row["breakdown"]) == ("good", "chair_i", "")]
    numbers = {"value": 0.2, "difference": -0.1, "diff_low": -0.15, "p_holm": 0.02, "effect_size": 0.25, "mde": 0.028}
    assert {key: float(row[key]) for key in (*numbers, "n")} == {**numbers, "n": 70}
    assert (row["unit"], row["higher_is_better"], row["baseline"], row["failures"]) == ("rate", "false", "none", "0")
    (row,) = [row for row in rows if (row["stack"], row["category"]) == ("good", "rare")]
    assert (row["breakdown"], row["value"], row["diff_high"], row["n"]) == ("kind", "0.25", "-0.0625", "2")
    assert [row["unit"] for row in rows if row["metric"] == "length"] == ["words"] * 3


@pytest.mark.parametrize("evil", [*HOSTILE, *FORMULAS, 'a"b,c\nd'])
def test_csv_holds_no_formula_and_keeps_its_shape(evil: str) -> None:
    text = tidy(renamed(evil))
    rows = rows_of(text)
    assert len(rows) == len(rows_of(tidy(renamed("x"))))
    for row in rows:
        for key, cell in row.items():
            assert cell is not None
            try:
                float(cell)
            except ValueError:
                assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "＝")), (key, cell)
    if evil in FORMULAS:
        assert f"'{evil}" in {row["stack"] for row in rows}


def test_infinite_numbers_stay_numbers_in_csv(comparison: dict[str, Any]) -> None:
    comparison["stacks"]["good"]["differences"]["chair_i"]["effect_size"] = "-inf"
    assert "-inf" in {row["effect_size"] for row in rows_of(tidy(comparison))}


def test_latex_sets_the_best_in_bold_only_if_it_is_sure(comparison: dict[str, Any]) -> None:
    text = latex(comparison, title="Trial")
    assert r"good & $\mathbf{20.0}$ & $\mathbf{-10.0}$ &" in text
    assert "\\\\\n & {\\scriptsize $[15.0, 25.0]$} & {\\scriptsize $[-15.0, -2.0]$} &" in text
    assert text.count("mathbf") == 2  # F1 is best without methods: no bold there
    assert r"only if the 95\,\% interval of its difference excludes zero" in text
    comparison["stacks"]["good"]["differences"]["chair_i"] = difference(-0.1, -0.2, 0.01)
    assert "mathbf" not in latex(comparison)


def test_pooled_seeds_are_named(comparison: dict[str, Any]) -> None:
    for text in (latex(comparison), markdown(comparison)):
        assert re.search(r"7 pictures, 70 answers per stack( ·|\.)", text)
    comparison["stacks"]["good"]["seeds"] = [0, 3]
    for text in (latex(comparison), markdown(comparison)):
        assert "7 pictures, 70 answers per stack and seed (seeds 0, 3)" in text


def test_what_is_resampled_is_named(comparison: dict[str, Any]) -> None:
    comparison["n_clusters"] = 7
    assert "(bootstrap over pictures)" in latex(comparison)
    comparison["n_clusters"] = 3
    for text in (latex(comparison), markdown(comparison)):
        assert "7 pictures in 3 groups, 70 answers" in text
        assert "(bootstrap over groups" in text


def test_latex_rows_have_as_many_cells_as_columns(comparison: dict[str, Any]) -> None:
    lines = latex(comparison).splitlines()
    (columns,) = [len(match[1]) for line in lines if (match := re.match(r"\\begin\{tabular\}\{(\w+)\}", line))]
    rows = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [columns] * 6
    assert columns == 1 + 2 * 2 + 2


@pytest.mark.parametrize("evil", [*HOSTILE, r"\input{/etc/passwd}", "50% & $x^2_i$ ~ #1 {", "naïve – ☃", "*[2em]"])
def test_latex_shows_hostile_text_as_it_is(evil: str) -> None:
    text = latex(renamed(evil), title=evil)
    text.encode("utf-8")
    assert text.count("\n") == latex(renamed("x")).count("\n")
    body = re.sub(r"\\[a-z]+\d*\{\}|\\[{}$&#_%]", "", latex_module.escape(evil))
    assert not re.search(r"[$&#^_~%]|\\(?!texttt)", body.replace("$-$", ""))
    assert body.count("{") == body.count("}")
    # after the end of a row, a star or bracket would be taken for an option of it
    assert not re.search(r"\\\\\n[*\[]", text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    tables = "\n".join(latex(renamed(evil)) for evil in (*HOSTILE, "naïve – ☃"))
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "paper.tex").write_text(f"{head}{tables}\n\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
