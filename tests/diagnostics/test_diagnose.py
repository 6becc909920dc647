"""The command from end to end on the testbed: files, resume, refusals, trackers, stacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from mitigate.cli import main
from mitigate.core import Access, Fidelity, Method, ModelFacts, NextTokenLogits, Point, Subscription, Tags
from mitigate.diagnostics import BUILTIN, generating, records
from mitigate.diagnostics.base import Estimate, Findings, Table
from mitigate.diagnostics.credit import Credit
from mitigate.diagnostics.drift import Drift
from mitigate.diagnostics.entropy import Entropy
from mitigate.diagnostics.tracking import expanded, flat_numbers, track
from mitigate.errors import DataError
from mitigate.registry import methods
from mitigate.trackers.base import Tracker
from tests.diagnostics.worlds import row, sample

SMALL = ("benchmark.limit=3", "trainer=cpu", "decoding.max_new_tokens=24", "diagnostic.resamples=100")
OFF = (*SMALL, "tracker=none")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: figures are most of the time of a small run."""
    for diagnostic in (Credit, Drift, Entropy):
        monkeypatch.setattr(diagnostic, "draw", lambda *_: [])
        monkeypatch.setattr(diagnostic, "illustrate", lambda *_: [])


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    return (code, *capsys.readouterr())


def folder(here: Path) -> Path:
    (found,) = (here / "runs" / "diagnose").iterdir()
    return found


def test_a_run_leaves_records_summary_and_figures(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, out, err = outcome(capsys, "diagnose", "entropy", *OFF)
    assert (code, err) == (0, "")
    made = folder(here)
    assert made.name.startswith("entropy-testbed-testbed-none-")
    summary = json.loads((made / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["samples"] == 3
    assert summary["tokens"] == sum(len(item.rows) for item in records.read(made))
    assert summary["words"]["grounded"] > 0
    assert set(summary) >= {"versions", "git", "data_hash", "prompt_hash", "weights", "parameters", "findings"}
    assert summary["versions"]["diagnostic entropy"] == "1"
    config = json.loads((made / "config.json").read_text())["config"]
    assert config["diagnostic"] == {"name": "entropy", "tasks": "auto", "pool": "mass_mean"}
    for name in summary["figures"]:
        with Image.open(made / name) as picture:
            assert picture.format == "PNG"
        assert "<svg" in (made / name).with_suffix(".svg").read_text()[:2000]
        assert name in out
    for table in summary["findings"]["tables"]:
        assert table["title"] in out.replace("\n", " ")
    assert "small test bench" in out
    assert {path.name for path in made.iterdir()} >= {"tokens.jsonl", "config.json", "summary.json"}


@pytest.mark.usefixtures("undrawn")
def test_answers_are_those_of_a_plain_run(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert outcome(capsys, "diagnose", "entropy", *OFF, "name=d")[0] == 0
    assert outcome(capsys, "run", *(item for item in OFF if "diagnostic" not in item), "name=r")[0] == 0
    lines = (here / "runs" / "r" / "samples.rank0.jsonl").read_text().splitlines()
    plain = {data["id"]: data["text"] for data in map(json.loads, lines) if data["task"] == "caption"}
    assert {item.id: item.text for item in records.read(here / "runs" / "diagnose" / "d")} == plain


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_goes_on_and_ends_the_same(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (*OFF, "trainer.batch_size=2")
    assert outcome(capsys, "diagnose", "drift", *small, "name=whole")[0] == 0
    made = generating.Generator._batch
    calls: list[int] = []

    def interrupted(self: Any, batch: Any, shared: Any) -> Any:
        calls.append(batch.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(self, batch, shared)

    monkeypatch.setattr(generating.Generator, "_batch", interrupted)
    code, out, _ = outcome(capsys, "diagnose", "drift", *small, "name=cut")
    assert code == 130
    assert "the same command goes on from there" in out
    cut = here / "runs" / "diagnose" / "cut"
    first, _ = (cut / "tokens.jsonl").read_text().splitlines()
    (cut / "tokens.jsonl").write_text(first + '\n{"id": "test-1/capt')  # killed in the middle of the first batch
    assert json.loads((cut / "summary.json").read_text())["status"] == "running"
    assert outcome(capsys, "diagnose", "drift", *small, "name=cut")[0] == 0
    assert calls == [0, 1, 0, 1]
    assert len((cut / "tokens.jsonl").read_text().splitlines()) == 3
    whole = json.loads((here / "runs" / "diagnose" / "whole" / "summary.json").read_text())
    assert json.loads((cut / "summary.json").read_text())["findings"] == whole["findings"]


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_is_analysed_anew_without_the_model(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome(capsys, "diagnose", "credit", *OFF)[0] == 0
    monkeypatch.setattr("mitigate.adapters.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, _ = outcome(capsys, "diagnose", "credit", *OFF, "diagnostic.bins=3")
    assert code == 0
    assert "nothing was generated" in out
    assert json.loads((folder(here) / "summary.json").read_text())["parameters"]["bins"] == 3


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stack", ["methods=[locore]", "methods=[scr]", "methods=[sgrs]"])
def test_stacks_are_watched_and_compared(capsys: pytest.CaptureFixture[str], here: Path, stack: str) -> None:
    code, _, err = outcome(capsys, "diagnose", "credit", *OFF, stack, "benchmark.limit=1", "diagnostic.tasks=caption")
    assert (code, err) == (0, "")
    (found,) = records.read(folder(here))
    assert found.measures["plain_norms"]
    assert set(found.telemetry) == {stack[9:-1], "bus"}
    assert bool(found.measures.get("sources")) == ("scr" in stack)
    ratio = json.loads((folder(here) / "summary.json").read_text())["findings"]["data"]["norms"]["ratio"]
    assert (abs(ratio[-1]["value"] - 1.0) > 1e-4) == ("scr" in stack)


def test_saliency_from_end_to_end(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    argv = (*OFF, "methods=[locore]", "diagnostic.candidates=2", "diagnostic.examples=1", "decoding.max_new_tokens=40")
    more = ("diagnostic.interventions=true", "diagnostic.gains=[0.4]", "benchmark.tasks=[chair]", "benchmark.limit=4")
    code, _, err = outcome(capsys, "diagnose", "saliency", *argv, *more)
    assert (code, err) == (0, "")
    made = folder(here)
    summary = json.loads((made / "summary.json").read_text())
    assert min(summary["words"].values()) > 0
    tables = {table["name"]: table["rows"] for table in summary["findings"]["tables"]}
    assert {"means", "separation", "effects", "bins_diagonal", "by_layer", "flow", "direct"} <= set(tables)
    assert {line[0] for line in tables["interventions"]} == {"x 0.4", "x 1"}
    assert sum(line[1] for line in tables["bins_diagonal"]) == (
        summary["words"]["grounded"] + summary["words"]["hallucinated"]
    )
    maps = {name for name in summary["figures"] if name.startswith("map-")}
    kinds = ("01-hallucinated", "02-grounded")
    assert maps == {f"map-{kind}{suffix}.png" for kind in kinds for suffix in ("", "-with-stack")}
    for name in summary["figures"]:
        assert (made / name).stat().st_size > 10_000
        assert (made / name).with_suffix(".svg").exists()
    (first,) = (line for line in (made / "tokens.jsonl").read_text().splitlines()[:1])
    assert len(json.loads(first)["tokens"][0]["measures"]["exact"]) == 3


@pytest.mark.usefixtures("undrawn")
def test_yes_no_answers_are_diagnosed_when_asked(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert outcome(capsys, "diagnose", "entropy", *OFF, "diagnostic.tasks=yes_no")[0] == 0
    found = records.read(folder(here))
    assert {item.task for item in found} == {"yes_no"}
    marked = [[item for item in sample.rows if item.label.value != "other"] for sample in found]
    assert {item.text for rows in marked for item in rows} <= {"Yes", "No"}
    assert max(len(rows) for rows in marked) == 1
    right = [rows[0].label.value == "grounded" for rows in marked if rows]
    assert any(right)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["entrpy"], "did you mean 'entropy'?"),
        (["entropy", "diagnostic.poll=max"], "did you mean 'pool'?"),
        (["entropy", "diagnostic.pool=mean"], 'diagnostic.pool="mean" must be one of'),
        (["entropy", "diagnostic.pool=[max]"], "has the wrong type"),
        (["entropy", "decoding=beam"], "decoding.num_beams=5"),
        (["entropy", "trainer.devices=2"], "one device"),
        (["entropy", "benchmark.tasks=[pope]", "diagnostic.tasks=caption"], "name a task of this benchmark"),
        (["drift", "diagnostic.early=5-6"], "must follow one another"),
        (["drift", "diagnostic.deep=70-90"], "diagnostic.deep"),
        (
            ["saliency", "diagnostic.sample=a", "diagnostic.token=1"],
            "be the id of a sample of this run",
        ),
        (["credit", "diagnostic.layers=9-99"], "diagnostic.layers"),
        (["entropy", "benchmark.limt=2"], "did you mean 'limit'?"),
        (["benchmark.limit=2"], "name of a diagnostic first"),
        (["entropy", "-m", "seed=0,1"], "has no option '-m'"),
        (["entropy", "trainer=gpu"], "torch sees no such device"),
    ],
)
def test_wrong_input_is_one_or_two_lines_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], here: Path, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, out, err = outcome(capsys, "diagnose", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert list(here.iterdir()) == []


def test_ablation_without_anything_to_ablate_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "diagnose", "entropy", *OFF, "diagnostic.ablation=true")
    assert code == 2
    assert "no method of the stack (none) has variants" in err


def test_folders_of_other_runs_are_refused(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    made = here / "runs" / "diagnose" / "mine"
    made.mkdir(parents=True)
    (made / "tokens.jsonl").write_text("")
    code, _, err = outcome(capsys, "diagnose", "entropy", *OFF, "name=mine")
    assert code == 2
    assert "has records but no config.json" in err
    (made / "config.json").write_text(json.dumps({"config": {"seed": 7}}))
    (made / "summary.json").write_text(json.dumps({"versions": {}}))
    code, _, err = outcome(capsys, "diagnose", "entropy", *OFF, "name=mine")
    assert code == 2
    assert "mine holds another run" in err


def test_help_lists_every_diagnostic_and_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "diagnose", "--help")
    assert code == 0
    for name in BUILTIN:
        assert f"\n  {name} " in out
    code, out, _ = outcome(capsys, "diagnose", "drift", "--help")
    assert code == 0
    assert "similarity" in out
    assert "bhattacharyya" in out
    assert outcome(capsys, "diagnose")[0] == 2
    assert "  drift " in outcome(capsys, "diagnose")[1]
    assert "diagnose" in outcome(capsys, "--help")[1]


def test_cfg_job_prints_and_runs_nothing(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, out, _ = outcome(capsys, "diagnose", "drift", "--cfg", "job", "diagnostic.top=0.2")
    assert code == 0
    assert "  top: 0.2\n" in out
    assert list(here.iterdir()) == []


def test_wandb_gets_numbers_tables_and_figures(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(self: Any, findings: Any, place: Path) -> list[Path]:
        Image.new("RGB", (8, 8)).save(place / "one.png")
        return [place / "one.png"]

    monkeypatch.setattr(Entropy, "draw", one)
    code, out, _ = outcome(capsys, "diagnose", "entropy", *SMALL, "tracker=offline")
    assert code == 0
    assert "Tracked with wandb: " in out
    assert list(folder(here).glob("wandb/offline-run-*/*.wandb"))
    (table,) = folder(here).glob("wandb/offline-run-*/files/media/table/entropy/figures*.json")
    assert json.loads(table.read_text())["data"] == [["one", "Image"]]
    assert "Tracked" not in outcome(capsys, "diagnose", "entropy", *SMALL, "tracker=offline")[1]


# ------------------------------------------------------------------------------------------------- without the testbed


@dataclass(frozen=True, kw_only=True)
class Louder(Method):
    """Scales the logits, which changes nothing greedy; its variant favours one token.

    Parameters
    ----------
    token
        Token that gets 100 more; -1 for none.
    """

    name: ClassVar[str] = "louder"
    summary: ClassVar[str] = "scales logits"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.NEXT_TOKEN_LOGITS}))

    token: int = -1

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        return [Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]

    def on_next_token_logits(self, event: NextTokenLogits, state: Any) -> Any:
        state.count("seen", 1.0)
        logits = 2.0 * event.logits
        if self.token >= 0:
            logits[:, self.token] += 100.0
        return logits

    def ablations(self, telemetry: Mapping[str, float]) -> dict[str, Method]:
        assert telemetry["seen"] > 0
        return {"end at once": Louder(token=2)}


@pytest.mark.usefixtures("undrawn")
def test_ablation_pairs_every_variant_with_the_stack(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    methods().register("louder", Louder)
    try:
        code, _, err = outcome(capsys, "diagnose", "entropy", *OFF, "methods=[louder]", "diagnostic.ablation=true")
    finally:
        methods().unregister("louder")
    assert (code, err) == (0, "")
    tables = json.loads((folder(here) / "summary.json").read_text())["findings"]["tables"]
    (table,) = [item for item in tables if item["name"] == "ablation"]
    cells = {(line[0], line[1]): line[2:] for line in table["rows"]}
    assert cells["unablated", "recall"][1] is None
    assert cells["unablated", "recall"][0]["value"] > 0.3
    value, difference = cells["louder: end at once", "recall"]
    assert value["value"] == 0.0
    assert difference["value"] == pytest.approx(-cells["unablated", "recall"][0]["value"])
    assert ("louder: end at once", "pope/mean/f1") in cells
    for name, token in (("unablated", -1), ("louder-end-at-once", 2)):
        config = json.loads((folder(here) / "ablation" / name / "config.json").read_text())["config"]
        assert config["methods"]["louder"]["token"] == token


def test_records_survive_the_way_to_disk(tmp_path: Path) -> None:
    rows = (row("i0", "grounded", {"a": [1.23456789, float("nan")], "b": 2}),)
    made = sample("i0", rows, nested=[[1, 0]], text="x")
    with records.Writer(tmp_path) as writer:
        writer.extend([made, sample("i10"), sample("i2")])
    back = records.read(tmp_path)
    assert [item.image_id for item in back] == ["i0", "i2", "i10"]
    assert back[0].rows[0].measures == {"a": [1.23457, None], "b": 2}
    assert back[0].measures == {"nested": [[1, 0]], "text": "x"}
    assert back[0].rows[0].label.value == "grounded"
    assert (back[0].rows[0].length, back[0].rows[0].position) == (1, 0)
    with (tmp_path / records.FILE).open("ab") as file:
        file.write(b'{"id": "i3')
    assert len(records.read(tmp_path)) == 3
    with records.Writer(tmp_path) as writer:
        writer.extend([sample("i3")])
    assert len(records.read(tmp_path)) == 4
    with (tmp_path / records.FILE).open("ab") as file:
        file.write(b'{"id": 1}\n')
    with pytest.raises(DataError, match=r"tokens.jsonl:5: no record of a diagnostic"):
        records.read(tmp_path)


def test_a_sample_recorded_twice_is_refused(tmp_path: Path) -> None:
    with records.Writer(tmp_path) as writer:
        writer.extend([sample("i0"), sample("i0")])
    with pytest.raises(DataError, match="there twice"):
        records.read(tmp_path)


def test_a_failing_tracker_is_reported_not_raised(tmp_path: Path) -> None:
    class Broken(Tracker):
        name = "broken"

        def start(self, run: Any) -> None:
            raise RuntimeError("no space")

        def finish(self, *, failed: bool = False) -> None:
            raise RuntimeError("again")

    from types import SimpleNamespace

    resolved: Any = SimpleNamespace(config={}, stack_name="none")
    diagnostic: Any = SimpleNamespace(name="entropy")
    summary = {
        "created_at": "now", "parameters": {}, "figures": [], "versions": {}, "git": {}, "data_hash": "", "weights": "",
    }  # fmt: skip
    found = Findings(numbers={"a/b": Estimate(1.0, 0.5, float("nan"), 7, 0.25)})
    tracker = Broken({}, tmp_path)
    (line,) = track(tracker, resolved, diagnostic, summary, found, [], tmp_path)
    assert "no space" in line
    columns, cells = expanded(Table("t", "T", ("x", "y"), (("a", Estimate(1.0, 0.5, 2.0, 7, 0.25)), ("b", None))))
    assert columns == ["x", "y", "y: low", "y: high", "y: n", "y: p"]
    assert cells == [["a", 1.0, 0.5, 2.0, 7, 0.25], ["b", None, None, None, None, None]]
    flat = flat_numbers(found)
    assert flat["a/b"] == 1.0
    assert flat["a/b/n"] == 7.0
    assert flat["a/b/p"] == 0.25
