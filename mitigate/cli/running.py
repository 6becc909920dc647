"""``mitigate run`` and ``mitigate compare``: compose everything, then hand over to the runner."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mitigate.cli.devices import check_accelerator
from mitigate.cli.exits import INTERRUPTED
from mitigate.cli.launching import job_command, launch, split_launcher
from mitigate.cli.options import help_text, read_options
from mitigate.cli.searching import show_search_path
from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mitigate.compose import ResolvedRun
    from mitigate.records import RunRecord

_ALLOWED = ("sweep", "config", "search_path", "dry")


def run(arguments: Sequence[str], console: Console) -> int:
    """Run one stack, or with ``-m`` every job of a sweep; nothing starts before all jobs are composed."""
    options = read_options("run", arguments, _ALLOWED)
    if options.help:
        return _print(console, help_text("run"))
    if options.search_path:
        return show_search_path(console)
    from mitigate.compose import compose_run, compose_sweep

    overrides, launcher = split_launcher(options.overrides, sweep=options.sweep)
    jobs = compose_sweep(overrides, one=bool(launcher)) if options.sweep else [compose_run(overrides)]
    if options.config:
        return _print_configs(console, jobs)
    folders = [_directory(job, job.run_name, f"{job.stack_name}-{job.digest}", len(jobs)) for job in jobs]
    check_before_start(list(zip(jobs, folders, strict=True)), here=not launcher)
    if launcher or options.dry:
        return _launch("run", overrides, launcher, folders, console, dry=options.dry)
    from mitigate.runner import run as start

    for number, (job, directory) in enumerate(zip(jobs, folders, strict=True), start=1):
        if len(jobs) > 1:
            _say(console, f"Job {number} of {len(jobs)}: {directory}")
        try:
            record = start(job, directory, console=console)
        except KeyboardInterrupt:
            _say(console, f"Interrupted. Answers so far are in {directory}; the same command goes on from there.")
            return INTERRUPTED
        console.print(_metrics(job, record))
        _say(console, f"Record: {directory / 'record.json'}")
    return 0


def compare(arguments: Sequence[str], console: Console) -> int:
    """Compare stacks, or with ``-m`` run several comparisons."""
    options = read_options("compare", arguments, _ALLOWED)
    if options.help:
        return _print(console, help_text("compare"))
    if options.search_path:
        return show_search_path(console)
    from mitigate.compose import comparison_digest, comparison_name, compose_comparison, compose_comparison_sweep

    notes: list[str] = []
    overrides, launcher = split_launcher(options.overrides, sweep=options.sweep)
    if options.sweep:
        jobs = compose_comparison_sweep(overrides, notes, one=bool(launcher))
    else:
        jobs = [compose_comparison(overrides, notes)]
    if options.config:
        return _print_configs(console, [stack for job in jobs for stack in job])
    folders = [
        _directory(job[0], comparison_name(job), f"{len(job)}-stacks-{comparison_digest(job)}", len(jobs))
        for job in jobs
    ]
    check_before_start(
        [(run, folder / run.stack_name) for job, folder in zip(jobs, folders, strict=True) for run in job],
        here=not launcher,
    )
    if launcher or options.dry:
        return _launch("compare", overrides, launcher, folders, console, dry=options.dry)
    for note in dict.fromkeys(notes):
        _say(console, note)
    from mitigate.runner import compare as start

    command = shlex.join(["mitigate", "compare", *arguments])
    for number, (job, directory) in enumerate(zip(jobs, folders, strict=True), start=1):
        _say(console, f"Comparison {number} of {len(jobs)}: {directory}" if len(jobs) > 1 else f"Folder: {directory}")
        try:
            start(job, directory, console=console, command=command)
        except KeyboardInterrupt:  # the runner has said where the answers are
            return INTERRUPTED
    return 0


def _launch(
    command: str,
    overrides: Sequence[str],
    launcher: Sequence[str],
    folders: Sequence[Path],
    console: Console,
    *,
    dry: bool,
) -> int:
    """Hand the jobs of a sweep to a launcher, each with the folder it has in the sweep."""
    from mitigate.compose import sweep_jobs

    if not launcher:
        raise ConfigError("--dry-run shows what a launcher would start; add -m hydra/launcher=NAME, or use --cfg job")
    jobs = sweep_jobs(overrides)
    commands = [job_command(command, job, folder) for job, folder in zip(jobs, folders, strict=True)]
    return launch(launcher, commands, console, dry=dry)


def check_before_start(jobs: Sequence[tuple[ResolvedRun, Path]], *, here: bool = True) -> None:
    """Refuse all jobs if one of them asks for a model or device that cannot be had, or its folder holds another run.

    Devices are looked for only if the jobs run ``here``.

    Raises
    ------
    ConfigError
        Naming the first culprit.
    UnsupportedModel
        If no adapter serves the family of a job's model.
    """
    from mitigate.compose.checks import check_family
    from mitigate.runner.identity import check_same_run

    for run, _ in jobs:
        check_family(run.config, run.facts)
    for accelerator in dict.fromkeys(str(run.config["trainer"]["accelerator"]) for run, _ in jobs if here):
        check_accelerator(accelerator, "trainer.accelerator")
    for number, (run, folder) in enumerate(jobs):
        if folder in [other for _, other in jobs[:number]]:
            raise ConfigError(f"two runs would be written to {folder}; give each its own name (name=...)")
        check_same_run(run, folder)


def _metrics(job: ResolvedRun, record: RunRecord) -> Table:
    """Return a run's metrics with their 95 % intervals, and how many samples are not in them."""
    from mitigate.cli.scoring_output import described, metrics_table
    from mitigate.jsonfiles import to_json

    failed = f", of which {record.failures:,} failed" if record.failures else ""
    measured = to_json(described(job.benchmark.all_metrics(), record.metrics))
    return metrics_table(f"{job.stack_name}: {record.samples:,} samples of {job.benchmark.name}{failed}", measured)


def _directory(job: ResolvedRun, name: str, short: str, jobs: int) -> Path:
    """Return a job's folder; the jobs of a sweep that the user named get folders of their own below that name."""
    folder = Path(job.config["runs_dir"]) / name
    return folder / short if job.config["name"] and jobs > 1 else folder


def _print_configs(console: Console, jobs: Sequence[ResolvedRun]) -> int:
    from omegaconf import OmegaConf

    documents = [OmegaConf.to_yaml(OmegaConf.create(dict(job.config))) for job in jobs]
    return _print(console, "---\n".join(documents))


def _print(console: Console, text: str) -> int:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
