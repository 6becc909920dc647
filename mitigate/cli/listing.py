"""``mitigate list``: what is installed and which package brings it, without loading torch or any model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import ListConfig, OmegaConf
from rich.console import Console

from mitigate.cli.listing_tables import TABLES
from mitigate.cli.options import read_options
from mitigate.compose.facts import facts_of
from mitigate.compose.packages import brought_files
from mitigate.compose.schema import ModelConfig
from mitigate.compose.schemas import parameters_of, plain
from mitigate.compose.session import Session, flatten, session
from mitigate.compose.tuned import tuned_values
from mitigate.core.method import Method
from mitigate.discovery import unreadable
from mitigate.errors import ConfigError, DuplicateName, MitigateError
from mitigate.registry import (
    Registry,
    adapters,
    benchmarks,
    config_packages,
    diagnostics,
    methods,
    metrics,
    suggestion,
    trackers,
)

HELP = """\
Usage: mitigate list [KIND ...] [--json]

List what is installed and which package brings it. Kinds, all of them by default:
  methods      what can be put into a stack
  models       options of model=, with the methods whose values are tuned for them
  benchmarks   options of benchmark=
  metrics      what answers are scored with; any is added with benchmark.extra_metrics=[NAME]
  stacks       options of stack=
  experiments  options of experiment=
  families     model families with an adapter, by transformers' model_type (named, not imported: that takes torch)
  diagnostics  what `mitigate diagnose` takes
  trackers     values of tracker.name
  packages     packages that bring configuration files, and what is wrong with them

A plugin that cannot be used is listed as broken with the reason; it stops only runs that select it. Exit code 2 if two
packages claim one name. MITIGATE_PLUGINS=none, or a list of packages by commas, limits what other packages bring.
--json gives all there is to know, with every parameter's type, default and description.
"""


def show(arguments: Sequence[str], console: Console) -> int:
    """List plugins and presets of one kind or of all kinds."""
    options = read_options("list", arguments, ("json",))
    if options.help:
        console.print(HELP, end="", markup=False, highlight=False)
        return 0
    for kind in options.overrides:
        if kind not in _COLLECT:
            raise ConfigError(f"cannot list {kind!r}{suggestion(kind, _COLLECT)}")
    kinds = list(dict.fromkeys(options.overrides)) or list(_COLLECT)
    with session() as hydra:
        found = {kind: _COLLECT[kind](hydra) for kind in kinds}
    if options.json:
        content: Any = found if len(kinds) != 1 else found[kinds[0]]
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        for kind in kinds:
            console.print(TABLES[kind](found[kind]))
    if clashes := [row["broken"] for kind in kinds for row in found[kind] if row.get("clash")]:
        raise DuplicateName("\n".join(clashes))
    return 0


def _plugins(registry: Registry[Any], about: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, claims in registry.claims().items():
        before = "torch" in sys.modules
        entry = registry.entry(name)
        row: dict[str, Any] = {"name": name, "class": entry.value, "distribution": entry.distribution}
        if entry.broken is not None:
            row |= {"broken": entry.broken, "clash": len(claims) > 1}
        else:
            plugin = registry.get(name)
            try:
                row |= {**about(plugin), "parameters": _parameters(plugin)}
            except Exception as error:  # whatever a plugin's class attributes hold, the others must be listed
                reason = str(error) if isinstance(error, MitigateError) else f"{type(error).__name__}: {error}"
                row["broken"] = f"{registry.kind} {name!r} of {entry.distribution} cannot be described: {reason}"
        if "torch" in sys.modules and not before:
            row["imports_torch"] = True
        rows.append(row)
    return rows


def _parameters(plugin: type) -> list[dict[str, Any]]:
    return [vars(parameter) for parameter in parameters_of(plugin)] if dataclasses.is_dataclass(plugin) else []


def _families(_: Session) -> list[dict[str, Any]]:
    """Return the model families; adapters need torch, so their modules are looked for and not run."""
    rows = []
    for name, claims in adapters().claims().items():
        entry = claims[0]
        row: dict[str, Any] = {"name": name, "class": entry.value, "distribution": entry.distribution}
        try:
            adapters().origin(name)
        except DuplicateName as error:
            row |= {"distribution": ", ".join(claim.distribution for claim in claims), "broken": str(error)}
            row["clash"] = True
        else:
            reason = unreadable(entry)
            if reason is not None:
                row["broken"] = f"model adapter {name!r} of {entry.distribution} cannot be imported: {reason}"
        rows.append(row)
    return rows


def _packages(hydra: Session) -> list[dict[str, Any]]:
    files = brought_files(hydra)
    rows: list[dict[str, Any]] = [
        {"name": item.package, "distribution": item.distribution, "files": item.files, "unused": item.unused}
        for item in files
    ]
    for entry in config_packages():
        if entry.broken is not None:
            rows.append({"name": entry.value, "distribution": entry.distribution, "broken": entry.broken})
    return rows


def _options(group: str, about: Callable[[str, Session], dict[str, Any]]) -> Callable[[Session], list[dict[str, Any]]]:
    """Return what collects the options of a group of files."""

    def collect(hydra: Session) -> list[dict[str, Any]]:
        rows = []
        for name in hydra.options(group):
            row: dict[str, Any] = {"name": name, "distribution": ", ".join(hydra.brought_by(f"{group}/{name}"))}
            try:
                hydra.check_option(f"{group}/{name}")
                row |= about(name, hydra)
            except Exception as error:  # a file of another package may hold anything
                reason = str(error) if isinstance(error, MitigateError) else f"{type(error).__name__}: {error}"
                row |= {"broken": reason, "clash": isinstance(error, DuplicateName)}
            rows.append(row)
        return rows

    return collect


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
    config: Any = OmegaConf.merge(ModelConfig, hydra.load_raw(f"model/{name}"))
    values: Any = OmegaConf.to_container(config)
    facts = facts_of(values) if values["path"] else None
    tuned = {
        method: {parameter: {"value": item.value, "from": item.source} for parameter, item in chosen}
        for method, chosen in tuned_values(hydra, name, config).items()
    }
    return {
        "path": values["path"],
        "dtype": values["dtype"],
        "geometry": None if facts is None else vars(facts),
        "tuned": tuned,
    }


def _about_stack(name: str, hydra: Session) -> dict[str, Any]:
    chosen: list[str] = []
    for default in hydra.defaults_of(f"stack/{name}"):
        if getattr(default, "group", None) in ("methods", "/methods"):
            value = default.value
            chosen = [str(option) for option in (value if isinstance(value, (list, ListConfig)) else [value])]
    raw = OmegaConf.to_container(hydra.load_raw(f"stack/{name}"))
    return {"methods": chosen, "values": flatten(raw)}


def _about_experiment(name: str, hydra: Session) -> dict[str, Any]:
    raw: Any = OmegaConf.to_container(hydra.load_raw(f"experiment/{name}"))
    said = raw.pop("reproduction", None) or {}
    table = f"{said['table']}, arXiv {said['arxiv']}" if {"table", "arxiv"} <= set(said) else ""
    return {"values": flatten(raw), "published_table": table}


def _about_metric(plugin: Any) -> dict[str, Any]:
    made = [metric.name for metric in plugin().metrics()]
    return {"summary": plugin.summary, "version": plugin.version, "metrics": made}


def _about(plugin: Any) -> dict[str, Any]:
    return {"summary": plugin.summary, "version": plugin.version}


def _about_tracker(plugin: Any) -> dict[str, Any]:
    return {"summary": plugin.summary, "modes": list(plugin.modes)}


_COLLECT: dict[str, Callable[[Session], list[dict[str, Any]]]] = {
    "methods": lambda _: _plugins(methods(), _about_method),
    "models": _options("model", _about_model),
    "benchmarks": lambda _: _plugins(benchmarks(), _about),
    "metrics": lambda _: _plugins(metrics(), _about_metric),
    "stacks": _options("stack", _about_stack),
    "experiments": _options("experiment", _about_experiment),
    "families": _families,
    "diagnostics": lambda _: _plugins(diagnostics(), _about),
    "trackers": lambda _: _plugins(trackers(), _about_tracker),
    "packages": _packages,
}
