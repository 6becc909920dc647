"""One diagnostic run: generate what is missing, analyse what is recorded, write and show the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mitigate.diagnostics import records
from mitigate.diagnostics.ablation import ablate
from mitigate.diagnostics.base import Diagnostic, Findings, SampleRows
from mitigate.diagnostics.identity import check_same, versions_of
from mitigate.diagnostics.labels import Label
from mitigate.diagnostics.tracking import track
from mitigate.errors import ConfigError, DataError
from mitigate.jsonfiles import read_object, write_json
from mitigate.runner.batches import Batch, plan_batches
from mitigate.runner.fingerprint import weights_of_loaded
from mitigate.runner.folder import claim
from mitigate.runner.identity import check_loaded_weights
from mitigate.runner.progress import StackProgress
from mitigate.runner.provenance import git_state
from mitigate.runner.single import ModelCache
from mitigate.runner.standalone import configured_tracker, notes_of

if TYPE_CHECKING:
    from rich.console import Console

    from mitigate.benchmarks.base import Sample
    from mitigate.compose import ResolvedRun
    from mitigate.trackers.base import Tracker

CONFIG: Final = "config.json"
SUMMARY: Final = "summary.json"


@dataclass(frozen=True)
class Diagnosis:
    """What a diagnostic run made.

    Parameters
    ----------
    folder
        Where everything is.
    findings
        The result.
    summary
        Content of ``summary.json``.
    figures
        PNG files; an SVG lies beside each.
    messages
        Lines for the user.
    """

    folder: Path
    findings: Findings
    summary: Mapping[str, Any]
    figures: Sequence[Path]
    messages: Sequence[str]


def with_diagnostic(resolved: ResolvedRun, diagnostic: Diagnostic) -> ResolvedRun:
    """Return the run with the diagnostic in its configuration, so that folder and identity follow from both."""
    asked = {key: value for key, value in diagnostic.params().items() if key not in diagnostic.analysis}
    config = {**resolved.config, "diagnostic": {"name": diagnostic.name, **asked}}
    return dataclasses.replace(resolved, config=config)


def folder_of(resolved: ResolvedRun, diagnostic: Diagnostic) -> Path:
    """Return the default folder: ``runs/diagnose/NAME-...``, or the run's own name below ``runs/diagnose``."""
    name = resolved.run_name if resolved.config["name"] else f"{diagnostic.name}-{resolved.run_name}"
    return Path(resolved.config["runs_dir"]) / "diagnose" / name


def check(resolved: ResolvedRun, diagnostic: Diagnostic, folder: Path) -> None:
    """Refuse what cannot be diagnosed, before anything is loaded or written.

    Raises
    ------
    ConfigError
        For beams, several devices, parameters the model does not fit, or a folder of another run.
    DataError
        If the folder's files cannot be read.
    """
    config = resolved.config
    if int(config["decoding"]["num_beams"]) > 1:
        raise ConfigError(
            f"decoding.num_beams={config['decoding']['num_beams']}: a diagnostic follows one sequence per sample; "
            f"use decoding=greedy or decoding=sample"
        )
    if int(config["trainer"]["devices"]) != 1 or int(config["trainer"]["num_nodes"]) != 1:
        raise ConfigError("a diagnostic runs on one device; set trainer.devices=1 and trainer.num_nodes=1")
    if resolved.facts is not None:
        diagnostic.check_model(resolved.facts)
    diagnostic.choose(resolved.benchmark.samples())
    check_same(resolved, diagnostic, folder)


def diagnose(
    resolved: ResolvedRun,
    diagnostic: Diagnostic,
    folder: Path,
    *,
    console: Console,
    tracker: Tracker | None = None,
) -> Diagnosis:
    """Run a diagnostic, or complete or analyse anew what is already there.

    Parameters
    ----------
    resolved
        As `with_diagnostic` returns it.
    diagnostic
        What to measure.
    folder
        Where records, summary and figures go.
    console
        Where progress goes.
    tracker
        Where else the result is shown; ``None``: as the configuration says.

    Raises
    ------
    ConfigError, DataError
        As `check` does; also if the folder cannot be written or is in use, or records are damaged.
    """
    with claim(folder):
        check(resolved, diagnostic, folder)
        tracker = tracker or configured_tracker(resolved, folder)
        samples = diagnostic.choose(resolved.benchmark.samples())
        header = _opening(resolved, diagnostic, folder, len(samples))
        models = ModelCache()
        header, messages = _generate(resolved, diagnostic, folder, samples, header, models, console)
        found = records.read(folder)
        findings = diagnostic.study(found)
        ablation = ablate(resolved, diagnostic, found, folder, console=console, models=models)
        more, drawn = diagnostic.follow_up(resolved, found, folder, console=console, models=models)
        findings = dataclasses.replace(
            findings,
            tables=[*findings.tables, *ablation.tables, *more.tables],
            data={**findings.data, **more.data},
            notes=[*findings.notes, *ablation.notes, *more.notes, *notes_of([resolved])],
        )
        figures = [*diagnostic.draw(findings, folder), *diagnostic.illustrate(found, resolved.benchmark, folder)]
        figures += drawn
        summary = {**header, "status": "finished", **_counts(found), "findings": findings}
        summary["figures"] = [path.name for path in figures]
        write_json(folder / SUMMARY, summary)
        messages += track(tracker, resolved, diagnostic, summary, findings, figures, folder)
    return Diagnosis(folder, findings, summary, figures, messages)


def _opening(resolved: ResolvedRun, diagnostic: Diagnostic, folder: Path, samples: int) -> dict[str, Any]:
    """Return the head of the summary of a run that begins or goes on."""
    path = folder / SUMMARY
    earlier = read_object(path) if path.exists() else {}
    data_hash = resolved.benchmark.data_hash()
    if earlier and earlier.get("data_hash") != data_hash:
        raise DataError(f"{folder} was made with other data or pictures of this benchmark; delete it to run it again")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {
        "diagnostic": diagnostic.name,
        "parameters": diagnostic.params(),
        "status": "running",
        "stack": resolved.stack_name,
        "samples": samples,
        "versions": versions_of(resolved, diagnostic),
        "git": git_state(),
        "data_hash": data_hash,
        "prompt_hash": resolved.benchmark.prompt_hash(),
        "weights": str(earlier.get("weights", "")),
        "created_at": str(earlier.get("created_at", now)),
    }


def _generate(
    resolved: ResolvedRun,
    diagnostic: Diagnostic,
    folder: Path,
    samples: Sequence[Sample],
    header: dict[str, Any],
    models: ModelCache,
    console: Console,
) -> tuple[dict[str, Any], list[str]]:
    """Generate the samples without a record; return the completed header and lines for the user."""
    wanted, done = {sample.id for sample in samples}, {sample.id for sample in records.read(folder)}
    if strangers := sorted(done - wanted):
        raise DataError(f"{folder} has a record of {strangers[0]!r}, which is no sample of this run; delete it")
    if done == wanted:
        line = f"{folder}: all {len(done)} samples are recorded; analysed anew, nothing was generated"
        return header, [line]
    loaded = models.get(resolved.config["model"], str(resolved.config["trainer"]["accelerator"]))
    diagnostic.check_model(loaded.facts)
    header["weights"], before = weights_of_loaded(resolved.config["model"], loaded), header["weights"]
    check_loaded_weights(resolved, before, header["weights"], folder)
    from mitigate.diagnostics.generating import Generator

    generator = Generator(resolved, diagnostic, loaded)
    batches = _batches(resolved, samples, generator.stack.batch)
    asked = {"config": dict(resolved.config), "provenance": dict(resolved.provenance)}
    write_json(folder / CONFIG, asked)
    write_json(folder / SUMMARY, header)
    with StackProgress(console) as progress, records.Writer(folder) as writer:
        progress.begin(f"{diagnostic.name} on {resolved.stack_name}", len(samples), len(done))
        generator.run(batches, done, writer, progress.advance)
        progress.end()
    return header, []


def _batches(resolved: ResolvedRun, samples: Sequence[Sample], several: bool) -> list[Batch]:
    size = int(resolved.config["trainer"]["batch_size"]) if several else 1
    return plan_batches(resolved.benchmark, samples, size, int(resolved.config["decoding"]["max_new_tokens"]))


def _counts(found: Sequence[SampleRows]) -> dict[str, Any]:
    """Return how much there was: tokens, words by label, seconds."""
    words = [row.label for sample in found for row in sample.rows if row.first]
    return {
        "samples": len(found),
        "tokens": sum(len(sample.rows) for sample in found),
        "words": {label.value: words.count(label) for label in Label},
        "seconds": sum(sample.seconds for sample in found),
    }
