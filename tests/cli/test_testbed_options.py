from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from mitigate.cli import main
from mitigate.cli.testbed import read_dataclass
from mitigate.errors import ConfigError


@dataclass(frozen=True)
class Training:
    """Options.

    Attributes
    ----------
    steps
        How long.
    """

    steps: int = 10
    lr: float = 1e-3
    output: str = "runs/x"
    split: Literal["test", "train"] = "test"
    resume: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, but is {self.steps}")


def test_values_are_typed() -> None:
    read = read_dataclass(Training, ["steps=3", "lr=1", "output=a/b c", "split=train", "resume=false"])
    assert read == Training(steps=3, lr=1.0, output="a/b c", split="train", resume=False)
    assert type(read.lr) is float
    assert read_dataclass(Training, []) == Training()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=3", "unknown option 'stepz'; did you mean 'steps'"),
        ("steps", "'steps' is no option; write KEY=VALUE"),
        ("steps=many", "steps=many has the wrong type: steps is int"),
        ("steps=1.5", "steps is int"),
        ("steps=1,2", "several values"),
        ("steps=[1", "cannot read"),
        ("steps=0", "steps must be at least 1"),
    ],
)
def test_wrong_options(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_dataclass(Training, [argument])


@pytest.fixture
def fake_actions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for training and evaluation, and what they return or raise."""
    behaviour: dict[str, Any] = {"result": Path("runs/x/checkpoint")}

    def act(config: Training) -> Any:
        behaviour["config"] = config
        if "error" in behaviour:
            raise behaviour["error"]
        return behaviour["result"]

    module = SimpleNamespace(Training=Training, act=act, shortfalls=lambda report: ["recall is too low"])
    monkeypatch.setattr("mitigate.cli.testbed.ACTIONS", {"train": ("fake", "Training", "act")})
    monkeypatch.setattr("mitigate.cli.testbed.importlib.import_module", lambda name: module)
    return behaviour


def test_training_gets_its_options(fake_actions: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from mitigate.cli.testbed import testbed

    assert testbed(["train", "steps=3"], Console(width=100)) == 0
    assert fake_actions["config"] == Training(steps=3)
    assert "Checkpoint: runs/x/checkpoint" in capsys.readouterr().out
    fake_actions["result"] = {"recall": 0.1}
    assert testbed(["train"], Console(width=100)) == 0
    assert "missed: recall is too low" in capsys.readouterr().out
    assert testbed(["train", "--help"], Console(width=100)) == 0
    assert "How long." in capsys.readouterr().out


def test_a_folder_of_another_run_is_the_users_problem(fake_actions: dict[str, Any]) -> None:
    from rich.console import Console

    from mitigate.cli.testbed import testbed

    fake_actions["error"] = FileExistsError("runs/x holds a run with other options")
    with pytest.raises(ConfigError, match="holds a run with other options"):
        testbed(["train"], Console())


def test_the_real_options_are_checked_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["testbed", "train", "sed=1"]) == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert main(["testbed", "evaluate", "images=none"]) == 2
    assert "images is int" in capsys.readouterr().err
