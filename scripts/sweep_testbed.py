"""Sweep every method's main parameters on the testbed's validation scenes, choose values, test them once.

    python scripts/sweep_testbed.py                      # grid, confirmation, test; goes on where it stopped
    python scripts/sweep_testbed.py --stop-after grid    # look at the validation numbers first
    python scripts/sweep_testbed.py --only scr --limit 8 --scenes 10 --folder runs/try
    python scripts/sweep_testbed.py --optuna 30 --only sgrs

Three steps, each of them `mitigate run -m` with its records (nothing finished runs twice):

1. *grid*: all settings of scripts/sweep_testbed.yaml on the first validation scenes.
2. *confirmation*: per method the default and the three best settings of the grid, on all validation scenes.
3. *test*: defaults, chosen values, stacks and controls, once, on the test scenes, which nothing was chosen on.

The rule, for the grid and for the confirmation: a setting is admissible if neither the recall of captions nor the
mean POPE F1 falls by more than one point against no method; among the admissible ones the lowest CHAIR_i wins, the
default at a tie. It replaces the default only if on all validation scenes its paired 95 % interval of CHAIR_i lies
below zero and it has a lower CHAIR_i than the default. A default that is not admissible itself gives way to the
admissible setting with the lowest CHAIR_i, whether or not that one beats no method: it does less harm.

The result is results.json in the folder; scripts/results_testbed.py makes the page of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import yaml
from rich.console import Console

from mitigate.compose import ResolvedRun, compose_run, compose_sweep
from mitigate.compose.schemas import defaults_of
from mitigate.errors import MitigateError
from mitigate.jsonfiles import to_json
from mitigate.records import RunRecord
from mitigate.registry import methods as known_methods
from mitigate.runner import run as run_one
from mitigate.runner.results import summarise
from mitigate.runner.standalone import stored

PLAN = Path(__file__).with_suffix(".yaml")
FOLDER = Path("runs/sweep-testbed")
TARGET = "chair_i"
KEPT = {"recall": -0.01, "pope/mean/f1": -0.01}
"""Metric -> the lowest difference to no method that is still admissible."""
SHOWN = ("chair_i", "chair_s", "recall", "length", "pope/mean/f1", "pope/mean/accuracy", "pope/mean/yes_rate")
STEPS = ("grid", "confirmation", "test")
CANDIDATES = 3
"""Settings per method that go from the grid to the confirmation."""
EXTRA_STACKS = {"sgrs+locore": ["sgrs", "locore"], "mission": ["scr", "clva", "dleaf", "locore", "sgrs"]}
CONTROLS = ("control_random", "control_probe")

Values = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is swept: scenes per setting, and method -> parameter -> values."""

    limit: int
    grids: Mapping[str, Mapping[str, Sequence[Any]]]

    @classmethod
    def read(cls, path: Path = PLAN) -> Plan:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(limit=int(content["limit"]), grids=content["methods"])

    def default(self, method: str) -> dict[str, Any]:
        """Return the method's own values of the parameters that are swept."""
        own = {**defaults_of(known_methods().get(method)), **known_methods().get(method).presets["paper"]}
        return {parameter: own[parameter] for parameter in self.grids[method]}

    def settings(self, method: str) -> list[dict[str, Any]]:
        """Return all combinations, the last parameter varying fastest, as `mitigate run -m` has them."""
        grid = self.grids[method]
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclass(frozen=True)
class Job:
    """One run of a step: its label in the tables, the methods with the values that are set, and the run."""

    label: str
    values: Mapping[str, Values]
    run: ResolvedRun


def label_of(method: str, values: Values) -> str:
    return " ".join([method, *(f"{parameter}={value}" for parameter, value in values.items())])


def given(values: Mapping[str, Values]) -> list[str]:
    """Return the overrides that set methods' values by hand: they outrank what conf/model/testbed.yaml has."""
    return [f"methods.{method}.{key}={value}" for method, own in values.items() for key, value in own.items()]


# -------------------------------------------------------------------------------------------------- what runs in a step


def grid_jobs(plan: Plan, common: Sequence[str]) -> list[Job]:
    """Return the runs of the grid: no method, then every setting of every method."""
    jobs = [Job("none", {}, compose_run(common))]
    for method, grid in plan.grids.items():
        swept = [f"methods.{method}.{key}={','.join(map(str, values))}" for key, values in grid.items()]
        runs = compose_sweep([*common, f"methods=[{method}]", *swept])
        for values, run in zip(plan.settings(method), runs, strict=True):
            found = {key: run.config["methods"][method][key] for key in values}
            if found != values:
                raise MitigateError(f"{method}: composed {found}, wanted {values}")
            jobs.append(Job(label_of(method, values), {method: values}, run))
    return jobs


def confirmation_jobs(plan: Plan, best: Mapping[str, Sequence[Values]], common: Sequence[str]) -> list[Job]:
    """Return no method, and per method the default and the grid's best settings."""
    jobs = [Job("none", {}, compose_run(common))]
    for method in plan.grids:
        default = plan.default(method)
        for values in [default, *(values for values in best[method] if values != default)]:
            run = compose_run([*common, f"methods=[{method}]", *given({method: values})])
            jobs.append(Job(label_of(method, values), {method: values}, run))
    return jobs


def test_jobs(
    plan: Plan, chosen: Mapping[str, Values], refused: Mapping[str, Values], common: Sequence[str]
) -> list[Job]:
    """Return what runs on the test scenes.

    Defaults, chosen values where they differ, settings that lower CHAIR_i but were refused (see `refused_of`), stacks
    of several methods, controls.
    """
    jobs = [Job("none", {}, compose_run(common))]

    def add(label: str, names: Sequence[str], values: Mapping[str, Values]) -> None:
        jobs.append(Job(label, values, compose_run([*common, f"methods=[{','.join(names)}]", *given(values)])))

    for method in plan.grids:
        add(method, [method], {method: plan.default(method)})
        if chosen[method] != plan.default(method):
            add(f"{method} (tuned)", [method], {method: chosen[method]})
        if method in refused:
            add(f"{method} (refused)", [method], {method: refused[method]})
    for stack, names in EXTRA_STACKS.items():
        if all(name in plan.grids for name in names):
            add(stack, names, {name: plan.default(name) for name in names})
            if any(chosen[name] != plan.default(name) for name in names):
                add(f"{stack} (tuned)", names, {name: chosen[name] for name in names})
    for control in CONTROLS:
        add(control, [control], {})
    return jobs


# ----------------------------------------------------------------------------------------------------- running, summing


def execute(jobs: Sequence[Job], folder: Path, console: Console) -> dict[str, Any]:
    """Run what is not finished, and compare all of it to the first job; return what the page needs."""
    records: dict[str, RunRecord] = {}
    runs = []
    for number, job in enumerate(jobs, start=1):
        place = folder / f"{job.run.stack_name}-{job.run.digest}"  # where `mitigate run -m` puts it
        records[job.label] = run_one(job.run, place, console=Console(quiet=True))
        runs.append(replace(stored(job.run, records[job.label], place), stack=job.label))
        value = records[job.label].metrics[TARGET].value
        console.print(f"{folder.name} {number}/{len(jobs)}: {job.label}: {TARGET} {100 * value:.2f}", highlight=False)
    data = summarise(folder.name, runs)
    first = records[jobs[0].label]
    return {
        "split": data["benchmark"]["split"],
        "pictures": data["n_images"],
        "answers": data["n_samples"],
        "seed": data["seed"],
        "data_hash": data["data_hash"],
        "weights": first.weights,
        "rows": {job.label: _row(job, data["stacks"][job.label], records[job.label]) for job in jobs},
    }


def _row(job: Job, data: Mapping[str, Any], record: RunRecord) -> dict[str, Any]:
    """Keep the numbers of one stack that the page shows, at a precision that the tables do not reach."""
    effects = {key: value for key, value in data["effects"].items() if key not in ("methods", "idle")}
    counters = {
        key: {name: amount for name, amount in own.items() if amount} for key, own in data["effects"]["methods"].items()
    }
    return {
        "methods": {key: dict(values) for key, values in job.values.items()},
        "stack": list(job.run.methods),
        "metrics": {name: _short(data["metrics"][name]["value"]) for name in SHOWN},
        "differences": {
            name: {
                key: _short(data["differences"][name][key])
                for key in ("value", "low", "high", "p", "p_holm")
                if key in data["differences"][name]
            }
            for name in SHOWN
            if name in data["differences"]
        },
        "mcnemar": data["mcnemar"] and _short(data["mcnemar"]["p"]),
        "effects": {key: _short(value) for key, value in effects.items()},
        "counters": {key: {name: _short(value) for name, value in own.items()} for key, own in counters.items()},
        "idle": data["effects"]["idle"],
        "ms_per_token": _short(data["cost"]["ms_per_token"]),
        "overhead": _short(data["cost"]["overhead"]),
        "commit": str(record.git.get("sha", ""))[:9],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------------- the rule


def difference(row: Row, metric: str) -> float:
    """Return the difference to no method; 0 for no method itself."""
    return float(row["differences"][metric]["value"]) if row["differences"] else 0.0


def admissible(row: Row) -> bool:
    """Say whether neither recall nor mean POPE F1 falls by more than a point."""
    return all(difference(row, metric) >= lowest - 1e-9 for metric, lowest in KEPT.items())


def values_of(row: Row, method: str) -> Values:
    values: Values = row["methods"][method]
    return values


def rows_of(step: Mapping[str, Any], method: str) -> list[Row]:
    """Return the rows of one method alone."""
    return [row for row in step["rows"].values() if list(row["methods"]) == [method] == row["stack"]]


def candidates_of(rows: Iterable[Row], method: str) -> list[Values]:
    """Return the admissible settings with the lowest CHAIR_i, at most three, the lowest first."""
    allowed = sorted((row for row in rows if admissible(row)), key=lambda row: float(row["metrics"][TARGET]))
    return [values_of(row, method) for row in allowed[:CANDIDATES]]


def best_of(rows: Iterable[Row], method: str, default: Values) -> Values:
    """Return the admissible setting with the lowest CHAIR_i, the default at a tie or if none is admissible."""
    allowed = [row for row in rows if admissible(row)]
    if not allowed:
        return default
    lowest = min(row["metrics"][TARGET] for row in allowed)
    tied = [values_of(row, method) for row in allowed if row["metrics"][TARGET] <= lowest + 1e-9]
    return default if default in tied else tied[0]


def beats_none(row: Row) -> bool:
    """Say whether the paired 95 % interval of CHAIR_i lies below zero."""
    return bool(row["differences"]) and row["differences"][TARGET]["high"] < 0


def choose(confirmation: Mapping[str, Any], method: str, default: Values) -> Values:
    """Return what the rule makes of the confirmation: another setting must earn its place, unless the default harms."""
    rows = rows_of(confirmation, method)
    harmless = any(values_of(row, method) == default and admissible(row) for row in rows)
    if harmless:
        rows = [row for row in rows if values_of(row, method) == default or beats_none(row)]
    return best_of(rows, method, default)


# ---------------------------------------------------------------------------------------------------------------- steps


def refused_of(confirmation: Mapping[str, Any], defaults: Mapping[str, Values]) -> dict[str, Values]:
    """Return method -> the setting with the lowest CHAIR_i among those the rule refuses although they beat no method.

    They cost more recall or POPE F1 than the rule allows; the test shows them beside the defaults, to be seen.
    """
    found = {}
    for method, default in defaults.items():
        rows = [row for row in rows_of(confirmation, method) if beats_none(row) and not admissible(row)]
        rows = [row for row in rows if values_of(row, method) != default]
        if rows:
            found[method] = values_of(min(rows, key=lambda row: float(row["metrics"][TARGET])), method)
    return found


def run_steps(plan: Plan, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the steps that are asked for and write results.json after each."""
    folder = Path(arguments.folder)
    defaults = {method: plan.default(method) for method in plan.grids}
    results: dict[str, Any] = {"format": 1, "grids": to_json(plan.grids), "defaults": to_json(defaults)}
    limits = {"grid": plan.limit, "confirmation": arguments.scenes, "test": arguments.scenes}
    for step in STEPS[: STEPS.index(arguments.stop_after) + 1]:
        common = ["tracker=none", f"benchmark.split={'test' if step == 'test' else 'validation'}"]
        common += [] if limits[step] is None else [f"benchmark.limit={limits[step]}"]
        if step == "grid":
            jobs = grid_jobs(plan, common)
        elif step == "confirmation":
            best = {method: candidates_of(rows_of(results["grid"], method), method) for method in defaults}
            jobs = confirmation_jobs(plan, best, common)
        else:
            chosen = {method: choose(results["confirmation"], method, defaults[method]) for method in defaults}
            jobs = test_jobs(plan, chosen, refused_of(results["confirmation"], defaults), common)
        results[step] = to_json(execute(jobs, folder / step, console))
        if step != "test":  # the page shows counters of the test only
            for row in results[step]["rows"].values():
                del row["counters"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def say_chosen(results: Mapping[str, Any], console: Console) -> None:
    """Print what conf/model/testbed.yaml should hold."""
    console.print("tuned:  # for conf/model/testbed.yaml; methods that are not listed keep their defaults")
    for method, default in results["defaults"].items():
        chosen = choose(results["confirmation"], method, default)
        for key, value in chosen.items() if chosen != default else ():
            if value != default[key]:
                console.print(f"  {method}: {key}: {value}", highlight=False)


# --------------------------------------------------------------------------------------------------------------- optuna


def optuna_search(plan: Plan, method: str, trials: int, folder: Path, console: Console) -> dict[str, Any]:
    """Search the ranges of the grid with TPE; seeded, so that the same command replays the same trials.

    Numbers are drawn between the smallest and the largest value of the grid, everything else from its list. A setting
    that is not admissible counts by how far it fails, above every admissible one.
    """
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    common = ["tracker=none", "benchmark.split=validation", f"benchmark.limit={plan.limit}"]
    none = Job("none", {}, compose_run(common))
    tried: dict[str, Row] = {}

    def objective(trial: Any) -> float:
        values = {key: suggest(trial, key, options) for key, options in plan.grids[method].items()}
        run = compose_run([*common, f"methods=[{method}]", *given({method: values})])
        job = Job(label_of(method, values), {method: values}, run)
        row = execute([none, job], folder, Console(quiet=True))["rows"][job.label]
        tried[job.label] = row
        console.print(f"trial {trial.number + 1}/{trials}: {job.label}: {TARGET} {100 * row['metrics'][TARGET]:.2f}")
        lacking = sum(max(0.0, lowest - difference(row, metric)) for metric, lowest in KEPT.items())
        return float(row["metrics"][TARGET]) + (1.0 + lacking if lacking else 0.0)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial(plan.default(method))
    study.optimize(objective, n_trials=trials)
    best = best_of(tried.values(), method, plan.default(method))
    console.print(f"best by the rule, on {plan.limit} validation scenes: {label_of(method, best)}", highlight=False)
    return {"best": best, "trials": list(tried)}


def suggest(trial: Any, key: str, options: Sequence[Any]) -> Any:
    """Draw one value: a number between the extremes of the list, or one of the list."""
    if all(isinstance(option, int) and not isinstance(option, bool) for option in options):
        return trial.suggest_int(key, min(options), max(options))
    if all(isinstance(option, float) for option in options):
        return trial.suggest_float(key, min(options), max(options), step=0.01)
    return trial.suggest_categorical(key, list(options))


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MitigateError("--optuna needs Optuna, which is not installed: pip install 'mitigate[optuna]'") from error
    return optuna


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="sweep these methods only")
    parser.add_argument("--limit", type=int, help="scenes per setting of the grid, instead of the file's")
    parser.add_argument("--scenes", type=int, help="scenes of the later steps, instead of all")
    parser.add_argument("--stop-after", choices=STEPS, default="test")
    parser.add_argument("--folder", default=str(FOLDER), help="where records and results.json go")
    parser.add_argument("--optuna", type=int, metavar="N", help="N trials of TPE per method instead of the three steps")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        plan = Plan.read()
        if unknown := sorted({*(arguments.only or ())} - {*plan.grids}):
            raise MitigateError(f"--only {unknown[0]}: not in {PLAN.name}; it has: {', '.join(plan.grids)}")
        plan = Plan(arguments.limit or plan.limit, {m: plan.grids[m] for m in arguments.only or plan.grids})
        if arguments.optuna is not None:
            import_optuna()
            for method in plan.grids:
                optuna_search(plan, method, arguments.optuna, Path(arguments.folder) / f"optuna-{method}", console)
            return 0
        results = run_steps(plan, arguments, console)
    except MitigateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "confirmation" in results:
        say_chosen(results, console)
    console.print(f"Results: {Path(arguments.folder) / 'results.json'}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
