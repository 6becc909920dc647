"""Several processes share a run: the records of one process, one voice, no hanging, and no trace of who did what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mitigate import processes
from mitigate.errors import ConfigError
from mitigate.runner.devices import place, target
from mitigate.runner.processes import settings
from tests.forking import FORKED, Forks

ROOT = Path(__file__).parents[2]
ONE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


def _environment() -> dict[str, str]:
    told = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if key not in told and not key.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.runner.ranks", str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@FORKED
@pytest.mark.parametrize(
    ("name", "world", "files"), [("batches of 4", 2, 2), ("batch of all", 3, 2), ("sampling", 2, 2)]
)
def test_processes_write_the_records_of_one(seen: dict[str, Any], name: str, world: int, files: int) -> None:
    one, several = (seen["same"][f"{name}, {number}"] for number in (1, world))
    assert several["codes"] == [0] * world, several["said"]
    assert (one["files"], several["files"]) == (1, files)  # three processes and two batches: one had nothing to do
    assert len(one["lines"]) == 24
    assert several["lines"] == one["lines"]
    assert "finished 24 0" in several["said"][0]
    assert several["said"][1:] == [""] * (world - 1)


def answers(case: dict[str, Any]) -> list[tuple[str, str]]:
    return [(record["id"], record["text"]) for record in map(json.loads, case["lines"])]


CODES = {
    "broken 1": ([2, 0], "error: the disk is gone\n"),
    "odd 1": ([1, 0], "RuntimeError: process 1 on "),
    "killed 1": ([2, -9], "error: another process of this run has ended unexpectedly"),
    "interrupted 1": ([2, 130], "error: another process of this run has ended unexpectedly"),
    "killed 0": ([-9, 1], ""),
}


@FORKED
@pytest.mark.parametrize("name", CODES)
def test_a_process_that_fails_ends_all_and_another_number_goes_on(seen: dict[str, Any], name: str) -> None:
    """The first process says why, once; nobody waits for ever; one process or three complete what two began."""
    case = seen["failing"][name]
    codes, said = CODES[name]
    assert case["codes"] == codes, case["said"]
    assert said in case["said"][0]
    assert case["said"][1] == ""
    assert "no such thing" in case["said"][0] or name != "odd 1"
    assert 0 < len(case["kept"]) < len(case["lines"])
    if name == "broken 1":  # half of them are the first one's, which has not gone on to its end
        assert len(case["kept"]) < len(case["lines"]) / 2
    assert set(case["again"]["codes"]) == {0}, case["again"]["said"]
    assert set(case["kept"]) <= set(case["lines"])
    assert answers(case) == answers(seen["same"]["batches of 4, 1"])
    assert case["left"] == []


@FORKED
def test_a_sample_that_fails_in_one_process_is_skipped_there_alone(seen: dict[str, Any]) -> None:
    one, two = (seen["skipping"][world] for world in ("1", "2"))
    assert two["codes"] == [0, 0], two["said"]
    assert two["lines"] == one["lines"]
    failed = [record["id"] for record in map(json.loads, two["lines"]) if record["error"]]
    assert failed == ["img-3/caption"]
    assert "finished 24 1" in two["said"][0]


@FORKED
def test_a_comparison_of_several_processes_has_one_table(seen: dict[str, Any]) -> None:
    case = seen["comparing"]
    assert case["codes"] == [0, 0], case["said"]
    assert case["there"]
    assert "POPE" in case["said"][0]
    assert case["said"][1] == ""


@FORKED
def test_processes_that_a_scheduler_has_started(seen: dict[str, Any]) -> None:
    one, two = (seen["slurm"][name] for name in ("one", "two"))
    assert (one["codes"], two["codes"]) == ([0], [0, 0]), one["said"] + two["said"]
    assert two["said"][1] == ""
    assert len(one["lines"]) == 24
    assert two["lines"] == one["lines"]


@FORKED
def test_other_processes_than_were_asked_for_are_refused_once(seen: dict[str, Any]) -> None:
    case = seen["slurm"]["wrong"]
    assert case["codes"] == [2, 2]
    assert "trainer.devices=1" in case["said"][0]
    assert "--ntasks-per-node=2" in case["said"][0]
    assert case["said"][1] == ""


@pytest.mark.parametrize(
    ("told", "device"),
    [({}, "cuda:0"), ({"LOCAL_RANK": "2", "RANK": "6"}, "cuda:2"), ({"SLURM_LOCALID": "3"}, "cuda:3")],
)
def test_every_process_of_a_machine_has_a_gpu_of_its_own(
    alone: None, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], device: str
) -> None:
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert target("auto") == target("gpu") == device
    assert target("cpu") == "cpu"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in set(os.environ) - set(_environment()):
        monkeypatch.delenv(key)


@pytest.mark.parametrize(
    ("told", "first", "speaks"),
    [
        ({}, True, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False, True),  # started by the first one, for which all was right
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False, True),  # another machine may have other troubles
        ({"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}, False, False),
        ({"RANK": "4", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False, True),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True, True),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, False, False),
        ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, False, True),
    ],
)
def test_who_is_first_and_who_speaks(
    alone: None, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], first: bool, speaks: bool
) -> None:
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    assert (processes.is_first_process(), processes.speaks()) == (first, speaks)


def test_a_job_without_srun_is_refused_instead_of_waiting(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    with pytest.raises(ConfigError, match="put srun before the command"):
        settings({**ONE, "devices": 2})
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    (environment,) = settings({**ONE, "devices": 2})["plugins"]
    assert environment.auto_requeue is False


@pytest.mark.parametrize(("devices", "nodes", "started"), [(1, 1, "2"), (4, 1, "2"), (2, 2, "2"), (2, 1, "1")])
def test_other_processes_of_torchrun_are_refused_instead_of_writing_into_one_file(
    alone: None, monkeypatch: pytest.MonkeyPatch, devices: int, nodes: int, started: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError, match=rf"trainer\.devices={devices} .* but WORLD_SIZE={started} processes"):
        settings({**ONE, "devices": devices, "num_nodes": nodes})
    monkeypatch.setenv("WORLD_SIZE", str(devices * nodes))
    settings({**ONE, "devices": devices, "num_nodes": nodes})


def test_torchrun_inside_a_job_counts_its_own_processes(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job"}
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    assert "plugins" not in settings({**ONE, "devices": 2})


def test_several_machines_without_a_launcher_are_refused_instead_of_waiting(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2.*srun or torchrun"):
        settings({**ONE, "num_nodes": 2})


@pytest.mark.parametrize("changes", [{"strategy": "ddp"}, {"devices": 2}, {"devices": -1}, {"num_nodes": 2}])
def test_several_processes_need_no_gpus_to_talk(
    alone: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    assert settings(ONE)["strategy"] == "auto"
    assert settings({**ONE, **changes})["strategy"].process_group_backend == "gloo"


def test_a_model_that_is_moved_in_inference_mode_can_still_enter_a_graph() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        place(model, torch.device("meta"))
    assert model.weight.is_meta
    assert not model.weight.is_inference()


@pytest.mark.slow
@FORKED
def test_the_command_line_with_two_processes(tmp_path: Path, forks: Forks) -> None:
    """Lightning starts the second process itself, with the command of the first one."""
    from tests.runner.ranks import lines

    settings = ["benchmark.limit=2", "decoding.max_new_tokens=8", "trainer.batch_size=4", "tracker=none"]
    words = ["compare", "stacks=[none,scr]", *settings, f"runs_dir={tmp_path}", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "mitigate", *words, "name=two", "trainer=ddp", "trainer.devices=2"]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = forks.run("mitigate", *words, "name=one", folder=tmp_path)
    assert done.stdout.count("Report:") == said.count("Report:") == 1
    one, two = (
        [line for stack in ("none", "scr") for line in lines(tmp_path / name / stack)] for name in ("one", "two")
    )
    assert two == one
    assert len(list((tmp_path / "two" / "scr").glob("samples.rank*.jsonl"))) == 2
