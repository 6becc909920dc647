"""Trials of a W&B sweep: started as its agent starts them, they are the agent's run and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mitigate.benchmarks.base import Benchmark
from mitigate.compose import ResolvedRun, compose_comparison, compose_run
from mitigate.errors import ConfigError
from mitigate.registry import trackers
from mitigate.runner.stored import find_runs
from mitigate.runner.tracking import flat_numbers, track
from tests.trackers.conftest import WANDB, TrackedComparison
from tests.trackers.reading import read_run

SWEEPS = sorted((Path(__file__).parents[2] / "conf" / "sweep").glob("*.yaml"))


def command_of(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return the words of a trial's command, made by W&B's own code."""
    from wandb.sdk.launch.sweeps import utils

    made = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words = []
    for part in utils.create_sweep_command(list(sweep["command"])):
        words += made[part[2:-1]] if part.startswith("${") else [part]
    return words


@pytest.mark.parametrize("end", ["min", "max"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_trials_of_a_shipped_sweep_compose_and_measure_what_it_optimises(path: Path, end: str) -> None:
    sweep = yaml.safe_load(path.read_text())
    values = {
        key: asked["value"] if "value" in asked else asked[end] if end in asked else asked["values"][0]
        for key, asked in sweep["parameters"].items()
    }
    program, command, *overrides = command_of(sweep, values)
    assert program == "mitigate"
    runs: list[ResolvedRun] = [compose_run(overrides)] if command == "run" else compose_comparison(overrides)
    config = runs[-1].config
    assert (config["tracker"]["name"], config["tracker"]["mode"]) == ("wandb", None)
    benchmark: Benchmark = runs[-1].benchmark
    assert sweep["metric"]["name"].removeprefix("difference/") in {metric.name for metric in benchmark.all_metrics()}
    swept = {key: value for key, value in values.items() if key.startswith("methods.")}
    for key, value in swept.items():
        _, method, parameter = key.split(".")
        assert config["methods"][method][parameter] == value


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand where the agent of a sweep starts a trial; returns its folder."""
    import wandb

    parameters = tmp_path / "config-trial0001.yaml"
    parameters.write_text("wandb_version: 1\nmethods.turn.period:\n  value: 2\n")
    for name, value in {
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "trial0001",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
        "WANDB_PROJECT": "swept",
        "WANDB_ENTITY": "team",
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # W&B reads the environment once
    yield tmp_path
    monkeypatch.undo()
    wandb.teardown()


def test_a_trial_is_the_agents_run_and_holds_what_is_optimised(tracked: TrackedComparison, agent: Path) -> None:
    runs = find_runs([tracked.directory])
    tracker = trackers().get("wandb")({**WANDB, "mode": None}, tracked.directory)
    before = (tracked.directory / "tracked.json").read_bytes()
    try:
        done = track(tracker, tracked.data, runs, tracked.directory)
        again = track(tracker, tracked.data, runs, tracked.directory)
    finally:
        (tracked.directory / "tracked.json").write_bytes(before)
    assert done.complete
    assert again.lines == []
    (folder,) = (agent / "wandb").glob("offline-run-*")
    logged = read_run(folder)
    assert (logged.run.run_id, logged.run.sweep_id) == ("trial0001", "sweep123")
    assert (logged.run.project, logged.run.entity) == ("swept", "team")
    expected = flat_numbers(tracked.data, "idle")  # the last stack of the comparison
    assert {key: logged.history[key] for key in expected} == expected == logged.numbers
    assert "difference/chair_i" in expected
    assert logged.config["methods.turn.period"] == 2
    assert logged.config["stack"] == "idle"
    assert {item.type for item in logged.artifacts.values()} == {"run_table", "records", "report"}


def test_a_trial_that_would_stay_offline_is_refused(agent: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)sweep123.*tracker\.mode=offline.*tracker=wandb"):
        trackers().get("wandb")(WANDB, agent)
