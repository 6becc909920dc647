"""``mitigate testbed train|evaluate``: options are the fields of a dataclass, checked before anything heavy starts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console

from mitigate.cli.devices import check_accelerator
from mitigate.cli.exits import OK, USER_ERROR
from mitigate.compose.schemas import check_value, defaults_of, native, parameters_of, plain
from mitigate.errors import ConfigError
from mitigate.registry import suggestion

#: Action -> dataclass of options, and the function that takes them; only the second loads torch.
ACTIONS = {
    "train": ("mitigate.testbed.options:TestbedTraining", "mitigate.testbed.train:train"),
    "evaluate": ("mitigate.testbed.options:TestbedEvaluation", "mitigate.testbed.evaluate:evaluate"),
}

HELP = """\
Usage: mitigate testbed train|evaluate [KEY=VALUE ...]

  train      train the embedded testbed's model by its recipe; a killed training goes on where it stopped
  evaluate   measure a checkpoint against the testbed's quality bar

`mitigate testbed ACTION --help` lists the options of an action.
"""


def testbed(arguments: Sequence[str], console: Console) -> int:
    """Train or evaluate the embedded model."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _say(console, HELP)
        return OK if arguments else USER_ERROR
    action, rest = arguments[0], list(arguments[1:])
    if action not in ACTIONS:
        raise ConfigError(f"mitigate testbed cannot {action!r}{suggestion(action, ACTIONS)}")
    options, act = (name.partition(":") for name in ACTIONS[action])
    schema = getattr(importlib.import_module(options[0]), options[2])
    if any(argument in ("-h", "--help") for argument in rest):
        _say(console, _options_text(action, schema))
        return OK
    config = read_dataclass(schema, rest)
    config.check_files()
    check_accelerator(getattr(config, "accelerator", "auto"), "accelerator")
    loaded = importlib.import_module(act[0])
    try:
        result = getattr(loaded, act[2])(config)
    except (FileExistsError, PermissionError, NotADirectoryError) as error:
        raise ConfigError(str(error)) from error
    return _report(loaded, result, console)


def _report(module: Any, result: Any, console: Console) -> int:
    if isinstance(result, Path):
        _say(console, f"Checkpoint: {result}\n")
        return OK
    _say(console, json.dumps(plain(result), indent=2, default=str) + "\n")
    missed = module.shortfalls(result) if hasattr(module, "shortfalls") else []
    for line in missed:
        _say(console, f"missed: {line}\n")
    _say(
        console,
        "The quality bar is met.\n" if not missed else f"{len(missed)} of the quality bar's points are missed.\n",
    )
    return OK


def read_dataclass(schema: type, arguments: Sequence[str]) -> Any:
    """Build a flat dataclass of options from ``key=value`` arguments.

    Raises
    ------
    ConfigError
        At a wrong key, type or value.
    """
    values = {}
    known = defaults_of(schema)
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        if not separator:
            raise ConfigError(f"{argument!r} is no option; write KEY=VALUE, with one of: {', '.join(known)}")
        if key not in known:
            raise ConfigError(f"unknown option {key!r}{suggestion(key, known)}")
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise ConfigError(f"cannot read {argument!r} as KEY=VALUE") from error
        if override.is_sweep_override():
            raise ConfigError(f"{argument} has several values; quote it inside too: '{key}=\"a,b\"'")
        values[key] = check_value(schema, key, override.value(), argument)
    try:
        return schema(**native(schema, values))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _options_text(action: str, schema: type) -> str:
    lines = [f"Usage: mitigate testbed {action} [KEY=VALUE ...]\n"]
    for parameter in parameters_of(schema):
        shown = json.dumps(parameter.default)
        lines.append(f"  {parameter.name:<22} {parameter.type:<8} default {shown:<16} {parameter.doc}")
    return "\n".join(lines) + "\n"


def _say(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
