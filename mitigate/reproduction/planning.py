"""Which comparisons a published table asks for, and how far each is the paper's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mitigate.compose import compose_comparison
from mitigate.compose.resolved import PLACES, comparison_name
from mitigate.compose.session import session
from mitigate.errors import ConfigError, UnknownName
from mitigate.registry import suggestion
from mitigate.reproduction.tables import Column, Protocol, Published, read_protocol, read_table, read_tables

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun
    from mitigate.compose.session import Session

TESTBED: Final = "testbed"
TESTBED_SCENES: Final = 50
"""Scenes of the embedded testbed a table is tried on if nobody says how many."""
#: Values that change neither what is asked nor what is answered.
_NEUTRAL: Final = ("trainer", "tracker", "runs_dir", "seed", "on_error", "model.path", "model.revision")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One comparison of a published table: one model, one benchmark, all rows with a value.

    Parameters
    ----------
    published
        The table.
    model
        Whose rows are shown: a key of ``published.models``.
    protocol
        How the paper measures the columns.
    columns
        Column -> how it is measured here.
    runs
        The comparison's stacks, composed.
    altered
        What was asked for that is not the paper's protocol.
    other_model
        Why the model that runs is not the paper's; no verdict is drawn then.
    weights
        Where the weights are from if somebody said so: nothing shows that they are those of the paper's model.
    notes
        Sentences of the composition.
    """

    published: Published
    model: str
    protocol: Protocol
    columns: Mapping[str, Column]
    runs: Sequence[ResolvedRun]
    altered: tuple[str, ...] = ()
    other_model: str = ""
    weights: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the folder's name, the same for the same comparison."""
        return comparison_name(list(self.runs))

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Return stack -> column -> cell, of the columns that are measured."""
        own = self.published.models[self.model].rows
        return {
            stack: {column: cell for column, cell in own.get(stack, {}).items() if column in self.columns}
            for stack in self.published.stacks(self.model, self.protocol)
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for, taken apart.

    Parameters
    ----------
    model, benchmark
        What ``model=`` and ``benchmark=`` choose.
    name
        Value of ``name=``.
    values
        All other overrides.
    keys
        Their keys, in the same order.
    """

    model: str | None
    benchmark: str | None
    name: str | None
    values: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def altered(self) -> tuple[str, ...]:
        """Return the overrides that change what is measured."""
        neutral = (*_NEUTRAL, *(f"benchmark.{place}" for place in PLACES))
        pairs = zip(self.keys, self.values, strict=True)
        return tuple(
            text for key, text in pairs if not any(key == name or key.startswith(f"{name}.") for name in neutral)
        )


def find_table(name: str) -> Published:
    """Return the published table an experiment holds.

    Raises
    ------
    UnknownName
        If there is no such experiment, or it holds no table.
    """
    with session() as hydra:
        known = hydra.options("experiment")
        published = read_table(hydra, name) if name in known else None
        if published is not None:
            return published
        if name not in known:
            raise UnknownName(f"unknown experiment {name!r}{suggestion(name, read_tables(hydra))}")
    raise UnknownName(f"experiment {name!r} holds no published values; run it with: mitigate compare experiment={name}")


def read_overrides(tokens: Sequence[str]) -> Asked:
    """Take overrides apart.

    Raises
    ------
    ConfigError
        If one is none, or chooses what the table fixes.
    """
    chosen: dict[str, str] = {}
    values: list[str] = []
    keys: list[str] = []
    with session() as hydra:
        parsed = hydra.parse(tokens)
    for override in parsed:
        key, text = str(override.key_or_group), str(override.input_line)
        if key in ("stacks", "stack", "methods", "experiment"):
            raise ConfigError(f"{text}: the table fixes it; `mitigate compare` takes {key}=")
        if key in ("model", "benchmark", "name"):
            chosen[key] = str(override.value())
        else:
            keys.append(key)
            values.append(text)
    return Asked(
        model=chosen.get("model"),
        benchmark=chosen.get("benchmark"),
        name=chosen.get("name"),
        values=tuple(values),
        keys=tuple(keys),
    )


def plan_jobs(published: Published, asked: Asked) -> list[Job]:
    """Return the comparisons that are asked for, composed and checked; nothing has run.

    Raises
    ------
    ConfigError
        If a choice is not among the table's, or a column names a metric its benchmark does not have.
    """
    with session() as hydra:
        protocols = [read_protocol(hydra, name) for name in published.protocols]
        if asked.model == TESTBED:
            jobs = _testbed_jobs(hydra, published, _chosen_protocols(published, protocols, asked, TESTBED), asked)
        else:
            models = _chosen_models(published, asked)
            chosen = _chosen_protocols(published, protocols, asked)
            jobs = [
                _job(hydra, published, model, protocol, asked)
                for model in models
                for protocol in chosen
                if published.stacks(model, protocol)
            ]
    if not jobs:
        raise ConfigError(f"{published.name} has no values of {asked.model} on benchmark={asked.benchmark}")
    for job in jobs:
        _check_columns(job)
    return jobs


def _chosen_models(published: Published, asked: Asked) -> list[str]:
    if asked.model is not None and asked.model not in published.models:
        known = ", ".join([*published.models, TESTBED])
        raise ConfigError(
            f"model={asked.model}: {published.name} has no rows of it; it has {known} "
            f"(a local copy: model=NAME model.path=FOLDER)"
        )
    models = list(published.models) if asked.model is None else [asked.model]
    own = [text for key, text in zip(asked.keys, asked.values, strict=True) if key.startswith("model.")]
    if own and len(models) > 1:
        raise ConfigError(f"{own[0]}: say which model of the table it belongs to: model=NAME ({', '.join(models)})")
    return models


def _chosen_protocols(
    published: Published, protocols: Sequence[Protocol], asked: Asked, also: str | None = None
) -> list[Protocol]:
    if asked.benchmark in (None, also):
        return list(protocols)
    chosen = [protocol for protocol in protocols if protocol.benchmark == asked.benchmark]
    if not chosen:
        known = ", ".join(dict.fromkeys(protocol.benchmark for protocol in protocols))
        raise ConfigError(f"benchmark={asked.benchmark}: {published.name} has {known}")
    return chosen


def _job(hydra: Session, published: Published, model: str, protocol: Protocol, asked: Asked) -> Job:
    notes: list[str] = []
    stacks = ",".join(published.stacks(model, protocol))
    tokens = [f"experiment={protocol.name}", f"model={model}", f"stacks=[{stacks}]", *asked.values]
    runs = compose_comparison(tokens, notes, hydra)
    path = str(runs[0].config["model"]["path"])
    if path == TESTBED:
        raise ConfigError(f"model.path={path}: these are no weights of {model}; model={TESTBED} tries the table on it")
    return Job(
        published=published,
        model=model,
        protocol=protocol,
        columns=protocol.columns,
        runs=runs,
        altered=asked.altered,
        other_model=published.models[model].stand_in,
        weights=path if "model.path" in asked.keys else "",
        notes=tuple(notes),
    )


def _testbed_jobs(hydra: Session, published: Published, protocols: Sequence[Protocol], asked: Asked) -> list[Job]:
    """Compose the table's stacks on the embedded testbed, beside the rows of its first model that has them."""
    jobs = []
    limit = [] if "benchmark.limit" in asked.keys else [f"benchmark.limit={TESTBED_SCENES}"]
    for protocol in protocols:
        model = next((name for name in published.models if published.stacks(name, protocol)), None)
        if model is None or protocol.testbed is None:
            continue
        notes: list[str] = []
        tokens = [f"model={TESTBED}", f"benchmark={TESTBED}", *limit, *protocol.testbed, *protocol.decoding]
        keys = {text.partition("=")[0] for text in asked.values}
        tokens = [token for token in tokens if token.partition("=")[0] not in keys]
        stacks = f"stacks=[{','.join(published.stacks(model, protocol))}]"
        jobs.append(
            Job(
                published=published,
                model=model,
                protocol=protocol,
                columns=protocol.testbed_columns,
                runs=compose_comparison([*tokens, stacks, *asked.values], notes, hydra),
                altered=asked.altered,
                other_model=f"the embedded testbed, not {published.models[model].printed}",
                notes=tuple(notes),
            )
        )
    if not jobs:
        benchmarks = ", ".join(protocol.benchmark for protocol in protocols)
        raise ConfigError(f"{published.name} ({benchmarks}) has nothing the testbed can try; choose another benchmark=")
    return jobs


def _check_columns(job: Job) -> None:
    known = [metric.name for metric in job.runs[0].benchmark.all_metrics()]
    for column, how in job.columns.items():
        if how.metric not in known:
            raise ConfigError(
                f"conf/experiment/{job.protocol.name}.yaml: column {column!r} is measured by {how.metric!r}, which "
                f"benchmark {job.runs[0].benchmark.name} does not have{suggestion(how.metric, known)}"
            )
