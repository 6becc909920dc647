"""``mitigate diagnose``: measure what goes on inside a model while it answers a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mitigate.cli.devices import check_accelerator
from mitigate.cli.exits import INTERRUPTED, OK, USER_ERROR
from mitigate.cli.options import read_options
from mitigate.errors import ConfigError, MitigateError

if TYPE_CHECKING:
    from mitigate.diagnostics.base import Diagnostic, Findings

_PREFIX = "diagnostic."

HELP = """\
Usage: mitigate diagnose NAME [--cfg job] [KEY=VALUE ...]

Answer a benchmark, watch the model while it does, and hold what is seen against the ground truth of every generated
token. Takes the model, stack, benchmark and decoding of `mitigate run`; stack=none watches the plain model.
Writes one line per sample with its tokens (tokens.jsonl), summary.json, and figures as PNG and SVG under
runs/diagnose/. A run that was interrupted goes on where it stopped; a finished one is only analysed anew.

Diagnostics
{listing}

Options
  --cfg job        print the complete configuration and stop
  -h, --help       this text; `mitigate diagnose NAME --help` lists the parameters of a diagnostic

Examples
  mitigate diagnose entropy benchmark.limit=30 tracker=none
  mitigate diagnose drift model=llava-1.5-7b benchmark.limit=100
  mitigate diagnose credit stack=NAME diagnostic.bins=20

Values as for `mitigate run` (see `mitigate run --help`), and diagnostic.KEY=VALUE.
"""


def diagnose(arguments: Sequence[str], console: Console) -> int:
    """Run a diagnostic, or list what there is."""
    from mitigate.diagnostics import diagnostics

    name = next((item for item in arguments[:1] if not item.startswith("-") and "=" not in item), None)
    options = read_options("diagnose", arguments[1:] if name else arguments, ("config",))
    if name is None:
        if options.overrides and not options.help:
            known = ", ".join(diagnostics().names())
            raise ConfigError(f"mitigate diagnose takes the name of a diagnostic first: {known}")
        _say(console, HELP.format(listing=_listing()))
        return OK if options.help else USER_ERROR
    plugin = diagnostics().get(name)
    if options.help:
        _say(console, _parameters_text(name, plugin))
        return OK
    return _run(name, plugin, options.overrides, config_only=options.config, console=console)


def _run(name: str, plugin: type[Diagnostic], overrides: Sequence[str], *, config_only: bool, console: Console) -> int:
    """Compose, check, run, show."""
    from mitigate.compose import compose_run
    from mitigate.compose.checks import check_family
    from mitigate.diagnostics.run import folder_of, with_diagnostic

    own = [item.removeprefix(_PREFIX) for item in overrides if item.startswith(_PREFIX)]
    diagnostic = _build(plugin, own)
    resolved = with_diagnostic(compose_run([item for item in overrides if not item.startswith(_PREFIX)]), diagnostic)
    if config_only:
        from omegaconf import OmegaConf

        config = {**resolved.config, "diagnostic": {"name": name, **diagnostic.params()}}
        _say(console, OmegaConf.to_yaml(OmegaConf.create(config)))
        return OK
    check_family(resolved.config, resolved.facts)
    folder = folder_of(resolved, diagnostic)
    check_accelerator(str(resolved.config["trainer"]["accelerator"]), "trainer.accelerator")
    from mitigate.diagnostics.run import diagnose as start

    try:
        result = start(resolved, diagnostic, folder, console=console)
    except KeyboardInterrupt:
        _say(console, f"Interrupted. What was measured so far is in {folder}; the same command goes on from there.\n")
        return INTERRUPTED
    _show(result.findings, console)
    lines = [*result.messages, *(f"! {note}" for note in result.findings.notes)]
    lines += [f"Figure: {path}" for path in result.figures]
    lines.append(f"Summary: {folder / 'summary.json'}")
    _say(console, "\n".join(lines) + "\n")
    return OK


def _build(plugin: type[Diagnostic], arguments: Sequence[str]) -> Diagnostic:
    from mitigate.cli.testbed import read_dataclass

    try:
        diagnostic: Diagnostic = read_dataclass(plugin, arguments)
    except ConfigError as error:
        text = str(error)
        prefixed = text if text.startswith((_PREFIX, "diagnostic")) else f"diagnostic: {text}"
        raise ConfigError(prefixed) from error
    return diagnostic


def _show(findings: Findings, console: Console) -> None:
    """Print the tables."""
    for table in findings.tables:
        shown = Table(title=table.title, title_justify="left", title_style="bold")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*(cell_text(cell) for cell in row))
        console.print(shown)


def cell_text(cell: Any) -> str:
    """Return a cell as people read it: a value with its interval and p-value, a dash where nothing is defined."""
    from mitigate.diagnostics.base import Estimate

    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3f}"
    if isinstance(cell, Estimate):
        if math.isnan(cell.value):
            return "–"
        interval = "" if math.isnan(cell.low) else f" [{cell.low:.3f}, {cell.high:.3f}]"
        p = "" if cell.p is None or math.isnan(cell.p) else f" p={cell.p:.3f}" if cell.p >= 0.001 else " p<0.001"
        return f"{cell.value:.3f}{interval}{p}"
    return str(cell)


def _listing() -> str:
    from mitigate.diagnostics import diagnostics

    lines = []
    for name in diagnostics().names():
        try:
            lines.append(f"  {name:<10} {diagnostics().get(name).summary}")
        except MitigateError as error:
            lines.append(f"  {name:<10} broken: {str(error).splitlines()[0]}")
    return "\n".join(lines)


def _parameters_text(name: str, plugin: type[Diagnostic]) -> str:
    from mitigate.compose.schemas import parameters_of

    lines = [f"mitigate diagnose {name}: {plugin.summary}\n", "Parameters (diagnostic.KEY=VALUE)"]
    for parameter in parameters_of(plugin):
        shown = json.dumps(parameter.default)
        text = parameter.doc.replace("``", "")
        lines.append(f"  {parameter.name:<11} {parameter.type:<6} default {shown:<16} {text}")
    lines.append("\nModel, stack, benchmark, decoding, trainer and tracker as for `mitigate run` (see its --help).")
    return "\n".join(lines) + "\n"


def _say(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
