"""``mitigate score``: score answers that any other tool produced, without a model."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mitigate.cli.data import benchmark_name, progress_bar
from mitigate.cli.exits import OK, USER_ERROR
from mitigate.cli.flags import wants_help
from mitigate.cli.parameters import Parameters, is_boolean
from mitigate.cli.scoring_output import HELP, benchmark_help, show, summary
from mitigate.data.predictions import match, read_predictions
from mitigate.data.reading import watched
from mitigate.errors import ConfigError, DataError
from mitigate.metrics.base import ImageCounts
from mitigate.registry import benchmarks, suggestion

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark, Sample
    from mitigate.data.predictions import Prediction
    from mitigate.records import SampleRecord

#: Flag -> whether it takes a value; everything else is a parameter of the benchmark.
_FLAGS = {
    "--predictions": True,
    "--baseline": True,
    "--data": True,
    "--id-field": True,
    "--text-field": True,
    "--resamples": True,
    "--seed": True,
    "--verdicts": True,
    "--partial": False,
    "--json": False,
}
_STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One file of answers, scored.

    Parameters
    ----------
    name
        Of the file.
    records
        The answers in the benchmark's order.
    counts
        What they add up to per cluster.
    warnings
        What has to be known about the numbers.
    """

    name: str
    records: list[SampleRecord]
    counts: ImageCounts
    warnings: list[str]


def score(arguments: Sequence[str], console: Console) -> int:
    """Score a file of answers, alone or against another one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return OK if arguments else USER_ERROR
    name, rest = _benchmark(arguments)
    plugin = benchmarks().get(name)
    if wants_help(rest):
        console.print(benchmark_help(name, plugin), end="", markup=False, highlight=False, soft_wrap=True)
        return OK
    parameters = Parameters(plugin, f"benchmark {name}")
    flags = _read(rest, parameters)
    files = _files(flags)
    resamples, seed = _number(flags, "--resamples", 1), _number(flags, "--seed", 0)
    benchmark: Benchmark = parameters.build()
    with paused_collection(), watched() as read, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        samples = benchmark.samples()
        used = dict(read)
        notes = _versions(benchmark, used, [str(item.message) for item in caught])
        try:
            scored = [_score(benchmark, samples, path, flags) for path in files]
        except DataError as error:  # answers to another version's questions fit here as little as wrong ones
            raise DataError("\n".join([str(error), *notes])) from None
    result = summary(
        benchmark,
        scored[-1],
        scored[0] if len(scored) == 2 else None,
        total=len(samples),
        used=used,
        notes=notes,
        resamples=resamples,
        seed=seed,
    )
    if "--json" in flags:
        console.print(json.dumps(result, indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        show(result, console)
    return OK


@contextmanager
def paused_collection() -> Iterator[None]:
    """Stop the garbage collector: it would look again and again at millions of small objects that are all needed."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _benchmark(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the benchmark's name, the first word, and the other arguments."""
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("-") and "=" not in argument:
            return benchmark_name(argument), [*arguments[:position], *arguments[position + 1 :]]
        if argument.partition("=")[0] not in _FLAGS:
            break
        position += 2 if _FLAGS.get(argument) else 1
    raise ConfigError(f"name the benchmark first: mitigate score BENCHMARK {' '.join(arguments[position:])}".rstrip())


def _read(arguments: Sequence[str], parameters: Parameters) -> dict[str, str]:
    """Separate the command's flags from the benchmark's parameters, which are taken over."""
    found: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, given, value = argument.partition("=")
        if not flag.startswith("-"):
            if not given:
                raise ConfigError(f"{argument!r}: write KEY=VALUE for a parameter, and --predictions FILE for the file")
            parameters.set(flag, value, argument)
            continue
        if flag not in _FLAGS and flag not in parameters:
            raise ConfigError(
                f"mitigate score has no option {flag!r}{suggestion(flag, [*_FLAGS, *parameters.flags()])}"
            )
        switch = not _FLAGS[flag] if flag in _FLAGS else parameters.is_switch(flag)
        if switch and not given and not (flag not in _FLAGS and remaining and is_boolean(remaining[0])):
            value = "" if flag in _FLAGS else "true"
        elif not given:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value: {flag} VALUE")
            value = remaining.pop(0)
        if flag not in _FLAGS:
            parameters.set(flag, value, argument if given else f"{flag} {value}")
            continue
        if flag in found:
            raise ConfigError(f"{flag} is given twice; keep one of them")
        if bool(value) == switch:
            raise ConfigError(f"{argument}: {flag} takes no value" if switch else f"{flag} needs a value: {flag} VALUE")
        found[flag] = value
    if "--data" in found:
        if "data_dir" not in parameters:
            raise ConfigError(f"--data {found['--data']}: this benchmark needs no files; leave --data out")
        parameters.set("data_dir", found["--data"], f"--data {found['--data']}")
    return found


def _files(flags: Mapping[str, str]) -> list[str]:
    """Return the file of the baseline, if there is one, and that of the answers."""
    if "--predictions" not in flags:
        raise ConfigError("--predictions FILE is missing: JSON lines with an id and a text each, or - for stdin")
    files = [flags[flag] for flag in ("--baseline", "--predictions") if flag in flags]
    if files.count(_STDIN) > 1:
        raise ConfigError("only one of --predictions and --baseline can come from stdin")
    return files


def _number(flags: Mapping[str, str], flag: str, least: int) -> int:
    from mitigate.statistics import RESAMPLES

    if flag not in flags:
        return RESAMPLES if flag == "--resamples" else 0
    text = flags[flag]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} {text}: must be a whole number, at least {least}")
    return int(text)


def _score(benchmark: Benchmark, samples: Sequence[Sample], path: str, flags: Mapping[str, str]) -> Scored:
    """Read, match, grade and count one file of answers."""
    partial = "--partial" in flags
    name = "stdin" if path == _STDIN else path
    predictions = _predictions(path, name, flags)
    records = match(benchmark, samples, predictions, name, partial=partial)
    folder = Path(flags.get("--verdicts", f"{name}.verdicts"))
    with progress_bar("Judging", shown=sys.stderr.isatty()) as report:
        records = benchmark.graded(records, folder, report)
    counts = benchmark.counts(records)
    notes = benchmark.warnings(counts)
    if partial and len(records) < len(samples):
        failed = {item.id for item in predictions if item.failed} - {record.id for record in records}
        notes.append(f"only {len(records)} of {len(samples)} samples have an answer; the others are left out")
        notes += [f"{len(failed)} of those without an answer failed"] if failed else []
    return Scored(name=name, records=records, counts=counts, warnings=notes)


def _predictions(path: str, name: str, flags: Mapping[str, str]) -> list[Prediction]:
    keys = {"id_field": flags.get("--id-field", "id"), "text_field": flags.get("--text-field", "text")}
    if path == _STDIN:
        return read_predictions(sys.stdin.buffer.read(), name, **keys)
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; --predictions takes a file of answers")
    return read_predictions(Path(path), name, **keys)


def _versions(benchmark: Benchmark, used: Mapping[str, str], said: Sequence[str]) -> list[str]:
    """Return what the benchmark said while it read its files, and which others are not the pinned ones."""
    notes = list(dict.fromkeys(said))
    for source in benchmark.sources:
        named = source.path.removeprefix("../")
        for path, found in used.items():
            if source.sha256 in (None, found) or not f"/{Path(path).as_posix()}".endswith(f"/{named}"):
                continue
            known = dict(source.older).get(found)
            what = f"an older version, {known}" if known else "not the pinned file"
            if path not in " ".join(said):
                notes.append(f"{path} is {what}: the numbers need not compare with others' (`mitigate data check`)")
    return notes
