"""``mitigate new method NAME``: a package of one's own, ready to run, to be changed into a method."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mitigate.cli.exits import OK, USER_ERROR
from mitigate.compose.session import session
from mitigate.errors import ConfigError
from mitigate.methods import BUILTIN
from mitigate.registry import methods, suggestion
from mitigate.scaffold import NewPackage

HELP = """\
Usage: mitigate new method NAME [--package DIR] [--force]

Write a Python package with one method that works: it is checked, installed and run as it stands, and four places
marked TODO make it yours. Nothing in mitigate has to change: installing the package makes the method known.

  NAME             lower case with underscores: the method is used as 'methods=[NAME]'
  --package DIR    folder of the package; by default mitigate-NAME in this folder
  --force          write into a folder that holds files, over those of the same names; other files stay

What is written
  src/mitigate_NAME/NAME.py        the method: docstring, tags, parameters, handler
  src/mitigate_NAME/conf/stack/    presets: alone, and with a built-in method
  tests/test_NAME.py               the conformance checks, and the equation by hand
  pyproject.toml, README.md        the entry points, and how to install, check, run and publish

Example
  mitigate new method my_method
  cd mitigate-my-method && pip install -e . && mitigate check my_method
"""

_NEXT = """\
Next
  cd {folder}
  pip install -e '.[test]'
  mitigate check {name}
  mitigate run 'methods=[{name},{partner}]' benchmark.limit=2
Then change the four places marked TODO in src/{package}/{name}.py, and the equation in tests/test_{name}.py.
"""


def new(arguments: Sequence[str], console: Console) -> int:
    """Write a package with a new method."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        _say(console, HELP)
        return OK if arguments else USER_ERROR
    name, chosen, force = _read(arguments)
    partner = next(iter(BUILTIN))
    package = NewPackage(name, partner)
    _refuse_taken(package, force=force)
    folder = Path(chosen or package.distribution)
    written = package.write(folder, force=force)
    _say(console, f"Wrote {len(written)} files:\n")
    _say(console, "".join(f"  {path}\n" for path in written))
    _say(console, _NEXT.format(folder=shlex.quote(str(folder)), name=name, package=package.package, partner=partner))
    return OK


def _read(arguments: Sequence[str]) -> tuple[str, str | None, bool]:
    """Return name, folder and whether to write over files."""
    words: list[str] = []
    folder: str | None = None
    force = False
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, _, value = argument.partition("=")
        if argument == "--force":
            force = True
        elif flag == "--package":
            folder = value or (remaining.pop(0) if remaining else "")
            if not folder:
                raise ConfigError("--package needs a folder: --package DIR")
        elif argument.startswith("-"):
            raise ConfigError(f"mitigate new has no option {argument!r}{suggestion(flag, ('--package', '--force'))}")
        else:
            words.append(argument)
    if words[:1] != ["method"]:
        raise ConfigError("mitigate new makes methods only: mitigate new method NAME")
    if len(words) != 2:
        raise ConfigError("mitigate new method takes one name: mitigate new method NAME")
    return words[1], folder, force


def _refuse_taken(package: NewPackage, *, force: bool) -> None:
    """Raise if the name is a known method, or a preset of stacks, which ``stacks=[...]`` could not tell from it."""
    for entry in methods().claims().get(package.name, ()):
        if not (force and entry.distribution == package.distribution):
            raise ConfigError(f"method {package.name!r} exists already, in {entry.distribution}; choose another name")
    with session() as hydra:
        if package.name in hydra.options("stack"):
            raise ConfigError(f"{package.name!r} is the name of a stack preset already; choose another name")


def _say(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
