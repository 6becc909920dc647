"""Runs ``python -m MODULE ...`` again and again, each time in a fresh process, but without seconds of imports.

A program of its own: it loads the libraries once and forks for every request, a line of JSON each.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 300
FORKED = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
#: Nothing here looks for plugins while it is imported: every process finds those on its own path.
LIBRARIES = (
    *("torch", "transformers", "pytorch_lightning", "scipy.stats", "pytest"),
    *("transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava"),
    *("mitigate.cli.running", "mitigate.cli.checking", "mitigate.runner.module", "mitigate.testing.suite"),
)


class Forks:
    """Starts the program, and has it run commands."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment.pop("MITIGATE_PLUGINS", None)
        self._server: Any = subprocess.Popen(
            [sys.executable, "-m", "tests.forking"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, module: str, *words: str, folder: Path, path: Sequence[Path] = ()) -> str:
        """Run a module in a folder, with further places to import from; returns what it says. It must succeed."""
        request = {"module": module, "words": words, "folder": str(folder), "path": [str(place) for place in path]}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code, out, err = json.loads(self._server.stdout.readline())
        assert code == 0, f"{module} {' '.join(words)} ended with {code}\n{(out + err)[-3000:]}"
        return str(out)

    def close(self) -> None:
        """End the program."""
        self._server.kill()
        self._server.communicate()


def serve() -> None:
    """Answer requests until there are no more."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        said = [os.memfd_create(name) for name in ("out", "err")]
        child = os.fork()
        if not child:
            _become(said, **json.loads(line))
        _, status = os.waitpid(child, 0)
        texts = [_read(file) for file in said]
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), *texts]) + "\n")
        sys.stdout.flush()


def _read(file: int) -> str:
    with os.fdopen(file, "rb") as opened:
        opened.seek(0)
        return opened.read().decode(errors="replace")


def _become(said: list[int], *, module: str, words: list[str], folder: str, path: list[str]) -> None:
    signal.alarm(SECONDS)
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *said]):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
    sys.path[:0] = [folder, *path]
    sys.argv = [module, *words]
    code: Any = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
