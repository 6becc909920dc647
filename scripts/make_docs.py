"""Write the tables of methods in README.md and docs/methods/index.md from the registry and the conformance suite.

python scripts/make_docs.py                          # write the tables again
python scripts/make_docs.py --check                  # change nothing; exit code 1 if a table or a result is stale
python scripts/make_docs.py --conformance [NAME ...] # run the suite on all methods or some, keep the results, write

Only built-in methods are listed: what else is installed here is nobody else's business.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["MITIGATE_PLUGINS"] = "none"  # read when the registry is first asked

import mitigate
from mitigate.cli.listing_tables import extra_passes
from mitigate.compose.schemas import Parameter, parameters_of, plain
from mitigate.core import Method, Point
from mitigate.methods import BUILTIN
from mitigate.registry import methods
from mitigate.runner.fingerprint import code_hash

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "methods" / "index.md"
RESULTS = ROOT / "docs" / "conformance.json"
BEGIN, END = "<!-- method table: begin -->\n", "<!-- method table: end -->\n"
AGAIN = "run: python scripts/make_docs.py"

#: Points that say when something happens, not what a method touches.
LIFECYCLE = frozenset({Point.SAMPLE_BEGIN, Point.STEP_BEGIN, Point.PREFILL_END, Point.STEP_END, Point.SAMPLE_END})
PACKAGES = ("torch", "transformers")
HEADER = ("name", "what it does", "paper", "points", "extra passes", "fidelity", "conformance")
INTRODUCTION = """\
<!-- made by scripts/make_docs.py: change the classes, then run it -->
# Methods

What every built-in method declares about itself: where it acts, what it costs, its presets and parameters. The page of
a method has its equations, the paper's values with their sources, deviations, and when it does not help.

*Points* are the [points](../concepts/points.md) it reads or writes. *Extra passes* are forwards and backwards over
plain generation, at most. *Fidelity* says how close it is to its source: `paper` follows the equations of the paper,
`reconstructed` and `from-abstract` are readings where the equations were not available, `control` is no method from a
paper. *Conformance* is the result of `mitigate check NAME` for the code that is here.
"""


def builtin() -> list[type[Method]]:
    """Return the built-in methods in the order of their table."""
    return [methods().get(name) for name in BUILTIN]


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Write a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def method_table(results: Mapping[str, Any], folder: str) -> str:
    """Write the table of methods; ``folder`` leads to their pages."""
    return table((row(plugin, results, folder) for plugin in builtin()), HEADER)


def row(plugin: type[Method], results: Mapping[str, Any], folder: str) -> list[str]:
    page = INDEX.parent / f"{plugin.name}.md"
    name = f"[`{plugin.name}`]({folder}{page.name})" if page.exists() else f"`{plugin.name}`"
    paper = plugin.paper
    touched = plugin.tags.reads | plugin.tags.writes
    return [
        name,
        plugin.summary,
        f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper else "–",
        ", ".join(f"`{point}`" for point in Point if point in touched and point not in LIFECYCLE),
        extra_passes(plugin.tags),
        plugin.fidelity.value,
        conformance(results.get(plugin.name)),
    ]


def conformance(result: Mapping[str, Any] | None) -> str:
    """Write how many of the checks that apply a method passed; never more than was run."""
    if result is None:
        return "not run"
    said = list(result["checks"].values())
    passed, run = said.count("passed"), len(said) - said.count("skipped")
    expected = said.count("expected failure")
    more = f", {expected} expected failure{'s' if expected > 1 else ''}" if expected else ""
    return f"{passed} of {run} checks{more}"


def index(results: Mapping[str, Any]) -> str:
    """Write the page about all methods."""
    parts = [INTRODUCTION, method_table(results, ""), *(section(plugin) for plugin in builtin())]
    return "\n".join(parts)


def section(plugin: type[Method]) -> str:
    """Write what a method declares about itself."""
    tags = plugin.tags
    needs = {
        "attention gradients": tags.gradient,
        "`handle.generate`": tags.selects_token,
        "image tokens in a grid": tags.spatial_grid,
        "batches of one sample": not tags.batch,
    }
    told = [
        f"Needs: {', '.join(what for what, needed in needs.items() if needed) or 'nothing special'}.",
        "Draws random numbers." if tags.stochastic else "",
        f"Version {plugin.version}.",
    ]
    presets = [
        (f"`{name}`", values_text(values), plugin.fidelity_of(name).value) for name, values in plugin.presets.items()
    ]
    return "\n".join(
        [
            f"## {plugin.name}\n\n{' '.join(filter(None, told))}\n",
            table(presets, ("preset", "values", "fidelity")),
            table(map(parameter_row, parameters_of(plugin)), ("parameter", "type", "default", "meaning")),
        ]
    )


def values_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={plain(value)}`" for name, value in values.items()) or "the defaults"


def parameter_row(parameter: Parameter) -> list[str]:
    default = "required" if parameter.required else f"`{json.dumps(parameter.default, ensure_ascii=False)}`"
    return [f"`{parameter.name}`", f"`{parameter.type}`", default, parameter.doc.replace("``", "`")]


def run_checks(names: Sequence[str], results: dict[str, Any]) -> None:
    """Run the conformance suite on methods and store what came out, check by check, method by method."""
    from mitigate.testing import check_method
    from mitigate.testing.base import CheckResult

    def show(result: CheckResult) -> None:
        if result.bad:
            print(f"  {result.check} [{result.params}] {result.family}: {result.message}", flush=True)

    versions = {"mitigate": mitigate.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package).partition("+")[0] for package in PACKAGES}
    for name in names:
        plugin = methods().get(name)
        found = check_method(plugin, on_fail=None, callback=show)
        results[name] = {
            "code": code_hash(plugin),
            "versions": versions,
            "families": sorted({result.family for result in found} - {""}),
            "checks": worst(found),
        }
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{name}: {conformance(results[name])} in {sum(result.seconds for result in found):.0f} s", flush=True)


def worst(found: Sequence[Any]) -> dict[str, str]:
    """Return check -> its outcome over all parameters and families; skipped only if it never ran."""
    order = ("skipped", "passed", "expected failure", "unexpected pass", "failed")
    said: dict[str, str] = {}
    for result in found:
        said[result.check] = max(said.get(result.check, "skipped"), result.status, key=order.index)
    return dict(sorted(said.items()))


def stale(results: Mapping[str, Any]) -> list[str]:
    """Return what the stored results no longer describe."""
    from mitigate.testing.suite import catalogue

    checks = {check.name for check in catalogue()}
    again = f"{AGAIN} --conformance"
    strangers = results.keys() - BUILTIN
    found = [f"docs/conformance.json has results of {name}, which is no built-in method" for name in strangers]
    for plugin in builtin():
        result = results.get(plugin.name)
        if result is None:
            found.append(f"{plugin.name} has no conformance result; {again} {plugin.name}")
        elif result["code"] != code_hash(plugin):
            found.append(f"the code of {plugin.name} has changed since its checks ran; {again} {plugin.name}")
        elif changed := checks.symmetric_difference(result["checks"]):
            found.append(f"{plugin.name} was checked without {sorted(changed)[0]} or with it, unlike now; {again}")
    return found


def pages(results: Mapping[str, Any]) -> dict[Path, str]:
    """Return the text of every generated page."""
    readme = README.read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md needs the lines {BEGIN.strip()} and {END.strip()}")
    return {README: before + begin + method_table(results, "docs/methods/") + end + after, INDEX: index(results)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something is stale")
    parser.add_argument("--conformance", nargs="*", metavar="NAME", choices=list(BUILTIN), help="run the suite first")
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.conformance is not None:
        results = {name: result for name, result in results.items() if name in BUILTIN}
        run_checks(options.conformance or list(BUILTIN), results)
    wanted = pages(results)
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if not options.check:
        for path in changed:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    problems = stale(results) + [f"{path.relative_to(ROOT)} is stale; {AGAIN}" for path in changed]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
