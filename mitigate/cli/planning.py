"""``mitigate plan``: what a stack would do, and where every value came from, without loading a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mitigate.cli.listing import fidelity_of
from mitigate.cli.listing_tables import extra_passes
from mitigate.cli.options import help_text, read_options
from mitigate.cli.searching import show_search_path
from mitigate.compose import compose_comparison, compose_run
from mitigate.compose.session import flatten
from mitigate.core.plan import plan_stack, plan_streams
from mitigate.core.points import MAIN, Point

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun
    from mitigate.core.branches import StreamPlan
    from mitigate.core.method import Method

#: Points that come in one phase, or between phases, whatever the subscription says.
_PHASES: dict[str, str] = {
    Point.IMAGE_INPUT: "prefill",
    Point.TEXT_INPUT: "prefill",
    Point.VISION: "prefill",
    Point.VISUAL_EMBEDDINGS: "prefill",
    Point.PREFILL_END: "prefill",
    Point.SAMPLE_BEGIN: "",
    Point.SAMPLE_END: "",
}


def plan(arguments: Sequence[str], console: Console) -> int:
    """Print the plan of one stack, or of every stack of ``stacks=[...]``."""
    options = read_options("plan", arguments, ("json", "search_path"))
    if options.help:
        console.print(help_text("plan"), end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    if options.search_path:
        return show_search_path(console)
    several = any(override.startswith(("stacks=", "stack=[")) for override in options.overrides)
    runs = compose_comparison(options.overrides) if several else [compose_run(options.overrides)]
    if options.json:
        plans = [_as_json(run) for run in runs]
        text = json.dumps(plans if several else plans[0], indent=2, ensure_ascii=False)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    for run in runs:
        _print(run, console)
    return 0


def _as_json(run: ResolvedRun) -> dict[str, Any]:
    return {
        "stack": run.stack_name,
        "run_name": run.run_name,
        "fidelity": {key: fidelity_of(type(method), _preset(run, key)) for key, method in run.methods.items()},
        "facts": None if run.facts is None else vars(run.facts),
        "branches": [] if run.facts is None else [_as_plain(stream) for stream in plan_streams(run.methods, run.facts)],
        "points": [] if run.facts is None else [vars(line) for line in plan_stack(run.methods, run.facts)],
        "config": run.config,
        "provenance": run.provenance,
    }


def _print(run: ResolvedRun, console: Console) -> None:
    model, facts = run.config["model"], run.facts
    shape = "geometry known when the checkpoint is loaded"
    if facts is not None:
        shape = f"{facts.family}, {facts.layers} layers, {facts.heads} heads, {facts.kv_heads} key/value heads"
    console.rule(Text(f"stack {run.stack_name}", style="bold"), align="left")
    _say(console, f"Model      {model['name']} ({model['path']}, {model['dtype']}): {shape}")
    _say(console, f"Order      {' → '.join(run.methods) or 'no methods: plain generation'}")
    _say(console, f"Benchmark  {run.config['benchmark']['name']}")
    for key, method in run.methods.items():
        _say(console, f"Fidelity   {key}: {_fidelity(run, key, method)}")
    for key, method in run.methods.items():
        tags = method.tags
        if not method.needs_gradient:
            tags = dataclasses.replace(tags, backwards_per_sample=0.0, backwards_per_token=0.0)
        notes = [f"extra passes: at most {extra_passes(tags)}" if extra_passes(tags) != "none" else "no extra passes"]
        notes += ["needs gradients"] if method.needs_gradient else []
        notes += ["may draw random numbers"] if method.tags.stochastic else []
        notes += ["one sample at a time"] if not method.tags.batch else []
        _say(console, f"Cost       {key}: {', '.join(notes)}")
    if any(method.tags.selects_token or method.tags.owns_loop for method in run.methods.values()):
        _say(console, "Generate   with handle.generate(...): a method of the stack chooses the tokens")
    if facts is None and run.methods:
        _say(
            console,
            "Points     known when the checkpoint is loaded; give model.family, layers, heads and kv_heads to see",
        )
    elif facts is not None and run.methods:
        for stream in plan_streams(run.methods, facts):
            _say(console, f"Branch     {_stream_text(stream)}")
        console.print(_points(run))
    console.print(_values(run))


def _as_plain(stream: StreamPlan) -> dict[str, Any]:
    return {**vars(stream.branch), "owner": stream.owner, "users": list(stream.users)}


def _stream_text(stream: StreamPlan) -> str:
    """Write what an extra stream is and who pays for it: one forward per token, however many methods read it."""
    images = "" if stream.branch.images else " without images"
    edited = f"edited by {stream.owner}" if stream.owner else f"plain, read by {', '.join(stream.users)}"
    return f"{stream.branch.name}{images}: {edited}; up to one forward per token, with a cache of its own"


def _preset(run: ResolvedRun, key: str) -> str:
    return str(run.config["methods"][key]["preset"])


def _fidelity(run: ResolvedRun, key: str, method: Method) -> str:
    """Write the fidelity of a method's preset, and which of its values somebody set to something else."""
    preset, prefix = _preset(run, key), f"methods.{key}."
    changed: dict[str, list[str]] = {}
    for name, source in run.provenance.items():
        if name.startswith(prefix) and name != f"{prefix}preset" and source not in ("default", f"preset {preset}"):
            changed.setdefault(source, []).append(name.removeprefix(prefix))
    parts = [f"{fidelity_of(type(method), preset)} (preset {preset})"]
    return "; ".join([*parts, *(f"from {source}: {', '.join(names)}" for source, names in changed.items())])


def _points(run: ResolvedRun) -> Table:
    columns = ("point", "method", "layers", "rows", "phases", "access", "what")
    table = Table(*columns, title="Points, in the order of a forward; stack order within a point", title_justify="left")
    for line in plan_stack(run.methods, run.facts) if run.facts is not None else ():
        phases = _PHASES.get(line.point, line.phases)
        phases += "" if line.branch == MAIN else f" (in {line.branch})"
        cells = (line.point, line.method, line.layers, line.rows, phases, line.access, line.where)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _values(run: ResolvedRun) -> Table:
    """Return the table of values: all of the methods and the benchmark, elsewhere only what is not the default."""
    table = Table("key", "value", "from", title="Values", title_justify="left")
    hidden = 0
    for key, value in flatten(run.config).items():
        source = run.provenance.get(key) or run.provenance.get(key.rpartition(".")[0])  # a mapping is one value
        if source is None:
            continue
        section = key.partition(".")[0]
        if source == "default" and section not in ("methods", "benchmark"):
            hidden += 1
            continue
        style = "dim" if source == "default" else "bold"
        shown = "null" if value is None else json.dumps(value) if not isinstance(value, str) else value
        table.add_row(*(Text(cell, style=style) for cell in (key, shown, source)))
    table.caption = f"{hidden} further values are defaults; `--json` and `mitigate run --cfg job` print all"
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
