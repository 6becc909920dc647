"""Run one stack: attach, generate what is missing, score what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.effects import totals
from mitigate.errors import ConfigError, DataError
from mitigate.processes import is_first_process
from mitigate.records import RunRecord, SampleRecord, finished_ids
from mitigate.runner.batches import Batch, generate_arguments, plan_batches
from mitigate.runner.fingerprint import weights_of_loaded
from mitigate.runner.identity import changes_since, check_loaded_weights, check_same_run
from mitigate.runner.progress import StackProgress
from mitigate.runner.provenance import git_state, versions
from mitigate.runner.results import timing
from mitigate.runner.stored import graded_answers, unit, units_that_failed
from mitigate.statistics import intervals

if TYPE_CHECKING:
    from rich.console import Console

    from mitigate.adapters import LoadedModel
    from mitigate.benchmarks.base import Benchmark
    from mitigate.compose import ResolvedRun
    from mitigate.core.stack import Stack


#: What a ``model`` configuration says about loading.
_LOADING = (
    "dtype", "attn_implementation", "revision", "trust_remote_code", "device_map", "max_memory", "offload_folder",
    "quantization", "chat_template",
)  # fmt: skip


@dataclass
class ModelCache:
    """Loaded models by configuration: a comparison loads each one once.

    Parameters
    ----------
    models
        Canonical configuration -> model.
    """

    models: dict[str, LoadedModel] = field(default_factory=dict)

    def get(self, config: Mapping[str, Any], accelerator: str = "cpu") -> LoadedModel:
        """Return the model of a ``model`` configuration, loading it the first time, onto this kind of device."""
        from mitigate.adapters import load_model
        from mitigate.runner.devices import target

        arguments = {key: config[key] for key in _LOADING if key in config}
        key = json.dumps({**arguments, "path": config["path"]}, sort_keys=True)
        if key not in self.models:
            with _no_loading_bar():
                self.models[key] = load_model(config["path"], device=target(accelerator), **arguments)
        return self.models[key]


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Silence transformers' own bar, which would tear the runner's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_stack(
    resolved: ResolvedRun, run_dir: Path, *, console: Console, models: ModelCache, progress: StackProgress
) -> RunRecord:
    """Answer every sample of a benchmark with a stack attached, and score the answers.

    A folder that already holds some of the records is completed; one that is finished is returned as it is.

    Parameters
    ----------
    resolved
        What to run.
    run_dir
        Folder of the records.
    console
        Where messages go.
    models
        Models that are already loaded.
    progress
        Where progress is shown.

    Returns
    -------
    RunRecord
        The finished record, as written to ``record.json``.

    Raises
    ------
    ConfigError
        If the folder holds another run, or the configured geometry is not the model's.
    DataError
        If records are damaged, or belong to other data.
    """
    check_same_run(resolved, run_dir)
    samples = resolved.benchmark.samples()
    done = finished_ids(run_dir)
    earlier = RunRecord.read(run_dir) if (run_dir / "record.json").exists() else None
    wanted = {sample.id for sample in samples}
    if strangers := sorted(done - wanted):
        raise DataError(f"{run_dir} has a record of {strangers[0]!r}, which is no sample of this benchmark; delete it")
    record = _opening(resolved, earlier, len(samples))
    if earlier is not None:
        _check_same_data(resolved, earlier, record, run_dir)
    if earlier is not None and earlier.status == "finished" and done == wanted:
        _say_reused(earlier, record, run_dir, console)
        progress.skip()
        return earlier
    return _finish(resolved, run_dir, record, done, models, progress)


def _finish(
    resolved: ResolvedRun,
    run_dir: Path,
    record: RunRecord,
    done: set[str],
    models: ModelCache,
    progress: StackProgress,
) -> RunRecord:
    """Generate what is missing, score everything, write the finished record."""
    first = is_first_process()
    loaded = None
    if any(batch.missing(done) for batch in batches_of(resolved, stack=None)):
        # Before anything is written: a model that cannot be loaded leaves no folder behind.
        loaded = models.get(resolved.config["model"], str(resolved.config["trainer"]["accelerator"]))
        _check_facts(resolved, loaded)
        weights = weights_of_loaded(resolved.config["model"], loaded)
        check_loaded_weights(resolved, record.weights, weights, run_dir)
        record = replace(record, weights=weights)
    if first:
        record.write(run_dir)
    try:
        _generate(resolved, run_dir, done, loaded, progress)
    except Exception:
        if first:
            with suppress(DataError):  # a full disk: the first error is the one to tell
                replace(record, status="failed").write(run_dir)
        raise
    if not first:  # one process is enough to score, and to ask a judge
        return replace(record, status="finished")
    answers = graded_answers(resolved.benchmark, run_dir, progress.grading(resolved.stack_name)).values()
    if len(answers) != record.samples:
        raise DataError(
            f"{run_dir} has {len(answers)} of {record.samples} records although the run ended; run it again"
        )
    finished = _scored(resolved, replace(record, status="finished"), list(answers))
    finished.write(run_dir)
    return finished


def _scored(resolved: ResolvedRun, record: RunRecord, records: list[SampleRecord]) -> RunRecord:
    """Score what was answered; what failed is counted and in no number.

    Raises
    ------
    DataError
        If nothing was answered.
    """
    left_out = units_that_failed(resolved.benchmark, records)
    answers = [answer for answer in records if unit(resolved.benchmark, answer) not in left_out]
    if not answers:
        failed = [answer for answer in records if answer.error is not None]
        many = f"all {len(records)} samples" if len(failed) == len(records) else "samples of every group of answers"
        raise DataError(f"{many} failed; the first one, {failed[0].id!r}: {failed[0].error}")
    return replace(
        record,
        failures=sum(answer.error is not None for answer in records),
        metrics=intervals(
            resolved.benchmark.counts(answers), resolved.benchmark.all_metrics(), seed=int(resolved.config["seed"])
        ),
        cost=timing(answers),
        telemetry=totals(answers),
    )


def _generate(
    resolved: ResolvedRun, run_dir: Path, done: set[str], loaded: LoadedModel | None, progress: StackProgress
) -> None:
    """Generate the batches in which a record is missing; without a model, none is."""
    if loaded is None:
        progress.skip()
        return
    from mitigate.core.stack import Stack
    from mitigate.runner.module import BatchDataModule, StackModule, predict

    config = resolved.config
    stack = Stack(resolved.methods)
    batches = batches_of(resolved, stack)
    asked = int(config["trainer"]["batch_size"])
    if not stack.batch and asked > 1:
        line = f"{resolved.stack_name}: a method serves one sample at a time: batches of 1 instead of {asked}"
        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
    progress.begin(resolved.stack_name, sum(len(batch.samples) for batch in batches), len(done))
    module = StackModule(
        loaded=loaded,
        stack=stack,
        arguments=generate_arguments(config["decoding"]),
        seed=int(config["seed"]),
        run_dir=run_dir,
        done=done,
        advance=progress.advance,
        skip=config["on_error"] == "skip",
    )
    data = BatchDataModule(
        resolved.benchmark, batches, done, int(config["trainer"]["num_workers"]), skip=config["on_error"] == "skip"
    )
    predict(module, data, config["trainer"], gradients=stack.needs_gradient, folder=run_dir)
    progress.end()


def batches_of(resolved: ResolvedRun, stack: Stack | None) -> list[Batch]:
    """Return the run's fixed batches; a stack that serves single samples only gets batches of one."""
    config = resolved.config
    size = 1 if stack is not None and not stack.batch else int(config["trainer"]["batch_size"])
    benchmark = resolved.benchmark
    return plan_batches(benchmark, benchmark.samples(), size, int(config["decoding"]["max_new_tokens"]))


def _opening(resolved: ResolvedRun, earlier: RunRecord | None, samples: int) -> RunRecord:
    """Return the record of a run that begins or goes on."""
    skip = resolved.config["on_error"] == "skip"
    return RunRecord(
        status="running",
        stack=resolved.stack_name,
        samples=samples,
        config=dict(resolved.config),
        provenance=dict(resolved.provenance),
        versions=versions(resolved),
        git=git_state(),
        data_hash=_data_hash(resolved.benchmark, skip),
        prompt_hash=_prompt_hash(resolved.benchmark),
        unreadable=[image for image, found in _pictures(resolved.benchmark, skip).items() if found is None],
        weights=earlier.weights if earlier is not None else "",
        created_at=earlier.created_at if earlier is not None else datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


# All stacks of a comparison share these: they read every file of the benchmark.
@lru_cache(maxsize=8)
def _pictures(benchmark: Benchmark, skip: bool) -> Mapping[str, str | None]:
    return benchmark.picture_hashes(skip=skip)


@lru_cache(maxsize=8)
def _data_hash(benchmark: Benchmark, skip: bool, unreadable: tuple[str, ...] = ()) -> str:
    return benchmark.data_hash({**_pictures(benchmark, skip), **dict.fromkeys(unreadable)})


@lru_cache(maxsize=8)
def _prompt_hash(benchmark: Benchmark) -> str:
    return benchmark.prompt_hash()


def _check_same_data(resolved: ResolvedRun, earlier: RunRecord, now: RunRecord, run_dir: Path) -> None:
    """Refuse to go on with other data than a run began with; what could not be read then may have been mended."""
    if lost := sorted(set(now.unreadable) - set(earlier.unreadable)):
        raise DataError(f"the picture {lost[0]!r} cannot be read any more, but {run_dir} was made with it; get it back")
    skip = resolved.config["on_error"] == "skip"
    if _data_hash(resolved.benchmark, skip, tuple(earlier.unreadable)) != earlier.data_hash:
        raise DataError(f"{run_dir} was made with other data or pictures of this benchmark; delete it to run it again")


def _say_reused(earlier: RunRecord, now: RunRecord, run_dir: Path, console: Console) -> None:
    changes = changes_since(earlier.versions, now.versions)
    if earlier.git.get("sha") != now.git.get("sha"):
        changes.append(f"commit {str(earlier.git.get('sha'))[:9]} -> {str(now.git.get('sha'))[:9]}")
    note = f" (since then: {', '.join(changes)}; delete {run_dir} to run it again)" if changes else ""
    line = f"{earlier.stack}: finished {earlier.created_at}, not run again{note}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_facts(resolved: ResolvedRun, loaded: LoadedModel) -> None:
    """Refuse a configured geometry that is not the model's: the plan was made for another model."""
    facts = resolved.facts
    known = {} if facts is None else {name: value for name, value in asdict(facts).items() if value is not None}
    for assumed in ("spatial_grid", "causal_prompt"):  # true until the model is there: nobody need have said so
        if known.get(assumed):
            del known[assumed]
    wrong = [name for name, value in known.items() if value != getattr(loaded.facts, name)]
    if not wrong:
        return
    raise ConfigError(
        f"model.{wrong[0]}={known[wrong[0]]!r} is configured, but the loaded model has "
        f"{getattr(loaded.facts, wrong[0])!r}; correct it or leave it out"
    )
