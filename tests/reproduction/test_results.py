"""What is missing, and how measured numbers reach the published unit; comparisons are written by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mitigate.compose import compose_comparison
from mitigate.errors import DataError
from mitigate.reproduction import Cell, Column, Protocol, Published, Setting
from mitigate.reproduction.markdown import as_markdown, rows_of
from mitigate.reproduction.needs import missing_data, missing_for, missing_weights
from mitigate.reproduction.planning import Job
from mitigate.reproduction.results import merge_results, result_of
from mitigate.reproduction.running import against_vanilla
from mitigate.reproduction.settings import lines
from mitigate.reproduction.tables import PublishedModel


def make_job(columns: dict[str, Column], rows: dict[str, dict[str, Cell]], **more: Any) -> Job:
    published = Published(
        name="mine",
        paper="A paper",
        arxiv="2600.00001v1",
        table="Table 1",
        protocols=("toy",),
        vanilla="none",
        names={"none": "baseline", "locore": "LocoRE|"},
        models={"small": PublishedModel(printed="Small", stand_in="", rows=rows)},
        notes=("a note",),
        left_out=(),
    )
    settings = more.pop("settings", {})
    protocol = Protocol(
        name="toy",
        benchmark="testbed",
        columns=columns,
        settings=settings,
        decoding=(),
        testbed=None,
        testbed_columns={},
    )
    runs = more.pop("runs", ())
    return Job(published=published, model="small", protocol=protocol, columns=columns, runs=runs, **more)


def interval(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


COMPARISON: dict[str, Any] = {
    "model": "small-model",
    "benchmark": {"name": "testbed"},
    "n_images": 10,
    "n_samples": 30,
    "left_out": [],
    "baseline": "none",
    "metrics": {
        "accuracy": {"percent": True, "higher_is_better": True},
        "points": {"percent": False, "higher_is_better": True},
    },
    "stacks": {
        "none": {
            "metrics": {"accuracy": interval(0.8, 0.75, 0.86), "points": interval(160.0, 150.0, 170.0)},
            "differences": {},
        },
        "locore": {
            "metrics": {"accuracy": interval(0.85, 0.8, 0.9), "points": interval(None, None, None)},
            "differences": {"accuracy": interval(0.05, 0.01, 0.09), "points": interval(None, None, None)},
        },
    },
}
COLUMNS = {
    "Acc": Column(metric="accuracy"),
    "HR": Column(metric="accuracy", complement=True),
    "Total": Column(metric="points", decimals=2),
    "Double": Column(metric="points", scale=2.0),
}
ROWS = {
    "none": {"Acc": Cell(value=81.0), "HR": Cell(value=19.0), "Total": Cell(value=155.55), "Double": Cell(value=20.0)},
    "locore": {
        "Acc": Cell(value=87.0, note="odd"),
        "HR": Cell(value=13.0),
        "Total": Cell(value=170.0),
        "Double": Cell(value=1.0),
    },
}


def cells(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["stack"], cell["column"]): cell for cell in result["cells"]}


def test_numbers_are_brought_to_the_published_unit() -> None:
    found = cells(result_of(make_job(COLUMNS, ROWS), COMPARISON))
    assert found["none", "Acc"]["measured"] == pytest.approx(interval(80.0, 75.0, 86.0))
    assert found["none", "HR"]["measured"] == pytest.approx(interval(20.0, 14.0, 25.0))  # ends change places
    assert found["none", "Total"]["measured"] == interval(160.0, 150.0, 170.0)
    assert found["none", "Double"]["measured"] == interval(320.0, 300.0, 340.0)
    assert [found["none", column]["verdict"] for column in COLUMNS] == ["agrees", "agrees", "agrees", "differs"]
    assert "difference" not in found["none", "Acc"]


def test_differences_are_of_the_published_rows_and_paired_here() -> None:
    found = cells(result_of(make_job(COLUMNS, ROWS), COMPARISON))
    accuracy, error = found["locore", "Acc"]["difference"], found["locore", "HR"]["difference"]
    assert (accuracy["published"], accuracy["verdict"]) == (6.0, "confirmed")
    assert accuracy["measured"] == pytest.approx(interval(5.0, 1.0, 9.0))
    assert (error["published"], error["verdict"]) == (-6.0, "confirmed")
    assert error["measured"] == pytest.approx(interval(-5.0, -9.0, -1.0))
    assert (found["none", "Acc"]["higher_is_better"], found["none", "HR"]["higher_is_better"]) == (True, False)
    undefined = found["locore", "Total"]
    assert (undefined["verdict"], undefined["difference"]["verdict"]) == ("undefined", "undefined")
    assert undefined["measured"] == interval(None, None, None)


def test_another_model_gets_no_verdict_and_a_small_try_is_named() -> None:
    result = result_of(
        make_job(COLUMNS, ROWS, other_model="the testbed", altered=("benchmark.limit=4",), weights="/a"), COMPARISON
    )
    found = cells(result)
    assert {cell["verdict"] for cell in found.values()} == {None}
    assert found["locore", "Acc"]["difference"]["verdict"] == "same sign"
    text = as_markdown(
        {
            "experiment": "mine",
            "paper": "A <b>paper</b>",
            "arxiv": "1",
            "table": "T",
            "notes": [],
            "left_out": [],
            "comparisons": {"x": result},
        }
    )
    assert "no verdict is drawn" in text
    assert "Not the full protocol: benchmark.limit=4" in text
    assert "Only 10 pictures" in text
    assert "Weights from /a, taken to be those of Small." in text
    assert "confirmed" not in text


def test_the_table_labels_what_was_published() -> None:
    result = result_of(make_job(COLUMNS, ROWS), COMPARISON)
    rows = {row[:2]: row for row in rows_of(result)}
    assert rows["LocoRE|", "Acc"][2:] == (
        "87.0*", "85.00 [80.00, 90.00]", "agrees", "+6.0", "+5.00 [1.00, 9.00]", "confirmed",
    )  # fmt: skip
    assert rows["LocoRE|", "Total"][2:4] == ("170.00", "–")
    job = make_job(COLUMNS, ROWS)
    text = as_markdown({"experiment": "mine", "paper": "A <b>", "arxiv": "1", "table": "T", "notes": ["n"],
                        "left_out": [], "comparisons": {job.published.name: result}})  # fmt: skip
    assert "| row | column | published | measured here |" in text
    assert "(*) LocoRE\\| Acc: odd" in text
    assert "A \\<b\\>" in text
    assert "| LocoRE\\| |" in text


def test_the_folder_keeps_comparisons_that_are_still_there(tmp_path: Path) -> None:
    job = make_job(COLUMNS, ROWS)
    result = result_of(job, COMPARISON)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text("{}")
        merge_results(tmp_path, job.published, {name: result})
    assert set(json.loads((tmp_path / "reproduction.json").read_text())["comparisons"]) == {"first", "second"}
    (tmp_path / "first" / "comparison.json").unlink()
    data = merge_results(tmp_path, job.published, {"third": result})
    assert list(data["comparisons"]) == ["second", "third"]
    other = json.loads((tmp_path / "reproduction.json").read_text()) | {"experiment": "other"}
    (tmp_path / "reproduction.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"is not of mine; choose another folder with name="):
        merge_results(tmp_path, job.published, {})


@pytest.mark.parametrize("vanilla", ["none", "beam"])
def test_differences_are_to_the_vanilla_row_where_that_is_not_none(
    vanilla: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(COLUMNS, {**ROWS, "beam": ROWS["none"]})
    names = {"locore": "LocoRE", "beam": "Beam", "none": "no row"}
    job = dataclasses.replace(job, published=dataclasses.replace(job.published, vanilla=vanilla, names=names))
    monkeypatch.setattr("mitigate.runner.stored.read_run", lambda folder: folder)
    monkeypatch.setattr("mitigate.runner.results.summarise", lambda name, runs: {"name": name, "runs": runs})
    found = against_vanilla(job, COMPARISON, tmp_path)
    if vanilla == "none":
        assert found is COMPARISON
    else:
        assert found == {"name": tmp_path.name, "runs": [tmp_path / "beam", tmp_path / "locore", tmp_path / "none"]}


def test_settings_say_where_every_value_is_from() -> None:
    runs = compose_comparison(["stacks=[none,locore]", "benchmark.limit=3"])
    settings = {
        "methods.locore.beta": Setting(origin="paper", why="Table 9", models=("other",)),
        "methods.locore.window": Setting(origin="code", why="a script"),
        "benchmark.limit": Setting(origin="paper", why="all"),
    }
    found = {line.key: line for line in lines([make_job(COLUMNS, ROWS, runs=runs, settings=settings)])}
    assert (found["methods.locore.beta"].origin, found["methods.locore.beta"].text) == ("chosen", "0.15")
    assert (found["methods.locore.window"].origin, found["methods.locore.window"].why) == ("code", "a script")
    assert (found["benchmark.limit"].origin, found["benchmark.limit"].text) == ("command line", "3")
    assert found["decoding.max_new_tokens"].origin == "default"
    assert {"benchmark.split", "decoding.num_beams", "seed", "model.path", "methods.locore.mode"} <= set(found)
    assert not {"runs_dir", "trainer.batch_size", "methods", "methods.locore.name", "benchmark.name"} & set(found)
    assert list(found)[-1].startswith("methods.")


def test_weights_are_looked_for_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_weights({"name": "testbed", "path": "testbed"}) is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    absent = missing_weights({"name": "big", "path": "maker/big", "revision": None})
    assert absent is not None
    assert "no copy in the hub cache" in absent.what
    assert "hf download maker/big" in absent.remedy
    pinned = {"name": "big", "path": "maker/big", "revision": "b" * 40}
    assert "hf download maker/big --revision bbb" in getattr(missing_weights(pinned), "remedy", "")
    monkeypatch.setattr("mitigate.reproduction.needs.cached_instead", lambda *_: "null")
    other = missing_weights(pinned)
    assert other is not None
    assert "the hub cache has another revision than bbb" in other.what
    assert "model.revision=null" in other.remedy
    folder = {"name": "local", "path": str(tmp_path)}

    def what() -> str | None:
        found = missing_weights(folder)
        return None if found is None else found.what.partition(": ")[2]

    assert "no config.json" in (what() or "")
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in (what() or "")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    assert "cannot be read" in (what() or "")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (tmp_path / "one.safetensors").write_text("")
    assert what() == "1 of 2 files of weights are missing, first two.safetensors"
    (tmp_path / "two.safetensors").write_text("")
    assert what() is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert missing_weights({"name": "big", "path": "maker/big", "revision": None}) is None


def test_data_and_families_that_are_not_there(tmp_path: Path) -> None:
    from mitigate.benchmarks.mme import Mme

    found = missing_data(Mme(tasks=("count",), data_dir=str(tmp_path)))
    assert found
    assert {item.kind for item in found} == {"data"}
    assert all(item.remedy for item in found)
    (run,) = compose_comparison(["stacks=[none]", "benchmark.limit=2"])
    assert missing_for(run) == []
    config = {**run.config, "model": {**run.config["model"], "family": "unheard_of"}}
    unserved = SimpleNamespace(config=config, facts=None, benchmark=run.benchmark)
    assert [item.kind for item in missing_for(unserved)] == ["model"]  # type: ignore[arg-type]


def test_words_are_looked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mitigate.benchmarks.chair import Chair
    from mitigate.reproduction.needs import missing_words

    def fail(text: str, lemmatizer: str) -> None:
        raise DataError("needs data of nltk; get it with: python -m nltk.downloader x")

    monkeypatch.setattr("mitigate.metrics.lemmatizers.lemmatize", fail)
    found = missing_words(Chair())
    assert found is not None
    assert (found.what, found.remedy) == ("chair: needs data of nltk", "python -m nltk.downloader x")
    monkeypatch.undo()
    assert missing_words(Chair(lemmatizer="closed")) is None
