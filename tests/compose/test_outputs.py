"""What `list` and `plan` say about fidelity; lists of stacks; models that no adapter serves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mitigate.cli import main
from mitigate.compose import compose_comparison
from mitigate.core import Fidelity
from mitigate.errors import ConfigError
from tests.toys import Toy

pytestmark = pytest.mark.usefixtures("toys")


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "preset_fidelity", {"lineage": Fidelity.RECONSTRUCTED})


@pytest.mark.usefixtures("graded")
def test_list_names_the_presets_with_another_fidelity(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(outcome(capsys, "list", "methods", "--json")[1])}
    assert rows["toy"]["fidelity"] == Toy.fidelity.value
    assert rows["toy"]["preset_fidelity"] == {"paper": Toy.fidelity.value, "lineage": "reconstructed"}
    assert rows["chooser"]["preset_fidelity"] == {"paper": rows["chooser"]["fidelity"]}
    assert "lineage: reconstructed" in outcome(capsys, "list", "methods")[1]


@pytest.mark.usefixtures("graded")
def test_plan_shows_the_fidelity_of_the_chosen_preset(capsys: pytest.CaptureFixture[str]) -> None:
    own = Toy.fidelity.value
    out = outcome(capsys, "plan", "methods=[toy]")[1]
    assert f"Fidelity   toy: {own} (preset paper)\n" in out
    out = outcome(capsys, "plan", "methods=[toy]", "methods.toy.preset=lineage", "methods.toy.window=7")[1]
    assert "Fidelity   toy: reconstructed (preset lineage); from command line: window\n" in out
    found = json.loads(outcome(capsys, "plan", "--json", "methods=[toy]", "methods.toy.preset=lineage")[1])
    assert found["fidelity"] == {"toy": "reconstructed"}


def test_plan_of_values_tuned_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    out = outcome(capsys, "plan", "model=qwen2-vl-7b", "methods=[locore,sgrs]")[1]
    assert "Fidelity   locore: paper (preset paper); from model qwen2-vl-7b: beta\n" in out
    assert "qwen2_vl, 28 layers, 28 heads, 4 key/value heads" in out
    rows = [[cell.strip() for cell in line.split("│")][1:4] for line in out.splitlines() if line.startswith("│")]
    assert ["methods.locore.beta", "0.2", "model qwen2-vl-7b"] in rows
    assert ["methods.sgrs.alpha", "0.6", "default"] in rows
    assert any(row[0] == "attention_probs" and row[1:] == ["sgrs", "5-7"] for row in rows)


@pytest.mark.parametrize(
    "argv", [["run"], ["run", "-m", "seed=0,1"], ["compare", "stacks=[none,toy]"]], ids=lambda argv: " ".join(argv)
)
def test_a_model_without_an_adapter_is_refused_before_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mitigate.compose.checks.adapters", lambda: SimpleNamespace(names=lambda: ["llava"]))
    code, _, err = outcome(capsys, *argv, "model=qwen-vl-7b")
    assert code == 2
    assert "model=qwen-vl-7b is of family qwen, which cannot be run yet" in err
    assert "served: llava." in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_takes_stack_for_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    short, plain = (compose_comparison([f"{key}=[none,toy,chooser+toy]"]) for key in ("stack", "stacks"))
    assert [run.stack_name for run in short] == ["none", "toy", "chooser+toy"]
    assert [run.config for run in short] == [run.config for run in plain]
    plans = json.loads(outcome(capsys, "plan", "--json", "stack=[none, toy]")[1])
    assert [plan["stack"] for plan in plans] == ["none", "toy"]


@pytest.mark.parametrize(
    "twice",
    [
        ["stack=[none,toy]", "stacks=[none]"],
        ["stacks=[none]", "stack=[none,toy]"],
        ["stacks=[none]", "stacks=[none,toy]"],
        ["stack=[none]", "stack=[toy]"],
    ],
    ids=" ".join,
)
def test_stacks_given_twice(twice: list[str]) -> None:
    with pytest.raises(ConfigError, match="a comparison takes one list of stacks; drop one of the two") as caught:
        compose_comparison(twice)
    assert str(caught.value).startswith(" and ".join(twice))


def test_a_run_takes_no_list_of_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "run", "stack=[none,toy]")
    assert (code, "a run has one stack; `mitigate compare` takes a list of them" in err) == (2, True)
