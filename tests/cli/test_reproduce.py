"""``mitigate reproduce``: the list, dry runs, refusals, and one tiny table on the embedded testbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mitigate.cli import main
from mitigate.reproduction.planning import find_table


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["reproduce", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITIGATE_DATA", str(tmp_path / "no-data"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)


def test_the_list_shows_tables_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "--list")
    assert code == 0
    for name in ("sgrs-table1", "sgrs-table2", "sgrs-table3", "sgrs-table5", "scr-main", "scr-chair", "scr-ablation"):
        assert f"│ {name} " in out
    assert "│ quick " not in out
    assert "weights: llava-1.5-7b" in out
    assert "data: chair, pope" in out


def test_a_dry_run_shows_the_protocol_and_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = outcome(capsys, "scr-chair", "--dry-run", "model=llava-1.5-7b", "benchmark.limit=5")
    assert code == 0
    assert "scr-chair: CHAIR, arXiv 2602.22469v1" in out
    assert "Not the full protocol: benchmark.limit=5" in out
    lines = [list(map(str.strip, line.split("│"))) for line in out.splitlines()]
    settings = {cells[1]: cells[2:4] for cells in lines if len(cells) > 3}
    assert settings["benchmark.limit"] == ["5", "command line"]
    assert settings["decoding.max_new_tokens"] == ["64", "chosen"]
    assert settings["methods.scr.lam"] == ["1.1", "paper"]
    assert settings["methods.scr.entropy"] == ["attention", "default"]
    missing = out.partition("Missing here")[2]
    assert "weights of llava-1.5-7b (llava-hf/llava-1.5-7b-hf): no copy in the hub cache" in missing
    assert "hf download llava-hf/llava-1.5-7b-hf" in missing
    assert f"chair: {tmp_path / 'no-data'}" in missing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sgrs-table1", "sgrs-table2", "sgrs-table3", "sgrs-table5", "scr-main", "scr-chair", "scr-ablation"]
)
def test_every_table_has_a_dry_run_over_all_its_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, name, "--dry-run")
    assert code == 0
    assert all(own.printed in out for own in find_table(name).models.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sgrs-tabel1"], "unknown experiment 'sgrs-tabel1'; did you mean 'sgrs-table1'"),
        (["quick"], "'quick' holds no published values; run it with: mitigate compare experiment=quick"),
        (["scr-main", "--dry"], "no option '--dry'"),
        (["scr-main", "sgrs-table1"], "name one table"),
        (["scr-main", "--list"], "give --list alone"),
        (["--dry-run"], "which table?"),
        (["model=testbed"], "which table?"),
        (["scr-chair", "model=gpt"], "scr-chair has no rows of it; it has chameleon-7b, llava-1.5-7b"),
        (["scr-chair", "benchmark=mme"], "benchmark=mme: scr-chair has chair"),
        (["scr-chair", "stacks=[none]"], "stacks=[none]: the table fixes it"),
        (["scr-chair", "methods=[scr]"], "the table fixes it"),
        (
            ["scr-chair", "model=llava-1.5-7b", "model.path=testbed"],
            "these are no weights of llava-1.5-7b; model=testbed",
        ),
        (["scr-chair", "model.path=/x"], "model.path=/x: say which model of the table it belongs to"),
        (
            ["scr-chair", "model=llava-1.5-7b", "benchmark.limits=3"],
            "chair has no parameter 'limits'; did you mean 'limit'",
        ),
        (["sgrs-table1", "model=testbed", "benchmark=mme"], "nothing the testbed can try"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = outcome(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_stops_a_run_before_it_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = outcome(capsys, "scr-chair", "model=llava-1.5-7b")
    assert code == 2
    assert "weights of llava-1.5-7b" in err
    assert "more things are missing" in err
    assert "`mitigate reproduce scr-chair --dry-run` lists all" in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_on_the_testbed_in_small(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("scr-pope-splits", "model=testbed", "benchmark.limit=2", "tracker=none", "name=try")
    code, out, _ = outcome(capsys, *arguments)
    assert code == 0
    data = json.loads((tmp_path / "runs" / "try" / "reproduction.json").read_text())
    ((folder, result),) = data["comparisons"].items()
    assert (tmp_path / "runs" / "try" / folder / "comparison.json").is_file()
    assert result["measured_model"] == "testbed"
    assert result["published_model"] == "Chameleon-7B"
    assert {cell["verdict"] for cell in result["cells"]} == {None}
    signs = {cell["difference"]["verdict"] for cell in result["cells"] if "difference" in cell}
    assert signs <= {"same sign", "opposite sign", "no difference"}
    measured = json.loads((tmp_path / "runs" / "try" / folder / "comparison.json").read_text())
    for cell in result["cells"]:
        split = cell["column"].removeprefix("HR ")
        accuracy = measured["stacks"][cell["stack"]]["metrics"][f"pope/{split}/accuracy"]["value"]
        assert cell["measured"]["value"] == pytest.approx(100 * (1 - accuracy))
    assert "no verdict is drawn" in out
    assert "Not the full protocol: benchmark.limit=2" in out
    assert "Chameleon-7B in the paper, testbed here" in (tmp_path / "runs" / "try" / "reproduction.md").read_text()
    for record in (tmp_path / "runs" / "try" / folder).glob("*/config.json"):
        assert "reproduction" not in json.loads(record.read_text())
