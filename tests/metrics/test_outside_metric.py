"""Metrics are plugins: the benchmarks' own ones, and those of other packages that a run adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mitigate.benchmarks.testbed import Testbed
from mitigate.compose import compose_run
from mitigate.errors import ConfigError, DataError, PluginError, UnknownName
from mitigate.metrics.base import values
from mitigate.metrics.chair import Chair
from mitigate.metrics.pope import Pope
from mitigate.records import SampleRecord
from mitigate.registry import metrics
from mitigate.runner.provenance import plugin_versions, versions
from mitigate.statistics import intervals
from tests.outside import install, visible

METRIC = '''
from dataclasses import dataclass
from typing import ClassVar

from mitigate.metrics import Scorer
from mitigate.metrics.base import ratio


@dataclass(frozen=True, kw_only=True)
class Brevity(Scorer):
    """Share of answers of at most five words."""

    name: ClassVar[str] = "brevity"
    summary: ClassVar[str] = "answers of at most five words"

    def metrics(self):
        return [ratio("brevity", "Brevity", "brevity/short", "brevity/all")]

    def score(self, record, benchmark):
        return {"brevity/all": 1.0, "brevity/short": float(len(record.text.split()) <= 5)}
'''
DONE: dict[str, Any] = {"tokens": 1, "finished": True}
BENCHMARK = """
from dataclasses import dataclass
from typing import ClassVar

from mitigate.benchmarks.testbed import Testbed


@dataclass(frozen=True, kw_only=True)
class Bench(Testbed):
    name: ClassVar[str] = "bench"
"""
POINTS = {"metrics": {"brevity": "{}.metric:Brevity"}, "benchmarks": {"bench": "{}.bench:Bench"}}


@pytest.fixture
def brevity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, "mitigate-foo", {"metric.py": METRIC, "bench.py": BENCHMARK}, POINTS)
    with visible(monkeypatch, tmp_path):
        yield tmp_path


def answers(benchmark: Testbed, text: str) -> list[SampleRecord]:
    return [
        SampleRecord(
            id=item.id, image_id=item.image_id, task=item.task, prompt=item.prompt, text=text, meta=item.meta, **DONE
        )
        for item in benchmark.samples()
    ]


@pytest.mark.usefixtures("brevity")
def test_a_run_adds_a_metric_of_another_package() -> None:
    run = compose_run(["benchmark.extra_metrics=[brevity]", "benchmark.limit=2"])
    assert run.config["benchmark"]["extra_metrics"] == ["brevity"]
    names = [metric.name for metric in run.benchmark.all_metrics()]
    assert names == [*(metric.name for metric in Testbed().metrics()), "brevity"]
    records = [*answers(run.benchmark, "yes"), *answers(run.benchmark, "a reply of six whole words")]
    measured = intervals(run.benchmark.counts(records), run.benchmark.all_metrics(), seed=0)
    assert measured["brevity"].value == 0.5
    assert set(measured) == set(names)
    told = plugin_versions(run)
    assert told["metric brevity"] == "1"
    assert len(told["code of metric brevity"]) == 12
    for item in (run, compose_run(["benchmark=bench", "benchmark.limit=2"])):
        assert versions(item)["mitigate-foo"] == "0.1"
    assert run.digest != compose_run(["benchmark.limit=2"]).digest


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("[brevty]", UnknownName, "unknown metric 'brevty'; did you mean 'brevity'"),
        ("[chair]", ConfigError, r"extra_metrics=\[.chair.\] must leave out chair: chair/captions is measured"),
        ("[brevity,brevity]", ConfigError, "must leave out brevity: brevity is measured already"),
        ("3", ConfigError, r"extra_metrics is tuple\[str"),
    ],
)
@pytest.mark.usefixtures("brevity")
def test_a_wrong_metric_is_refused_before_anything_runs(asked: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compose_run([f"benchmark.extra_metrics={asked}"])


def test_a_broken_metric_stops_only_runs_that_ask_for_it(brevity: Path) -> None:
    (brevity / "mitigate_foo" / "metric.py").write_text("import no_such_module\n")
    assert compose_run().benchmark.extra_metrics == ()
    with pytest.raises(PluginError, match="metric 'brevity' of mitigate-foo cannot be imported"):
        compose_run(["benchmark.extra_metrics=[brevity]"])


def test_the_testbed_takes_its_metrics_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(scorer) for scorer in Testbed(parser="official").scorers()] == [Chair, Pope]
    assert Testbed(parser="official").scorers()[1] == Pope(parser="official")
    assert Testbed(tasks=("pope",)).scorers() == [Pope()]
    monkeypatch.setitem(metrics()._builtin, "pope", "no_such_module:Pope")
    with pytest.raises(PluginError, match="metric 'pope'"):
        Testbed(tasks=("pope",)).metrics()


def test_a_metric_of_a_benchmark_can_be_added_where_its_task_is_not_measured() -> None:
    benchmark = Testbed(tasks=("pope",), extra_metrics=["chair"], limit=1)  # type: ignore[arg-type]
    measured = values(benchmark.counts(answers(benchmark, "yes")), benchmark.all_metrics())
    assert measured["pope/random/yes_rate"] == 1.0
    assert measured["chair_s"] != measured["chair_s"]  # no caption: undefined


def test_a_metric_that_does_not_fit_the_benchmark_says_what_is_missing() -> None:
    record = SampleRecord(id="1", image_id="1", task="caption", prompt="", text="a cat", meta={}, **DONE)
    with pytest.raises(DataError, match="has no 'objects' in its meta"):
        Chair().score(record, Testbed())
