"""What ``mitigate score`` prints: help, the JSON object, the table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mitigate.jsonfiles import to_json

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.cli.scoring import Scored
    from mitigate.metrics.base import Interval, Metric

HELP = """\
Usage: mitigate score BENCHMARK --predictions FILE [OPTION ...] [KEY=VALUE ...]

Score answers that any tool produced. No model is loaded; nothing is scored unless every answer can be.

The file holds one JSON object per line (or one JSON array of objects) with the sample's id and the raw answer:
  {"id": "adversarial/17", "text": "Yes, there is a dog."}

  --predictions FILE   the answers; - reads them from stdin
  --baseline FILE      other answers to the same samples: adds the paired differences to them, and McNemar's test
  --partial            score only the samples that have an answer, and say how many
  --id-field KEY       where the id is, if not in "id"        (question_id, image_id, ...)
  --text-field KEY     where the answer is, if not in "text"  (answer, caption, response, ...)
  --data DIR           folder of the benchmarks' data; $MITIGATE_DATA or data/ if not given
  --resamples N        of the bootstrap that gives the 95 % intervals, 10,000 if not given
  --seed N             of the bootstrap, 0 if not given
  --verdicts DIR       where a judge's verdicts are kept, so that none is asked for twice; FILE.verdicts if not given
  --json               print one JSON object and nothing else
  -h, --help           this text; `mitigate score BENCHMARK --help` shows ids, files and parameters of a benchmark

KEY=VALUE sets a parameter of the benchmark: parser=strict, benchmark.parser=strict and --parser strict are the same.

Examples
  mitigate score pope --predictions answers.jsonl
  mitigate score pope --predictions answers.jsonl splits=[random] --parser opera --id-field question_id
  mitigate score pope --predictions ours.jsonl --baseline plain.jsonl --json > scores.json

Exit codes: 0 scored, 2 something to fix in the command, the answers or the data (file and line are named).
"""


def benchmark_help(name: str, plugin: type[Benchmark]) -> str:
    """Return the help of ``mitigate score NAME``: what its ids look like, which files and parameters it has."""
    from mitigate.compose.schemas import parameters_of

    lines = [f"Usage: mitigate score {name} --predictions FILE [OPTION ...] [KEY=VALUE ...]", "", plugin.summary, ""]
    if plugin.ids:
        lines += _folded("Ids", plugin.ids)
    lines += _folded("Files", _files(name, plugin))
    lines += ["", "Parameters (KEY=VALUE or --KEY VALUE)"]
    for parameter in parameters_of(plugin):
        default = "required" if parameter.required else f"default {_plain(parameter.default)}"
        lines += _folded(f"  {parameter.name}", f"{parameter.doc} ({default})", 20)
    lines += ["", f"Example\n  mitigate score {name} --predictions answers.jsonl --json"]
    return "\n".join(lines) + "\n\nThe options of every benchmark: mitigate score --help\n"


def _files(name: str, plugin: type[Benchmark]) -> str:
    needed = [source.path for source in plugin.sources if not source.is_folder and not source.optional]
    if not needed:
        return "none; the samples come with the program"
    shown = ", ".join(f"{name}/{path}".replace(f"{name}/../", "") for path in needed)
    return f"{shown} in the data folder (`mitigate data fetch {name}`); no pictures"


def _folded(head: str, text: str, indent: int = 8) -> list[str]:
    lines = textwrap.wrap(text, 118 - indent, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"{head:<{indent - 1}} {lines[0]}"
    return [first, *(" " * indent + line for line in lines[1:])]


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_plain, value))}]" if isinstance(value, (list, tuple)) else str(value)


def summary(
    benchmark: Benchmark,
    scored: Scored,
    baseline: Scored | None,
    *,
    total: int,
    used: Mapping[str, str],
    notes: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return everything that is shown, as plain JSON: rates in 0..1, undefined numbers ``None``.

    Parameters
    ----------
    benchmark
        With its settings.
    scored, baseline
        The answers, and those they are compared to.
    total
        How many samples the benchmark has.
    used
        Data file -> sha256.
    notes
        Warnings about the data.
    resamples, seed
        Of the bootstrap.
    """
    from mitigate.statistics import intervals

    metrics = benchmark.all_metrics()
    found: dict[str, Any] = {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "params": benchmark.params(),
        "predictions": scored.name,
        "n_samples": len(scored.records),
        "n_samples_of_benchmark": total,
        "n_images": len({record.image_id for record in scored.records}),
        "n_clusters": len(scored.counts.images),
        "resamples": resamples,
        "seed": seed,
        "headline": list(benchmark.headline),
        "metrics": described(metrics, intervals(scored.counts, metrics, resamples, seed)),
    }
    if unparsed := [name for name in found["metrics"] if name.split("/")[-1] == "unparsed_rate"]:
        found["unparsed_rate"] = found["metrics"][unparsed[0]]["value"]
    if judges := sorted({str(record.meta["judge"]) for record in scored.records if record.meta.get("judge")}):
        found["judge"] = ", ".join(judges)
    if baseline is not None:
        found["baseline"] = _compared(benchmark, scored, baseline, metrics, resamples, seed)
    found["warnings"] = [*notes, *scored.warnings]
    found["data"] = dict(used)
    plain: dict[str, Any] = to_json(found)
    return plain


def described(metrics: Sequence[Metric], measured: Mapping[str, Interval]) -> dict[str, Any]:
    """Return metric -> its interval, and what has to be known to show it."""
    about = ("title", "percent", "unit", "higher_is_better")
    return {
        metric.name: {**asdict(measured[metric.name]), **{key: getattr(metric, key) for key in about}}
        for metric in metrics
        if metric.name in measured
    }


def _compared(
    benchmark: Benchmark, scored: Scored, baseline: Scored, metrics: Sequence[Metric], resamples: int, seed: int
) -> dict[str, Any]:
    """Return the paired differences (answers minus baseline), and McNemar's test where answers are right or wrong."""
    from mitigate.runner.results import cautions
    from mitigate.statistics import intervals, mcnemar, paired_differences

    outcomes = [
        {record.id: right for record in each.records if (right := benchmark.correct(record)) is not None}
        for each in (baseline, scored)
    ]
    differences = paired_differences(baseline.counts, scored.counts, metrics, resamples, seed)
    return {
        "predictions": baseline.name,
        "metrics": {
            name: asdict(interval) for name, interval in intervals(baseline.counts, metrics, resamples, seed).items()
        },
        "differences": {
            name: {**asdict(value), "excludes_zero": value.excludes_zero, "caution": value.caution}
            for name, value in differences.items()
        },
        "mcnemar": asdict(mcnemar(*outcomes)) if outcomes[0] else None,
        "cautions": cautions(benchmark, differences),
        "warnings": baseline.warnings,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table: scores with their intervals, then context, differences and warnings."""
    baseline = result.get("baseline")
    count = f"{result['n_samples']:,} answers about {result['n_images']:,} pictures"
    if result["n_samples"] < result["n_samples_of_benchmark"]:
        count = f"{result['n_samples']:,} of {result['n_samples_of_benchmark']:,} answers (--partial)"
    console.print(metrics_table(f"{result['benchmark']}: {count}", result["metrics"], baseline))
    for line in _lines(result, baseline):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def metrics_table(title: str, metrics: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> Table:
    """Return the table of `described` metrics as plain JSON: scores first, then what is context.

    Parameters
    ----------
    title
        Above the table.
    metrics
        Metric -> interval, title and unit; undefined numbers ``None``.
    baseline
        ``metrics`` of other answers, and ``differences`` to them.
    """
    heads = ["metric", "value", "95 % interval"]
    heads += ["baseline", "difference", "95 % interval", "p"] if baseline else []
    table = Table(*heads, title=Text(title), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    context = [name for name, metric in metrics.items() if metric["higher_is_better"] is None]
    for names in ([name for name in metrics if name not in context], context):
        for name in names:
            table.add_row(*_row(name, metrics[name], baseline), style="dim" if name in context else None)
        table.add_section()
    return table


def _row(name: str, metric: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[Text]:
    cells = [metric["title"], _number(metric["value"], metric, unit=True), _interval(metric, metric)]
    if baseline is not None:
        difference = baseline["differences"][name]
        star = "*" if difference["excludes_zero"] else ""
        cells += [
            _number(baseline["metrics"][name]["value"], metric),
            _number(difference["value"], metric, sign=True) + star,
            _interval(difference, metric, sign=True),
            _p(difference["p"]),
        ]
    return [Text(cell) for cell in cells]


def _number(value: float | None, metric: Mapping[str, Any], *, sign: bool = False, unit: bool = False) -> str:
    if value is None:
        return "–"
    shown = round(value * (100 if metric["percent"] else 1), 2) or 0.0  # no "-0.00"
    after = " %" if metric["percent"] else f" {metric['unit']}" if metric["unit"] else ""
    return (f"{shown:+.2f}" if sign else f"{shown:.2f}") + (after if unit else "")


def _interval(values: Mapping[str, Any], metric: Mapping[str, Any], *, sign: bool = False) -> str:
    if values["low"] is None:
        return ""
    return f"{_number(values['low'], metric, sign=sign)} to {_number(values['high'], metric, sign=sign)}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _lines(result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[str]:
    lines = []
    if baseline is not None:
        lines.append(f"Difference: {result['predictions']} minus {baseline['predictions']}; * excludes zero (paired)")
        if (test := baseline["mcnemar"]) is not None:
            lines.append(
                f"McNemar, exact: right only in {baseline['predictions']} {test['only_first']}, only in "
                f"{result['predictions']} {test['only_second']}, p = {_p(test['p'])}"
            )
        lines += [f"! difference of {line}" for line in baseline["cautions"]]
        lines += [f"! {baseline['predictions']}: {line}" for line in baseline["warnings"]]
    if "judge" in result:
        lines.append(f"Judge: {result['judge']}")
    return lines + [f"! {line}" for line in result["warnings"]]
