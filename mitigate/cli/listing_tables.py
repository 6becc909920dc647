"""The tables of ``mitigate list``: one per kind, made from the rows that ``--json`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mitigate.core.method import Tags
from mitigate.discovery import BUILTIN_DISTRIBUTION

Row = Mapping[str, Any]


def extra_passes(tags: Tags | Mapping[str, Any]) -> str:
    """Write the extra passes of a method's tags: ``1 forward/sample, 1 backward/token`` or ``none``."""
    values = vars(tags) if isinstance(tags, Tags) else tags
    parts = []
    for key in ("forwards_per_sample", "forwards_per_token", "backwards_per_sample", "backwards_per_token"):
        if values[key]:
            passes, _, unit = key.partition("s_per_")
            parts.append(f"{values[key]:g} {passes}/{unit}")
    return ", ".join(parts) or "none"


def _table(
    title: str, columns: Sequence[str], cells: Callable[[Row], Sequence[str]]
) -> Callable[[Sequence[Row]], Table]:
    """Return what makes the table of a kind: its name first, then what is told, then the package that brings it."""

    def make(rows: Sequence[Row]) -> Table:
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in ("name", *columns, "package"):
            table.add_column(column, overflow="fold")
        for row in rows:
            package = str(row["distribution"])
            if "broken" in row:
                told = [Text(f"broken: {row['broken']}", style="red"), *([Text()] * (len(columns) - 1))]
            else:
                told = [Text(cell) for cell in cells(row)]
            if row.get("imports_torch"):
                package = f"{package} (slow to list: imports torch, see mitigate.lazy)"
            table.add_row(Text(row["name"]), *told, Text(package))
        return table

    return make


def _method(row: Row) -> Sequence[str]:
    points = dict.fromkeys([*row["tags"]["reads"], *row["tags"]["writes"]])
    paper = f"arXiv {row['paper']['arxiv']}" if row["paper"] else ""
    return (row["summary"], paper, _fidelity(row), ", ".join(points), extra_passes(row["tags"]))


def _fidelity(row: Row) -> str:
    """Write a method's fidelity, and below it the presets that have another."""
    others = {preset: word for preset, word in row["preset_fidelity"].items() if word != row["fidelity"]}
    return "\n".join([row["fidelity"], *(f"{preset}: {word}" for preset, word in others.items())])


def _benchmark(row: Row) -> Sequence[str]:
    return (row["summary"], str(row["version"]), ", ".join(parameter["name"] for parameter in row["parameters"]))


def _model(row: Row) -> Sequence[str]:
    facts = row["geometry"]
    shape = f"{facts['family']}, {facts['layers']} layers, {facts['heads']} heads" if facts else "from the checkpoint"
    return (row["path"] or "model.path=...", row["dtype"], shape, ", ".join(row["tuned"]))


def _stack(row: Row) -> Sequence[str]:
    return (", ".join(row["methods"]) or "(none)", _values(row))


def _values(row: Row) -> str:
    return ", ".join(f"{key}={value}" for key, value in row["values"].items())


def _package(row: Row) -> Sequence[str]:
    files = row["files"]
    if row["distribution"] == BUILTIN_DISTRIBUTION:  # listed above, kind by kind
        groups = Counter(file.partition("/")[0] for file in files)
        files = [f"{group}/ ({count})" if count > 1 else group for group, count in groups.items()]
    return (", ".join(files), "; ".join(row["unused"]))


#: Kind -> rows -> table.
TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "methods": _table("Methods", ("what it does", "paper", "fidelity", "points", "extra passes"), _method),
    "models": _table("Models", ("checkpoint", "dtype", "decoder", "tuned for"), _model),
    "benchmarks": _table("Benchmarks", ("what it measures", "version", "parameters"), _benchmark),
    "metrics": _table(
        "Metrics", ("what it measures", "names"), lambda row: (row["summary"], ", ".join(row["metrics"]))
    ),
    "stacks": _table("Stacks", ("methods, in order", "values of its own"), _stack),
    "experiments": _table(
        "Experiments", ("values", "published table"), lambda row: (_values(row), row["published_table"])
    ),
    "families": _table("Model families", ("adapter",), lambda row: (row["class"],)),
    "diagnostics": _table("Diagnostics", ("what it shows",), lambda row: (row["summary"],)),
    "trackers": _table("Trackers", ("what it does", "modes"), lambda row: (row["summary"], ", ".join(row["modes"]))),
    "packages": _table("Packages of configuration files", ("files", "not used"), _package),
}
