"""The console script: every problem the user can fix is one or two lines on stderr and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from mitigate import __version__
from mitigate.cli.exits import INTERRUPTED, OK, USER_ERROR
from mitigate.errors import ConfigError, HookError, MitigateError
from mitigate.processes import is_first_process, place, speaks

#: Command -> ``module:function``; the function takes the remaining arguments and the console.
COMMANDS = {
    "run": "mitigate.cli.running:run",
    "compare": "mitigate.cli.running:compare",
    "score": "mitigate.cli.scoring:score",
    "report": "mitigate.cli.reporting:report",
    "upload": "mitigate.cli.uploading:upload",
    "plan": "mitigate.cli.planning:plan",
    "diagnose": "mitigate.cli.diagnosing:diagnose",
    "trace": "mitigate.cli.tracing:trace",
    "list": "mitigate.cli.listing:show",
    "data": "mitigate.cli.data:data",
    "reproduce": "mitigate.cli.reproducing:reproduce",
    "check": "mitigate.cli.checking:check",
    "new": "mitigate.cli.creating:new",
    "testbed": "mitigate.cli.testbed:testbed",
}

#: Width of tables when the output is no terminal: nothing is cut off in files and pipes.
_PIPE_WIDTH = 200

HELP = """\
mitigate: stop vision-language models from hallucinating; compose, run and compare inference-time methods.

Usage: mitigate COMMAND [KEY=VALUE ...]

Commands
  compare   run several stacks of methods on the same samples: one table, one report, one W&B group
  run       run one stack on one benchmark and record every sample
  diagnose  watch the model while it answers, and hold what is seen against the ground truth of every token
  trace     answer one question about one picture and show what every method did, step by step
  score     score answers that any other tool produced, without a model   (score BENCHMARK --predictions FILE)
  report    put runs that lie on disk on one page, with a browser of the samples   (report RUN ...)
  upload    show runs that lie on disk in Weights & Biases, whenever they were made   (upload RUN ...)
  reproduce run a published table with its own protocol: published against measured   (reproduce --list)
  plan      print what a stack would do: points, layers, order, every value and where it came from
  data      get and check the files a benchmark needs       (data list | data fetch NAME | data check NAME)
  list      list methods, models, metrics, stacks, ... and who brings them   (--json for everything, with parameters)
  check     see whether a method keeps the contract, on tiny random models
  new       write a package of your own with a new method   (new method NAME)
  testbed   train or evaluate the small embedded model    (testbed train | testbed evaluate)

Options
  -h, --help     this text; `mitigate COMMAND --help` explains one command
  --version      version

Examples
  mitigate compare                                        the default comparison on the embedded testbed
  mitigate compare experiment=quick                       a smoke comparison
  mitigate compare 'stacks=[none,NAME,NAME+NAME]' benchmark.limit=50
  mitigate plan 'methods=[NAME]' methods.NAME.preset=paper model=llava-1.5-7b
  mitigate run stack=NAME model=hf model.path=/path/to/checkpoint
  mitigate run -m 'methods=[NAME],[]' decoding.max_new_tokens=32,64
  mitigate list methods
  mitigate check NAME                                     for the author of a method; NAME or module:Class

Quote brackets, braces and ~ for the shell. Exit codes: 0 done, 1 a check failed, 2 something to fix in the command,
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Parameters
    ----------
    argv
        Arguments without the program's name; the process's own by default.

    Returns
    -------
    int
        Exit code. Unexpected exceptions are not caught, so that their traceback is seen.
    """
    # read when torch starts: with spinning threads, a busy machine makes small models several times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = make_console()
    try:
        with _plain_warnings():
            return _dispatch(arguments, console)
    except HookError:
        raise  # a method failed in the middle of a run: its author needs the traceback
    except MitigateError as error:
        if speaks():
            where = "" if is_first_process() else f" ({place()})"
            line = f"error{where}: {error}"
            make_console(stderr=True, helps=True).print(
                line, style="red", markup=False, highlight=False, soft_wrap=True
            )
        return USER_ERROR
    except KeyboardInterrupt:
        make_console(stderr=True).print("Interrupted.")
        return INTERRUPTED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings without the line of code they come from, in the first process alone."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n" if is_first_process() else ""
    try:
        yield
    finally:
        warnings.formatwarning = usual


def make_console(*, stderr: bool = False, helps: bool = False) -> Console:
    """Return a console that cuts nothing off when its output is no terminal.

    Of several processes of one run, only the first one is heard, unless one that ``helps`` has something to say, too.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, quiet=not (helps or is_first_process()))


def _dispatch(arguments: list[str], console: Console) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return OK if arguments else USER_ERROR
    if arguments[0] in ("--version", "-V"):
        console.print(f"mitigate {__version__}", highlight=False)
        return OK
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from mitigate.registry import suggestion

        kind = "option" if command.startswith("-") else "command"
        raise ConfigError(f"unknown {kind} {command!r}{suggestion(command, COMMANDS)}")
    module, _, function = COMMANDS[command].partition(":")
    code: int = getattr(importlib.import_module(module), function)(rest, console)
    return code
