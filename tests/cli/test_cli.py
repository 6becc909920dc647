from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mitigate.metrics
import mitigate.runner
from mitigate import __version__
from mitigate.cli import main
from mitigate.errors import DataError, HookError
from mitigate.metrics.base import Interval
from mitigate.records import RunRecord
from mitigate.registry import methods

pytestmark = pytest.mark.usefixtures("toys")

UNDEFINED = Interval(nan, nan, nan)


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any, Path]]:
    """What the runner was asked to do; nothing is really run."""
    calls: list[tuple[str, Any, Path]] = []

    def run(resolved: Any, run_dir: Path, *, console: Any) -> RunRecord:
        calls.append(("run", resolved, run_dir))
        metrics = {
            "length": Interval(8.25, 7, 9),
            "chair_s": Interval(0.5, 0.25, 1),
            "chair_i": Interval(nan, nan, nan),
        }
        return RunRecord(status="finished", stack=resolved.stack_name, samples=1200, failures=3, metrics=metrics)

    def compare(resolved: Any, directory: Path, *, console: Any, command: str) -> None:
        calls.append(("compare", resolved, directory))

    monkeypatch.setattr(mitigate.runner, "run", run, raising=False)
    monkeypatch.setattr(mitigate.runner, "compare", compare, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["--verson"], "unknown option '--verson'"),
        (["run", "--multi"], "mitigate run has no option '--multi'; did you mean '--multirun'?"),
        (["run", "--cfg", "all"], "only `--cfg job`"),
        (["run", "--json"], "has no option '--json'"),
        (["plan", "-m"], "mitigate plan has no option '-m'"),
        (["run", "methods=toy"], "methods is a list"),
        (["run", "model=nothing"], "model=nothing is unknown"),
        (["run", "-m", "seed=0,x"], "seed is int"),
        (["compare", "stacks=[none,tox]"], "did you mean 'toy'?"),
        (["compare", "-m", "stacks=[none],[none,tox]"], "did you mean 'toy'?"),
        (["plan", "methods=[tox]"], "did you mean 'toy'?"),
        (["list", "method"], "cannot list 'method'; did you mean 'methods'?"),
        (["testbed", "trian"], "did you mean 'train'?"),
        (["run", "-m", "seed=1,1"], "repeats job 1"),
        (["run", "trainer=gpu"], "trainer.accelerator=gpu: torch sees no such device"),
        (["compare", "trainer.accelerator=cuda"], "trainer.accelerator=cuda: torch sees no such device"),
    ],
)
def test_wrong_input_is_one_or_two_lines_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], started: list[Any], tmp_path: Path, argv: list[str], message: str
) -> None:
    code, out, err = outcome(capsys, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert 1 <= len(err.splitlines()) <= 2
    assert started == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["trace", "testbed:test-0", "What is there?"], ["diagnose", "entropy"]])
def test_a_model_without_an_adapter_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(capsys, *command, "model=qwen-vl-7b", "stack=locore")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "model=qwen-vl-7b is of family qwen, which cannot be run yet" in err
    assert list(tmp_path.iterdir()) == []


def test_a_text_model_is_told_from_a_family_that_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = outcome(capsys, "run", "model=hf", f"model.path={tmp_path}")
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert "model=hf is of family llama, which transformers does not load" in err


def test_a_warning_shows_no_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def warn(*_: Any) -> int:
        shown.append(warnings.formatwarning("mind this", UserWarning, "code.py", 3))
        return 0

    monkeypatch.setattr("mitigate.cli._dispatch", warn)
    assert outcome(capsys, "list")[0] == 0
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process that repeats what the first one says
    assert outcome(capsys, "list")[0] == 0
    assert shown == ["warning: mind this\n", ""]
    assert "code.py:3" in warnings.formatwarning("mind this", UserWarning, "code.py", 3)


def test_run_starts_the_resolved_run_in_its_folder(capsys: pytest.CaptureFixture[str], started: list[Any]) -> None:
    code, out, err = outcome(capsys, "run", "methods=[toy]", "methods.toy.beta=1", "runs_dir=here")
    assert (code, err) == (0, "")
    ((kind, resolved, folder),) = started
    assert kind == "run"
    assert resolved.config["methods"]["toy"]["beta"] == 1.0
    assert folder == Path("here") / resolved.run_name
    assert str(folder / "record.json") in out
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["CHAIR_s", "50.00 %", "25.00 to 100.00"],
        ["CHAIR_i", "–", ""],  # nothing to measure: no object was named
        ["Length", "8.25 words", "7.00 to 9.00"],
    ]
    assert "toy: 1,200 samples of testbed, of which 3 failed" in " ".join(out.split())


def test_a_sweep_gives_every_job_its_folder(capsys: pytest.CaptureFixture[str], started: list[Any]) -> None:
    assert outcome(capsys, "run", "-m", "methods=[toy],[]", "seed=0,1", "name=mine")[0] == 0
    assert len({folder for _, _, folder in started}) == 4
    assert {folder.parent for _, _, folder in started} == {Path("runs") / "mine"}


def test_a_sweep_of_comparisons_gives_every_job_its_folder(
    capsys: pytest.CaptureFixture[str], started: list[Any]
) -> None:
    assert outcome(capsys, "compare", "-m", "stacks=[none,toy],[none,chooser]", "name=mine")[0] == 0
    assert len({folder for _, _, folder in started}) == 2
    assert {folder.parent for _, _, folder in started} == {Path("runs") / "mine"}


@pytest.mark.parametrize("command", [["run", "stack=none"], ["compare", "stacks=[none]"]])
def test_a_folder_of_another_run_stops_a_sweep_before_its_first_job(
    capsys: pytest.CaptureFixture[str], started: list[Any], command: list[str]
) -> None:
    sweep = [command[0], "-m", *command[1:], "seed=0,1"]
    assert outcome(capsys, *sweep)[0] == 0
    last = started[-1][2] / ("none" if command[0] == "compare" else "")
    last.mkdir(parents=True)
    (last / "config.json").write_text('{"config": {"seed": 7}}')
    started.clear()
    code, out, err = outcome(capsys, *sweep)
    assert (code, out, started) == (2, "", [])
    assert f"{last} holds another run" in err


def test_compare_hands_over_all_stacks_and_says_what_it_added(
    capsys: pytest.CaptureFixture[str], started: list[Any]
) -> None:
    code, out, _ = outcome(capsys, "compare", "stacks=[toy]", "benchmark.limit=2")
    assert code == 0
    ((kind, resolved, folder),) = started
    assert kind == "compare"
    assert [run.stack_name for run in resolved] == ["none", "toy"]
    assert folder.parent == Path("runs")
    assert "The baseline none was added" in out


def test_cfg_job_prints_the_configuration_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], started: list[Any]
) -> None:
    code, out, _ = outcome(capsys, "run", "--cfg", "job", "methods=[toy]")
    assert code == 0
    assert "  toy:\n    name: toy\n    preset: paper\n    beta: 0.15\n" in out
    assert started == []
    assert outcome(capsys, "compare", "--cfg=job", "stacks=[none,toy]")[1].count("---\n") == 1


def test_interruption_ends_with_one_line_and_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mitigate.runner, "run", interrupted, raising=False)
    code, out, err = outcome(capsys, "run")
    assert code == 130
    assert out.startswith("Interrupted.")
    assert len(out.splitlines()) == 1
    assert err == ""
    monkeypatch.setattr("mitigate.cli.listing.show", interrupted)
    assert outcome(capsys, "list") == (130, "", "Interrupted.\n")


@pytest.mark.parametrize(("error", "code"), [(DataError("file.jsonl:3: damaged"), 2), (HookError("toy failed"), None)])
def test_problems_of_the_user_have_no_traceback_and_others_keep_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    started: list[Any],
    error: Exception,
    code: int | None,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(mitigate.runner, "run", fail, raising=False)
    if code is None:
        with pytest.raises(HookError):
            main(["run"])
    else:
        assert outcome(capsys, "run") == (code, "", f"error: {error}\n")


def test_list_methods_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "list", "methods")
    assert code == 0
    line = next(line for line in out.splitlines() if "│ toy " in line)
    for cell in ("does nothing to attention", "paper", "attention_probs", "1 forward/sample"):
        assert cell in line
    found = {row["name"]: row for row in json.loads(outcome(capsys, "list", "methods", "--json")[1])}
    assert found["toy"]["presets"]["lineage"] == {"beta": 0.7, "layers": "1-2"}
    assert found["toy"]["parameters"][0] == {
        "name": "beta",
        "type": "float",
        "default": 0.15,
        "required": False,
        "doc": "Gain of the toy, on two lines.",
    }


def test_list_shows_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "list")
    assert code == 0
    titles = ("Methods", "Models", "Benchmarks", "Metrics", "Stacks", "Experiments", "Model families", "Diagnostics")
    missing = [title for title in (*titles, "Trackers", "Packages") if f"\n{title}" not in f"\n{out}"]
    assert missing == []
    found = json.loads(outcome(capsys, "list", "--json")[1])
    kinds = ["methods", "models", "benchmarks", "metrics", "stacks", "experiments", "families", "diagnostics"]
    assert list(found) == [*kinds, "trackers", "packages"]
    rows = [row for kind in kinds for row in found[kind] if row["name"] not in ("toy", "chooser")]
    assert {row["distribution"] for row in rows} == {"mitigate"}
    assert {row["name"] for row in found["metrics"]} == set(mitigate.metrics.BUILTIN)
    assert found["families"][0]["class"].startswith("mitigate.adapters.")
    assert {row["name"] for row in found["trackers"]} == {"none", "wandb"}
    stacks = {row["name"]: row["methods"] for row in found["stacks"]}
    assert stacks["sgrs+locore"] == ["sgrs", "locore"]
    assert stacks["none"] == []
    models = {row["name"]: row for row in found["models"]}
    assert models["llava-1.5-7b"]["geometry"]["layers"] == 32
    assert models["hf"]["geometry"] is None


def test_list_shows_a_broken_plugin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods()._builtin, "ghost", "no_such_module:Ghost")
    code, out, _ = outcome(capsys, "list", "methods")
    assert code == 0
    assert "broken: method 'ghost'" in out
    assert "│ toy " in out


def test_plan_shows_points_values_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(
        capsys, "plan", "methods=[chooser,toy]", "methods.toy.preset=lineage", "model=llava-1.5-7b", "seed=3"
    )
    assert code == 0
    assert "chooser → toy" in out
    assert "32 layers" in out
    assert "toy: extra passes: at most 1 forward/sample" in out
    rows = {
        cells[1]: cells for line in out.splitlines() if len(cells := [cell.strip() for cell in line.split("│")]) > 3
    }
    assert rows["attention_probs"][2:7] == ["toy", "0", "last", "prefill, decode", "write"]
    assert rows["methods.toy.beta"][2:4] == ["0.7", "preset lineage"]
    assert rows["methods.chooser.alpha"][2:4] == ["0.6", "default"]
    assert rows["seed"][2:4] == ["3", "command line"]
    assert "┃ what" in out
    assert out.index("attention_probs") < out.index("select_token")


def test_plan_shows_a_point_only_in_the_phases_it_comes_in(capsys: pytest.CaptureFixture[str]) -> None:
    out = outcome(capsys, "plan", "stack=control_probe")[1]
    rows = {
        cells[1]: cells for line in out.splitlines() if len(cells := [cell.strip() for cell in line.split("│")]) > 3
    }
    assert rows["visual_embeddings"][5] == "prefill"


def test_plan_of_a_comparison_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plans = json.loads(outcome(capsys, "plan", "--json", "stacks=[none,toy]", "model=llava-1.5-13b")[1])
    assert [plan["stack"] for plan in plans] == ["none", "toy"]
    assert [len(plan["points"]) for plan in plans] == [0, 1]
    assert plans[1]["facts"]["layers"] == 40
    assert plans[1]["provenance"]["methods.toy.beta"] == "default"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--help"], ["compare", "testbed", "Examples", "Exit codes"]),
        (
            ["run", "--help"],
            ["--multirun", "on_error", "methods=[...]", "decoding.max_new_tokens", "default 128", "llava-1.5-7b"],
        ),
        (["compare", "-h"], ["stacks=[none,NAME", "experiment="]),
        (["plan", "--help"], ["where it came from", "--json"]),
        (["list", "--help"], ["--json"]),
        (["testbed", "--help"], ["evaluate"]),
    ],
)
def test_help_is_ours(capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]) -> None:
    code, out, err = outcome(capsys, *argv)
    assert (code, err) == (0, "")
    for part in parts:
        assert part in out
    assert max(map(len, out.splitlines())) <= 120


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, f"mitigate {__version__}\n", "")
    code, out, _ = outcome(capsys)
    assert code == 2
    assert "Usage: mitigate COMMAND" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["list"],
        ["run", "--help"],
        ["run", "--cfg", "job", "stack=sgrs+locore"],
        ["plan", "stack=sgrs+locore", "model=llava-1.5-7b"],
        ["plan", "stack=scr"],
        ["compare", "stacks=[nothing]"],
        ["testbed", "train", "--help"],
        ["testbed", "evaluate", "--help"],
        ["testbed", "train", "sed=1"],
        ["testbed", "evaluate", "split=foo"],
    ],
    ids=" ".join,
)
def test_cheap_commands_load_nothing_heavy_and_leave_nothing_behind(argv: list[str], tmp_path: Path) -> None:
    heavy = "'torch', 'transformers', 'pytorch_lightning', 'wandb', 'PIL', 'scipy'"
    code = (
        f"import sys; from mitigate.cli import main; main({argv!r}); print([m for m in [{heavy}] if m in sys.modules])"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(tmp_path.iterdir()) == []


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mitigate", "run", "sed=1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'seed'?" in done.stderr


def test_a_closed_pipe_makes_no_noise(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m mitigate list --json | true"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_console_does_not_cut_pipes_and_obeys_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from mitigate.cli import make_console

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False, write=str, flush=bool))
    assert make_console().width == 200
    monkeypatch.setenv("COLUMNS", "77")
    assert make_console().width == 77
