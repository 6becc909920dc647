"""Check without a model: importing a method's file does nothing but define."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mitigate.testing.base import Skip, Subject, check, ensure

_SECONDS = 120


@check(once=True)
def check_import_clean(subject: Subject) -> None:
    """Do nothing at import but define: print and change nothing, load no slow library."""
    module, name = subject.plugin.__module__, subject.name
    if module == "__main__":
        raise Skip("it is defined in a notebook or script, so there is no module to import")
    found = _probe(module, "fresh")
    ensure(found["error"] is None, f"{name}: {module} cannot be imported in a fresh process: {found['error']}")
    said = " ".join(found["output"].split())
    ensure(not said, f"{name}: importing {module} prints: {said[:200]}")
    ensure(not found["network"], f"{name}: importing {module} asks the network for {', '.join(found['network'])}")
    changed = found["changed"]
    if found["heavy"]:  # what these libraries do when loaded is no fault of the file, what it does to them is
        changed = _probe(module, "loaded")["changed"]
    ensure(
        not changed,
        f"{name}: importing {module} changes {', '.join(changed)}; nothing may happen at import but definitions",
    )
    ensure(
        not found["heavy"],
        f"{name}: importing {module} loads {', '.join(found['heavy'])}, which makes every `mitigate list` slow: "
        f"write `from mitigate.lazy import torch`, or import inside the function that needs it",
    )


def _probe(module: str, mode: str) -> dict[str, Any]:
    """Import a module in a process of its own, with our search path, and return what that did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.curdir for part in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "mitigate.testing.import_probe", module, str(file), mode]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return _crashed(f"it takes more than {_SECONDS} s")
        if not file.is_file():
            return _crashed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {**found, "output": done.stdout + done.stderr}


def _crashed(reason: str) -> dict[str, Any]:
    return {"error": reason, "output": "", "network": [], "changed": [], "heavy": []}
