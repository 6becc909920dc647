"""Run every built-in method on a tiny model of every family, and write docs/support.json and docs/support.md.

python scripts/support_matrix.py                      # all families and methods: several minutes
python scripts/support_matrix.py --family gemma3      # one row again; can be given several times
python scripts/support_matrix.py --method scr         # one column again; can be given several times, and with --family
python scripts/support_matrix.py --write              # only write the page again
python scripts/support_matrix.py --check              # change nothing; exit code 1 if a result or the page is stale

A cell is the outcome of the conformance suite's checks on models, with the method's default parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["MITIGATE_PLUGINS"] = "none"  # read when the registry is first asked

from mitigate.adapters.base import Adapter
from mitigate.methods import BUILTIN as METHODS
from mitigate.registry import adapters, methods
from mitigate.runner.fingerprint import code_hash

FAMILIES = [family for family in adapters().names() if adapters().get(family).tiny]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "support.json"
PAGE = ROOT / "docs" / "support.md"
AGAIN = "run: python scripts/support_matrix.py"
INTRODUCTION = """\
<!-- made by scripts/support_matrix.py: change the code, then run it -->
# Which method runs on which family

Every built-in method, with its default parameters, went through those checks of the conformance suite that need a model
(`mitigate check NAME --family FAMILY`), on a tiny random model of every family that has an adapter of its own. A number
is how many checks passed of those that apply: what a method does not declare is not checked. *Refused* means that the
stack is refused when it is built, with the reason below the table; other values of a parameter may be refused where
the default is not. The checks hold a method against itself: with and without padding, cache, batch and stack. They
cannot see whether a family's adapter finds the right tokens: the tests of each family count those from what its
processor writes, and hold a stack of four methods against brute force on five of them. Tiny models say nothing about
how much a method helps on real checkpoints.

Model types without an adapter of their own are served by the [generic adapter](contribute/add-a-model.md) where they
explain themselves, and refused otherwise.
"""


def stamp(family: str, method: str) -> str:
    """Hash the code of a family's adapter, of those it extends, and of a method."""
    modules = {kind.__module__ for kind in adapters().get(family).__mro__ if issubclass(kind, Adapter)}
    files = sorted(ROOT / f"{module.replace('.', '/')}.py" for module in modules - {Adapter.__module__})
    text = b"".join(file.read_bytes() for file in files) + code_hash(methods().get(method)).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def measure(family: str, method: str) -> dict[str, Any]:
    """Run the checks of one cell."""
    from mitigate.errors import ConfigError, UnsupportedModel
    from mitigate.testing.suite import plan_cases
    from mitigate.testing.tiny import tiny_model

    plugin = methods().get(method)
    instance, tiny = plugin(), tiny_model(family)
    try:
        instance.check_model("tiny", tiny.facts)
    except (ConfigError, UnsupportedModel) as refusal:
        return {"code": stamp(family, method), "refused": str(refusal)}
    cases = plan_cases(instance, families=[family])
    # what is run once asks whether any model shows that parameters and draws matter: the reference family does
    found = [case.run() for case in cases if case.check.needs_model and not case.check.once]
    refusals = {result.message for result in found if result.message.startswith("refuses this model: ")}
    if refusals:
        return {"code": stamp(family, method), "refused": refusals.pop().partition(": ")[2]}
    failed = {result.check: result.message for result in found if result.bad}
    run = [result for result in found if result.status != "skipped"]
    return {"code": stamp(family, method), "passed": len(run) - len(failed), "run": len(run), "failed": failed}


def cell(result: Mapping[str, Any] | None) -> str:
    """Write one cell of the table."""
    if result is None:
        return "not run"
    if "refused" in result:
        return "refused"
    return f"{result['passed']} of {result['run']}" + (" **fails**" if result["failed"] else "")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the page."""
    names = list(METHODS)
    lines = [["family", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    lines += [[f"`{family}`", *(cell(results.get(family, {}).get(name)) for name in names)] for family in FAMILIES]
    parts = [INTRODUCTION, "".join(f"| {' | '.join(line)} |\n" for line in lines)]
    refused: dict[str, list[str]] = {}
    for family in FAMILIES:
        for name, result in results.get(family, {}).items():
            if "refused" in result:
                refused.setdefault(result["refused"], []).append(family)
            for check, message in result.get("failed", {}).items():
                refused.setdefault(f"`{name}` fails {check}: {message}", []).append(family)
    if refused:
        parts.append("## Why\n")
        for why, who in refused.items():
            where = "every family" if len(who) == len(FAMILIES) else ", ".join(f"`{family}`" for family in who)
            parts.append(f"* {where}: {why}")
        parts.append("")
    return "\n".join(parts)


def stale(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the stored results no longer describe."""
    found = []
    for name in METHODS:
        known = {family: results.get(family, {}).get(name, {}).get("code") for family in FAMILIES}
        if others := [family for family, code in known.items() if code != stamp(family, name)]:
            narrow = "".join(f" --family {family}" for family in others) if len(others) < len(FAMILIES) else ""
            found.append(f"no result for the code of {name} on {', '.join(others)}; {AGAIN} --method {name}{narrow}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="measure this family only")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="measure this method only")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something is stale")
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.check:
        problems = stale(results)
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page(results):
            problems.append(f"{PAGE.relative_to(ROOT)} is stale; {AGAIN} --write")
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    for family in [] if options.write else options.family or FAMILIES:
        for name in options.method or METHODS:
            result = results.setdefault(family, {})[name] = measure(family, name)
            print(f"{family} {name}: {cell(result)}", result.get("failed") or "", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
