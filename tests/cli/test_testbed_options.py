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

    def check_files(self) -> None:
        """Nothing to check."""


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
    monkeypatch.setattr("mitigate.cli.testbed.ACTIONS", {"train": ("fake:Training", "fake:act")})
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


WIDE = ("width=100", "width=100 must be a multiple of 16")


@pytest.mark.parametrize(
    ("action", "argument", "message"),
    [
        ("evaluate", "split=tset", "split=tset is none of train, validation, test"),
        ("evaluate", "batch_size=0", "batch_size=0 must be at least 1"),
        ("evaluate", "checkpoint=nowhere", "checkpoint=nowhere has no config.json; name a folder"),
        ("evaluate", "checkpoint=text", "checkpoint=text holds a llama model"),
        ("evaluate", "checkpoint=broken", "checkpoint=broken: config.json is damaged"),
        ("evaluate", "card=file/card.md", "card=file/card.md cannot be written"),
        ("evaluate", "card=text", "card=text is a folder"),
        ("train", "look_steps=-1", "look_steps=-1 must be 0 or more"),
        ("train", "read_lr=0", "read_lr=0.0 must be a number above 0"),
        ("train", "text_layers=0", "text_layers=0 must be at least 2"),
        ("train", "vision_layers=0", "vision_layers=0 must be at least 1"),
        ("train", *WIDE),
        ("train", "accelerator=foo", "accelerator=foo must be one of auto, cpu"),
        ("train", "accelerator=cuda", "accelerator=cuda: torch sees no such device"),
        ("train", "look_precision=foo", "look_precision=foo must be one of 32-true"),
        ("train", "seed=-1", "seed=-1 must be at least 0"),
        ("train", "output=file", "output=file is a file; choose a folder"),
        ("train", "output=file/below", "output=file/below cannot be written"),
    ],
)
def test_real_values_are_checked_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    action: str,
    argument: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("file").touch()
    for folder, config in (("text", '{"model_type": "llama"}'), ("broken", "{")):
        Path(folder).mkdir()
        for name in ("model.safetensors", "probe.safetensors"):
            (Path(folder) / name).touch()
        (Path(folder) / "config.json").write_text(config)
    before = sorted(tmp_path.rglob("*"))
    assert main(["testbed", action, argument]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from mitigate.testbed.model import checkpoint_path

    folder = shutil.copytree(checkpoint_path(), tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert main(["testbed", "evaluate", f"checkpoint={folder}"]) == 2
    err = capsys.readouterr().err
    assert "cannot be measured: the probe in" in err
    assert len(err.splitlines()) == 1


def test_the_real_options_are_checked_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["testbed", "train", "sed=1"]) == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert main(["testbed", "evaluate", "images=none"]) == 2
    assert "images is int" in capsys.readouterr().err
