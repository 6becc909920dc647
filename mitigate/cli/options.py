"""Flags of the commands that take overrides, and the help text generated from the configuration itself."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from mitigate.errors import ConfigError
from mitigate.registry import suggestion

_FLAGS = {
    "-h": "help",
    "--help": "help",
    "-m": "sweep",
    "--multirun": "sweep",
    "--json": "json",
    "--all": "all",
    "--dry-run": "dry",
}
#: Flag -> option, the one value it takes, and what it prints.
_WITH_VALUE = {
    "--cfg": ("config", "job", "the complete configuration of the run"),
    "--info": ("search_path", "searchpath", "where configuration files are looked for"),
}


@dataclass(frozen=True)
class Options:
    """What the flags of a command ask for.

    Parameters
    ----------
    overrides
        Everything that is no flag.
    help, sweep, json, all
        Whether the flag was given.
    config
        Whether to print the composed configuration and stop (``--cfg job``).
    search_path
        Whether to print where configuration files are looked for and stop (``--info searchpath``).
    dry
        Whether to print what a launcher would start and stop.
    """

    overrides: list[str]
    help: bool = False
    sweep: bool = False
    json: bool = False
    all: bool = False
    config: bool = False
    search_path: bool = False
    dry: bool = False


def read_options(command: str, arguments: Sequence[str], allowed: Sequence[str]) -> Options:
    """Separate flags from overrides.

    Parameters
    ----------
    command
        For messages.
    arguments
        What follows the command.
    allowed
        Flags the command has, besides help.

    Raises
    ------
    ConfigError
        At an unknown flag.
    """
    overrides: list[str] = []
    found: dict[str, bool] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, _, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif flag in _WITH_VALUE and _WITH_VALUE[flag][0] in allowed:
            name, only, what = _WITH_VALUE[flag]
            value = value or (remaining.pop(0) if remaining else "")
            if value != only:
                raise ConfigError(f"{flag} {value}: only `{flag} {only}` is known, {what}")
            found[name] = True
        elif _FLAGS.get(argument) in (*allowed, "help"):
            found[_FLAGS[argument]] = True
        else:
            known = [key for key, name in _FLAGS.items() if name in (*allowed, "help")]
            known += [f"{key} {only}" for key, (name, only, _) in _WITH_VALUE.items() if name in allowed]
            raise ConfigError(f"mitigate {command} has no option {argument!r}{suggestion(argument, known)}")
    return Options(overrides, **found)


_HEADS = {
    "run": """\
Usage: mitigate run [-m] [--cfg job] [--info searchpath] [KEY=VALUE ...]

Run one stack of methods on one benchmark; write one record per sample and one for the run under runs/.
A run that was interrupted goes on where it stopped when it is started again.
""",
    "compare": """\
Usage: mitigate compare [-m] [--cfg job] [--info searchpath] [KEY=VALUE ...]

Run several stacks on the same samples and compare each to `none`, paired by picture, with 95 % intervals:
one table, comparison.json, report.html, one W&B run per stack in one group. Finished stacks are not run again.
  stacks=[none,NAME,NAME+NAME]   presets (below) or methods joined by + in the order they act; also stack=[...]
Values of a method (methods.NAME.KEY=VALUE) go to the stacks that have the method.
""",
    "plan": """\
Usage: mitigate plan [--json] [--info searchpath] [KEY=VALUE ...]

Print what the composed stack would do, without loading a model: the points it acts on, layers, order, costs, how
close each method's preset is to its paper, and every value with where it came from. Takes what `mitigate run` takes,
also for models that cannot be run yet; with stacks=[...], plans each of them.
""",
}

_FLAG_TEXT = """
Options
  -m, --multirun   run every combination of values given as KEY=A,B; all are checked before the first starts
  -m hydra/launcher=NAME [hydra.launcher.KEY=VALUE ...]
                   hand the jobs to a launcher of Hydra, such as submitit_slurm; --dry-run prints what it would start
  --cfg job        print the complete configuration and stop
  --info searchpath
                   print which packages' configuration files are used, in the order they are looked for, and stop
  -h, --help       this text
"""

_METHOD_TEXT = """
Methods
  methods=[A,B]                     an ordered list; the order is the order in which they act
  methods.A.KEY=VALUE               a parameter of a selected method (`mitigate list methods --json` lists them)
  methods.A.preset=NAME             a named set of values, such as paper
  ~methods.B                        take one out
  stack=NAME                        a preset of methods and values, instead of methods=[...]
  +methods.late={name: A, KEY: 1}   a second copy under its own key
"""

_RANK_TEXT = """
Values rank, rising: the method's default, values tuned for the model (conf/model), a preset that was asked for
(methods.NAME.preset), the stack preset or experiment, the command line. `mitigate plan` prints each value with where it
came from.
"""


def help_text(command: str) -> str:
    """Return the help of ``run``, ``compare`` or ``plan``: groups, options and keys of this installation."""
    from mitigate.compose.overrides import SECTIONS
    from mitigate.compose.schema import RunConfig
    from mitigate.compose.schemas import type_name
    from mitigate.compose.session import GROUPS, session

    lines = [_HEADS[command] + (_FLAG_TEXT if command != "plan" else ""), "Groups (GROUP=NAME)"]
    with session() as hydra:
        for group in GROUPS:
            if not (command == "compare" and group == "stack"):
                shown = f"{group}="
                if group == "methods":
                    shown = "(methods)" if command == "compare" else "methods=[...]"
                lines.append(_names(shown, hydra.options(group)))
        if command == "compare":
            lines.append(_names("stacks=[...]", [*hydra.options("stack"), "or methods joined by +"]))
    lines.append("\nKeys (KEY=VALUE)")
    for section, schema in SECTIONS.items():
        hints = typing.get_type_hints(schema)
        keys = [field for field in dataclasses.fields(schema) if field.name not in ("tuned",)]
        lines += [_key(f"{section}.{key.name}", type_name(hints[key.name]), _default(key)) for key in keys]
    hints = typing.get_type_hints(RunConfig)
    plain = [field for field in dataclasses.fields(RunConfig) if field.name in ("seed", "runs_dir", "name")]
    lines += [_key(key.name, type_name(hints[key.name]), _default(key)) for key in plain]
    lines.append(_key("on_error", "str", "default stop; skip records a sample that fails, and goes on"))
    lines.append(_key("benchmark.KEY", "", "parameters of the benchmark, such as benchmark.limit=50"))
    return "\n".join(lines) + "\n" + ("" if command == "compare" else _METHOD_TEXT) + _RANK_TEXT


def _names(shown: str, names: Sequence[str]) -> str:
    """Write a group and its options, folded to the width of the help."""
    return textwrap.fill(
        ", ".join(names) or "none",
        width=118,
        initial_indent=f"  {shown:<15} ",
        subsequent_indent=" " * 18,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _key(key: str, kind: str, text: str) -> str:
    return f"  {key:<31} {kind:<12} {text}"


def _default(field: dataclasses.Field[object]) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    return f"default {'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
