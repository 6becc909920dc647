"""``report.tex``: the headline numbers as a table for a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mitigate.report.sentences import beside, listed, on_few_pictures, unit_of
from mitigate.runner.table import number, resampled, size

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "^": r"\textasciicircum{}",
    "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": "{`}", "[": "{[}", "]": "{]}", "*": "{*}", "-": "{-}", "–": "--",
    "−": "$-$", "×": r"$\times$", "…": r"\ldots{}", "·": r"\textperiodcentered{}",
}  # fmt: skip
#: Letters beyond ASCII that every LaTeX sets.
_LETTERS = re.compile(r"[À-ÖØ-öø-ÿ]")


def latex(comparison: Mapping[str, Any], *, title: str = "") -> str:
    r"""Return a table with booktabs rules: value and paired difference of every headline metric, and the context.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    title
        First words of the caption; the comparison's name by default.
    """
    headline = comparison["headline"]
    context = list(dict.fromkeys(other for name in headline for other in beside(comparison, name)))
    paired = any(data["differences"] for data in comparison["stacks"].values())
    heads, below, rules, place = ["stack"], [""], [], 2
    for name in headline:
        metric = comparison["metrics"][name]
        width = 2 if paired else 1
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(metric['title'])}}}")
        below += [escape(unit_of(metric).strip()) or "value", "difference"][:width]
        rules.append(rf"\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    heads += [escape(comparison["metrics"][name]["title"]) for name in context]
    below += [escape(unit_of(comparison["metrics"][name]).strip()) for name in context]
    columns = place - 1 + len(context)
    best = {name: _best(comparison, name) for name in headline}
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(comparison, title or comparison['name'], paired=paired)}}}",
        r"\small\setlength{\tabcolsep}{4pt}",
        rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
        r"\toprule",
        rf"{' & '.join(heads)} \\",
        *([" ".join(rules)] if paired else []),
        rf"{' & '.join(below)} \\",
        r"\midrule",
        *(
            rf"{' & '.join(line)} \\"
            for stack in comparison["stacks"]
            for line in _row(comparison, stack, best, context, paired=paired)
        ),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(
    comparison: Mapping[str, Any],
    stack: str,
    best: Mapping[str, str | None],
    context: Sequence[str],
    *,
    paired: bool,
) -> tuple[list[str], list[str]]:
    """Return a line of values and, below it, one of intervals: side by side they are too wide for a page."""
    data, row = comparison["stacks"][stack], [(escape(stack), "")]
    for name, winner in best.items():
        metric = comparison["metrics"][name]
        row.append(_numbers(metric, data["metrics"][name], bold=stack == winner))
        if paired:
            found = data["differences"].get(name)
            row.append(("", "") if found is None else _numbers(metric, found, bold=stack == winner, sign=True))
    row += [_numbers(comparison["metrics"][name], data["metrics"][name]) for name in context]
    return [value for value, _ in row], [interval for _, interval in row]


def _numbers(
    metric: Mapping[str, Any], found: Mapping[str, Any], *, bold: bool = False, sign: bool = False
) -> tuple[str, str]:
    factor = 100.0 if metric["percent"] else 1.0
    value, low, high = (
        number(None if found[key] is None else factor * found[key], sign=sign).replace("−", "-")
        for key in ("value", "low", "high")
    )
    shown = rf"$\mathbf{{{value}}}$" if bold else f"${value}$"
    if "–" in (value, low, high):
        return shown.replace("–", "-"), ""
    return shown, rf"{{\scriptsize $[{low}, {high}]$}}"


def _best(comparison: Mapping[str, Any], name: str) -> str | None:
    """Return the stack to set in bold: the best value, if it is a stack whose difference excludes zero."""
    metric = comparison["metrics"][name]
    known = {
        stack: data["metrics"][name]["value"]
        for stack, data in comparison["stacks"].items()
        if data["metrics"][name]["value"] is not None
    }
    if metric["higher_is_better"] is None or not known:
        return None
    winner = (max if metric["higher_is_better"] else min)(known, key=lambda stack: known[stack])
    difference = comparison["stacks"][winner]["differences"].get(name)
    return winner if difference is not None and difference["excludes_zero"] else None


def _caption(comparison: Mapping[str, Any], title: str, *, paired: bool) -> str:
    parts = [
        f"{escape(title)}: {escape(comparison['benchmark']['name'])}, {escape(comparison['model'])}, "
        f"{size(comparison)}.",
        rf"Brackets: 95\,\% intervals (bootstrap over {resampled(comparison)}).",
    ]
    if paired:
        parts.append(
            f"Differences are to {escape(comparison['baseline'])} on the same samples. Bold: the best value of "
            r"a column, only if the 95\,\% interval of its difference excludes zero (not corrected for several stacks)."
        )
    few = list(dict.fromkeys(stack for name in comparison["headline"] for stack in on_few_pictures(comparison, name)))
    if few:
        parts.append(f"Too few pictures count or changed, so intervals are too narrow: {escape(listed(few))}.")
    parts += [escape(note) for note in comparison["notes"]]
    return " ".join(parts)


def escape(text: object) -> str:
    """Return a text that LaTeX sets as it is; characters that not every font has are named by their code."""
    return "".join(map(_sign, " ".join(str(text).split())))


def _sign(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if (char.isascii() and char.isprintable()) or _LETTERS.fullmatch(char):
        return char
    return rf"\texttt{{U+{ord(char):04X}}}"
