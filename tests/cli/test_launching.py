"""The jobs of a sweep, handed to a launcher of Hydra: the folders of the sweep, and nothing started by a dry run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mitigate.cli import main
from mitigate.cli.launching import job_command

SWEEP = ["-m", "stack=none,scr", "tracker=none", "benchmark.limit=2"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[3:])
        return SimpleNamespace(returncode=int("stack=scr" in command and "seed=1" in command))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    return commands


def test_every_job_is_a_command_of_its_own(started: list[list[str]], tmp_path: Path) -> None:
    assert main(["run", *SWEEP, "name=s", "hydra/launcher=basic"]) == 0
    assert [command[0] for command in started] == ["run", "run"]
    for stack, command in zip(("none", "scr"), started, strict=True):
        assert [token for token in command if token.startswith("stack=")] == [f"stack={stack}"]
        assert "hydra/launcher=basic" not in command
        assert f'runs_dir="{tmp_path}/runs/s"' in command  # where the sweep would have put it
        assert sum(token.startswith("name=") for token in command) == 1
        assert any(token.startswith(f'name="{stack}-') for token in command)


def test_a_job_that_fails_is_told(started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SWEEP[:1], "stack=scr,none", *SWEEP[2:], "seed=1", "hydra/launcher=basic"]) == 1
    out = capsys.readouterr().out
    assert re.search("Job 1 failed: .* stack=scr .* ended with exit code 1\nThe same command runs what is missing", out)
    assert "Job 2" not in out
    assert len(started) == 2  # the others are not given up


def test_a_dry_run_starts_nothing_and_looks_for_no_device(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["stacks=[none,scr]", "seed=0,1", "tracker=none", "benchmark.limit=2", "trainer=slurm"]
    assert main(["compare", "-m", *arguments, "hydra/launcher=basic", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher" in out
    commands = [line for line in out.splitlines() if line.startswith("mitigate compare")]
    assert [f"seed={seed}" in command for seed, command in enumerate(commands)] == [True, True]
    assert started == []
    assert list(tmp_path.iterdir()) == []


def test_one_job_can_be_launched(started: list[list[str]]) -> None:
    assert main(["run", "-m", "stack=scr", "tracker=none", "hydra/launcher=basic"]) == 0
    assert len(started) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra/launcher=basic"], "add -m, also for a single job"),
        (["-m", "seed=0,1", "hydra.launcher.partition=gpu"], "name the launcher, too"),
        (["-m", "seed=0,1", "hydra/launcher=submitit_slurmm"], "pip install 'mitigate[slurm]'"),
        (["-m", "seed=0,1", "hydra/launcher=basic", "hydra.launcher.partition=gpu"], "prints all settings"),
        (["--dry-run"], "add -m hydra/launcher=NAME"),
    ],
)
def test_a_wrong_launcher_is_refused(
    started: list[list[str]], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tracker=none", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.strip().splitlines()) <= 2
    assert started == []


def test_a_jobs_folder_replaces_what_was_asked_for(tmp_path: Path) -> None:
    command = job_command("run", ["seed=1", "name=s", "runs_dir=x"], tmp_path / "s" / "a+b")
    assert command == ["run", "seed=1", f'runs_dir="{tmp_path}/s"', 'name="a+b"']
