"""Runs read back from disk, several seeds of one stack, categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mitigate.errors import DataError
from mitigate.runner import compare, run
from mitigate.runner.results import summarise
from mitigate.runner.stored import StoredRun, find_runs
from tests.runner.fake_world import FakeBenchmark, FakeLoaded, install, resolved

QUIET = Console(quiet=True)
STACKS = ("none", "turned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two comparisons that sample, with the seeds 0 and 1."""
    place = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        install(patch.setattr, FakeLoaded())
        for seed in (0, 1):
            runs = [resolved(stack, seed=seed, decoding__do_sample=True, images=30) for stack in STACKS]
            compare(runs, place / f"c{seed}", console=QUIET)
    return place


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mitigate.runner.stored.benchmark_of", lambda config: FakeBenchmark(limit=30))


def pooled(folder: Path) -> dict[str, Any]:
    return summarise("both", find_runs([folder / "c0", folder / "c1"]))


def test_a_comparison_gives_its_stacks_in_the_order_of_its_table(folder: Path) -> None:
    runs = find_runs([folder / "c0"])
    assert [run.stack for run in runs] == list(STACKS)
    assert [run.stack for run in find_runs([folder / "c0" / "turned"])] == ["turned"]
    assert all(isinstance(run, StoredRun) and len(run.answers) == 120 for run in runs)


def test_what_is_read_back_gives_the_numbers_that_were_written(folder: Path) -> None:
    written = json.loads((folder / "c0" / "comparison.json").read_text())
    again = summarise("c0", find_runs([folder / "c0"]))
    for stack in STACKS:
        for key in ("metrics", "differences", "mcnemar", "effects", "failures", "seeds"):
            assert again["stacks"][stack][key] == written["stacks"][stack][key], key


def test_seeds_are_pooled_and_their_spread_is_told(folder: Path) -> None:
    data = pooled(folder)
    singles = [summarise("one", find_runs([folder / f"c{seed}"])) for seed in (0, 1)]
    value = data["stacks"]["none"]["metrics"]["pope/random/accuracy"]["value"]
    each = [one["stacks"]["none"]["metrics"]["pope/random/accuracy"]["value"] for one in singles]
    assert each[0] != each[1], "the seeds must differ for this test to say anything"
    assert value == pytest.approx(sum(each) / 2)
    assert data["stacks"]["none"]["seeds"] == [0, 1]
    spread = data["stacks"]["none"]["seed_spread"]["pope/random/accuracy"]
    assert spread == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    assert singles[0]["stacks"]["none"]["seed_spread"] == {}
    turned_round = find_runs([folder / "c1", folder / "c0"])
    assert summarise("both", turned_round) == data
    assert data["n_images"] == 30


def test_answers_are_paired_with_the_same_seeds(folder: Path) -> None:
    data = pooled(folder)
    outcomes: list[tuple[bool, bool]] = []
    for seed in (0, 1):
        first, second = find_runs([folder / f"c{seed}"])
        for key, record in first.answers.items():
            right, now = (first.benchmark.correct(each) for each in (record, second.answers[key]))
            outcomes += [] if right is None or now is None else [(right, now)]
    assert data["stacks"]["turned"]["mcnemar"]["only_first"] == sum(a and not b for a, b in outcomes)
    assert data["stacks"]["turned"]["mcnemar"]["only_second"] == sum(b and not a for a, b in outcomes)


def test_the_same_seed_twice_is_no_second_seed(folder: Path) -> None:
    runs = find_runs([folder / "c0"])
    with pytest.raises(DataError, match="two runs with seed 0"):
        summarise("twice", [*runs, *runs])
    with pytest.raises(DataError, match="named twice"):
        find_runs([folder / "c0", folder / "c0" / "none"])


def test_every_category_has_its_own_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(self: FakeBenchmark, record: Any) -> dict[str, str]:
        return {"kind": record.meta.get("split", "caption")}

    monkeypatch.setattr(FakeBenchmark, "breakdowns", kind)
    runs = find_runs([folder / "c0"])
    found = summarise("c", runs)["breakdowns"]["kind"]
    assert list(found) == ["adversarial", "caption", "popular", "random"]
    for split in ("adversarial", "popular", "random"):
        assert (found[split]["n"], found[split]["images"]) == (30, 30)
        rates = {}
        for each in runs:
            own = [record for record in each.answers.values() if record.meta.get("split") == split]
            rates[each.stack] = sum(not each.benchmark.correct(record) for record in own) / len(own)
            assert found[split]["stacks"][each.stack]["wrong"]["value"] == pytest.approx(rates[each.stack])
        difference = found[split]["stacks"]["turned"]["wrong"]["difference"]
        assert difference["value"] == pytest.approx(rates["turned"] - rates["none"])
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert "difference" not in found[split]["stacks"]["none"]["wrong"]
        assert "chair_i" not in found[split]["stacks"]["none"], "no caption, nothing named"
    assert "chair_i" in found["caption"]["stacks"]["none"]


@pytest.mark.parametrize("kind", ["missing", "empty", "running", "short"])
def test_folders_without_a_finished_run_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "r"
    expected = {"missing": "is no folder", "empty": "holds no run", "running": "not finished", "short": "23 of 24"}
    if kind == "empty":
        place.mkdir()
    if kind in ("running", "short"):
        install(monkeypatch.setattr, FakeLoaded())
        run(resolved(), place, console=QUIET)
        if kind == "running":
            record = json.loads((place / "record.json").read_text())
            (place / "record.json").write_text(json.dumps({**record, "status": "running"}))
        else:
            (file,) = place.glob("samples.*")
            file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=expected[kind]):
        find_runs([place])
