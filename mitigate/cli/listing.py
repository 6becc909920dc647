"""``mitigate list``: what is installed, without loading torch or any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from omegaconf import ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mitigate.cli.options import read_options
from mitigate.compose.facts import facts_of
from mitigate.compose.schema import ModelConfig
from mitigate.compose.schemas import parameters_of, plain
from mitigate.compose.session import Session, flatten, session
from mitigate.core.method import Method, Tags
from mitigate.errors import ConfigError
from mitigate.registry import Registry, benchmarks, methods, suggestion

KINDS = ("methods", "models", "benchmarks", "stacks")

HELP = """\
Usage: mitigate list [methods|models|benchmarks|stacks] [--json]

List what is installed, with what packages add. Without a kind: everything. --json gives all there is to know, with
every parameter's type, default and description.
"""


def show(arguments: Sequence[str], console: Console) -> int:
    """List plugins and presets of one kind or of all kinds."""
    options = read_options("list", arguments, ("json",))
    if options.help:
        console.print(HELP, end="", markup=False, highlight=False)
        return 0
    for kind in options.overrides:
        if kind not in KINDS:
            raise ConfigError(f"cannot list {kind!r}{suggestion(kind, KINDS)}")
    kinds = options.overrides or list(KINDS)
    with session() as hydra:
        found = {kind: _collect(kind, hydra) for kind in kinds}
    if options.json:
        content: Any = found if len(kinds) != 1 else found[kinds[0]]
        console.print(json.dumps(content, indent=2, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True)
        return 0
    for kind in kinds:
        console.print(_TABLES[kind](found[kind]))
    return 0


def _collect(kind: str, hydra: Session) -> list[dict[str, Any]]:
    if kind == "methods":
        return _plugins(methods(), _about_method)
    if kind == "benchmarks":
        return _plugins(benchmarks(), lambda plugin: {"summary": plugin.summary, "version": plugin.version})
    if kind == "models":
        return [_about_model(name, hydra) for name in hydra.options("model")]
    return [_about_stack(name, hydra) for name in hydra.options("stack")]


def _plugins(registry: Registry[Any], about: Any) -> list[dict[str, Any]]:
    rows = []
    for entry in registry.entries():
        row: dict[str, Any] = {"name": entry.name, "class": entry.value, "distribution": entry.distribution}
        if entry.broken is not None:
            row["broken"] = entry.broken
        else:
            plugin = registry.get(entry.name)
            row |= about(plugin)
            row["parameters"] = [vars(parameter) for parameter in parameters_of(plugin)]
        rows.append(row)
    return rows


def _about_method(plugin: type[Method]) -> dict[str, Any]:
    paper = plugin.paper
    return {
        "summary": plugin.summary,
        "paper": None if paper is None else vars(paper),
        "fidelity": plugin.fidelity.value,
        "preset_fidelity": {preset: fidelity_of(plugin, preset) for preset in plugin.presets},
        "version": plugin.version,
        "tags": {name: plain(value) for name, value in vars(plugin.tags).items()},
        "presets": plain(plugin.presets),
    }


def fidelity_of(plugin: type[Method], preset: str) -> str:
    """Return how close a preset of a method is to its source: the class's word unless the preset has its own."""
    return str(plugin.preset_fidelity.get(preset, plugin.fidelity).value)


def _about_model(name: str, hydra: Session) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.merge(ModelConfig, hydra.load_raw(f"model/{name}")))
    facts = facts_of(values) if values["path"] else None
    return {
        "name": name,
        "path": values["path"],
        "dtype": values["dtype"],
        "geometry": None if facts is None else vars(facts),
        "tuned": values["tuned"],
    }


def _about_stack(name: str, hydra: Session) -> dict[str, Any]:
    chosen: list[str] = []
    for default in hydra.defaults_of(f"stack/{name}"):
        if getattr(default, "group", None) in ("methods", "/methods"):
            value = default.value
            chosen = [str(option) for option in (value if isinstance(value, (list, ListConfig)) else [value])]
    raw = OmegaConf.to_container(hydra.load_raw(f"stack/{name}"))
    return {"name": name, "methods": chosen, "values": flatten(raw)}


def extra_passes(tags: Tags | dict[str, Any]) -> str:
    """Write the extra passes of a method's tags: ``1 forward/sample, 1 backward/token`` or ``none``."""
    values = vars(tags) if isinstance(tags, Tags) else tags
    parts = []
    for key in ("forwards_per_sample", "forwards_per_token", "backwards_per_token"):
        if values[key]:
            passes, _, unit = key.partition("s_per_")
            parts.append(f"{values[key]:g} {passes}/{unit}")
    return ", ".join(parts) or "none"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _method_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Methods", "name", "what it does", "paper", "fidelity", "points", "extra passes")
    for row in rows:
        if "broken" in row:
            table.add_row(row["name"], Text(f"broken: {row['broken']}", style="red"), "", "", "", "")
            continue
        points = dict.fromkeys([*row["tags"]["reads"], *row["tags"]["writes"]])
        paper = f"arXiv {row['paper']['arxiv']}" if row["paper"] else ""
        passes = extra_passes(row["tags"])
        cells = (row["name"], row["summary"], paper, _fidelity_text(row), ", ".join(points), passes)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _fidelity_text(row: dict[str, Any]) -> str:
    """Write a method's fidelity, and below it the presets that have another."""
    others = {preset: word for preset, word in row["preset_fidelity"].items() if word != row["fidelity"]}
    return "\n".join([row["fidelity"], *(f"{preset}: {word}" for preset, word in others.items())])


def _benchmark_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Benchmarks", "name", "what it measures", "version", "parameters")
    for row in rows:
        text = f"broken: {row['broken']}" if "broken" in row else row["summary"]
        names = ", ".join(parameter["name"] for parameter in row.get("parameters", []))
        table.add_row(*(Text(cell) for cell in (row["name"], text, str(row.get("version", "")), names)))
    return table


def _model_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Models", "name", "checkpoint", "dtype", "decoder", "tuned for")
    for row in rows:
        facts = row["geometry"]
        shape = (
            f"{facts['family']}, {facts['layers']} layers, {facts['heads']} heads" if facts else "from the checkpoint"
        )
        cells = (row["name"], row["path"] or "model.path=...", row["dtype"], shape, ", ".join(row["tuned"]))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _stack_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Stacks", "name", "methods, in order", "values of its own")
    for row in rows:
        values = ", ".join(f"{key}={value}" for key, value in row["values"].items())
        table.add_row(*(Text(cell) for cell in (row["name"], ", ".join(row["methods"]) or "(none)", values)))
    return table


_TABLES = {
    "methods": _method_table,
    "benchmarks": _benchmark_table,
    "models": _model_table,
    "stacks": _stack_table,
}
