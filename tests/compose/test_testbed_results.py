"""The sweep on the testbed: its settings, its rule, and the page that is made from its numbers alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

import results_testbed  # noqa: E402  # after its folder is known
import sweep_testbed  # noqa: E402
from sweep_testbed import Plan, admissible, best_of, candidates_of, choose, refused_of  # noqa: E402

from mitigate.compose import compose_sweep  # noqa: E402
from mitigate.errors import MitigateError  # noqa: E402


def row(
    chair: float,
    low: float = -0.01,
    high: float = 0.01,
    recall: float = 0.0,
    f1: float = 0.0,
    changed: float = 0.1,
    **values: Any,
) -> dict[str, Any]:
    """A row of one method with a difference of 0 to ``none`` unless said otherwise."""

    def difference(value: float, around: tuple[float, float] = (-0.02, 0.02)) -> dict[str, float]:
        return {"value": value, "low": value + around[0], "high": value + around[1], "p": 0.5, "p_holm": 1.0}

    metrics = dict.fromkeys(sweep_testbed.SHOWN, 0.5) | {"chair_i": chair}
    differences = {name: difference(0.0) for name in sweep_testbed.SHOWN}
    differences["chair_i"] = {"value": (low + high) / 2, "low": low, "high": high, "p": 0.01, "p_holm": 0.04}
    differences["recall"], differences["pope/mean/f1"] = difference(recall), difference(f1)
    effects = {"texts_changed": changed, "rows_edited_share": 1.0, "l1_per_row": 0.01, "tokens_edited_per_sample": 0.0}
    effects |= dict.fromkeys(
        ("tokens_changed_per_token", "rejections_per_token", "extra_forwards_per_token", "extra_backwards_per_token"),
        0.0,
    )
    return {
        "methods": {"toy": values} if values else {},
        "stack": ["toy"] if values else [],
        "metrics": metrics,
        "differences": differences if values else {},
        "effects": effects,
        "idle": [],
        "ms_per_token": 1.0,
        "overhead": 1.0,
        "commit": "0123abcde",
    }


DEFAULT = {"beta": 1}


def chosen(*rows: dict[str, Any]) -> Any:
    labels = {f"row {number}": item for number, item in enumerate(rows)}
    return choose({"rows": {"none": row(0.2), **labels}}, "toy", DEFAULT)


def test_the_rule_of_the_grid() -> None:
    rows = [row(0.20, beta=1), row(0.18, beta=2), row(0.10, recall=-0.02, beta=3), row(0.11, f1=-0.011, beta=4)]
    assert [admissible(item) for item in rows] == [True, True, False, False]
    assert best_of(rows, "toy", DEFAULT) == {"beta": 2}
    assert best_of([*rows, row(0.18, beta=5)], "toy", DEFAULT) == {"beta": 2}
    assert best_of([row(0.18, beta=2), row(0.18, beta=1)], "toy", DEFAULT) == DEFAULT
    assert best_of(rows[2:], "toy", DEFAULT) == DEFAULT
    assert admissible(row(0.1, recall=-0.01, f1=-0.01, beta=1))
    many = [*rows, row(0.19, beta=5), row(0.17, beta=6)]
    assert candidates_of(many, "toy") == [{"beta": 6}, {"beta": 2}, {"beta": 5}]
    assert candidates_of(rows[2:], "toy") == []


def test_the_rule_of_the_confirmation() -> None:
    default = row(0.20, beta=1)
    assert chosen(default, row(0.15, -0.06, -0.01, beta=2)) == {"beta": 2}
    assert chosen(default, row(0.15, -0.06, 0.0, beta=2)) == DEFAULT  # not beyond the interval
    assert chosen(default, row(0.15, -0.06, -0.01, recall=-0.02, beta=2)) == DEFAULT
    assert chosen(default, row(0.15, -0.06, -0.01, recall=-0.02, beta=2), row(0.18, -0.03, -0.01, beta=3)) == {
        "beta": 3
    }
    assert chosen(row(0.1, f1=-0.02, beta=1), row(0.15, -0.06, -0.01, beta=2)) == {"beta": 2}  # a default that fails
    assert chosen(row(0.14, -0.06, -0.01, beta=1), row(0.15, -0.06, -0.01, beta=2)) == DEFAULT
    assert chosen(default) == DEFAULT
    harmful = row(0.25, recall=-0.3, beta=1)
    assert chosen(harmful, row(0.2, beta=2), row(0.19, beta=3)) == {"beta": 3}  # no harm is enough then
    assert chosen(harmful, row(0.2, recall=-0.2, beta=2)) == DEFAULT


def test_settings_that_beat_none_but_are_refused_are_shown() -> None:
    rows = [row(0.2, beta=1), row(0.15, -0.06, -0.01, recall=-0.02, beta=2), row(0.16, -0.06, -0.01, f1=-0.02, beta=3)]
    step = {"rows": {str(number): item for number, item in enumerate([*rows, row(0.1, recall=-0.5, beta=4)])}}
    assert refused_of(step, {"toy": DEFAULT}) == {"toy": {"beta": 2}}
    assert refused_of({"rows": {"none": row(0.2), "a": row(0.15, -0.06, -0.01, beta=2)}}, {"toy": DEFAULT}) == {}
    plan = Plan(2, {"locore": {"beta": [0.15, 0.3]}})
    jobs = sweep_testbed.test_jobs(plan, {"locore": {"beta": 0.15}}, {"locore": {"beta": 0.3}}, ["benchmark.limit=2"])
    assert [job.label for job in jobs][:3] == ["none", "locore", "locore (refused)"]
    assert jobs[2].run.config["methods"]["locore"]["beta"] == 0.3


def test_every_grid_holds_the_methods_own_value() -> None:
    plan = Plan.read()
    assert set(plan.grids) == {"locore", "scr", "dleaf", "clva", "sgrs"}
    for method in plan.grids:
        settings = plan.settings(method)
        assert plan.default(method) in settings
        assert len(settings) == len({json.dumps(values) for values in settings})


def test_a_grid_is_what_multirun_makes_of_it() -> None:
    plan = Plan(2, {"locore": {"beta": [0.15, 0.3], "window": [3, 5]}})
    jobs = sweep_testbed.grid_jobs(plan, ["benchmark.limit=2"])
    swept = compose_sweep(
        ["benchmark.limit=2", "methods=[locore]", "methods.locore.beta=0.15,0.3", "methods.locore.window=3,5"]
    )
    assert [job.run.digest for job in jobs[1:]] == [run.digest for run in swept]
    assert [job.label for job in jobs][:2] == ["none", "locore beta=0.15 window=3"]


def test_the_test_step_runs_defaults_even_where_the_model_has_tuned_values() -> None:
    plan = Plan(2, {"locore": {"beta": [0.15, 0.3]}, "sgrs": {"alpha": [0.3, 0.6]}})
    tuned = {"locore": {"beta": 0.3}, "sgrs": {"alpha": 0.6}}
    jobs = {job.label: job.run for job in sweep_testbed.test_jobs(plan, tuned, {}, ["benchmark.limit=2"])}
    assert list(jobs) == [
        "none",
        "locore",
        "locore (tuned)",
        "sgrs",
        "sgrs+locore",
        "sgrs+locore (tuned)",
        "control_random",
        "control_probe",
    ]
    assert jobs["locore"].config["methods"]["locore"]["beta"] == 0.15
    assert jobs["locore"].provenance["methods.locore.beta"] == "command line"
    assert jobs["sgrs+locore (tuned)"].config["methods"]["locore"]["beta"] == 0.3
    assert list(jobs["sgrs+locore"].methods) == ["sgrs", "locore"]


def test_tuned_values_of_the_testbed_are_those_of_the_page() -> None:
    results = json.loads(results_testbed.NUMBERS.read_text(encoding="utf-8"))
    file = yaml.safe_load((ROOT / "conf" / "model" / "testbed.yaml").read_text(encoding="utf-8")) or {}
    wanted = {}
    for method, default in results["defaults"].items():
        values = choose(results["confirmation"], method, default)
        if changed := {key: value for key, value in values.items() if value != default[key]}:
            wanted[method] = changed
    assert file.get("tuned", {}) == wanted


def test_the_page_is_made_from_the_numbers() -> None:
    results = json.loads(results_testbed.NUMBERS.read_text(encoding="utf-8"))
    page = results_testbed.PAGE.read_text(encoding="utf-8")
    assert page == results_testbed.render(results)
    assert results_testbed.compact(results) == results_testbed.NUMBERS.read_text(encoding="utf-8")
    assert results["defaults"] == {method: Plan.read().default(method) for method in results["defaults"]}
    assert (results["grid"]["split"], results["confirmation"]["split"]) == ("validation", "validation")
    assert (results["test"]["split"], results["test"]["pictures"]) == ("test", 200)
    assert "not evidence about large models" in page


def page_of(**tested: dict[str, Any]) -> str:
    def step(split: str, rows: dict[str, Any]) -> dict[str, Any]:
        return {
            "split": split,
            "pictures": 9,
            "answers": 99,
            "seed": 0,
            "weights": "w",
            "rows": {"none": row(0.2), **rows},
        }

    rows = {"toy beta=1": row(0.2, beta=1)}
    results = {
        "defaults": {"toy": DEFAULT},
        "grids": {"toy": {"beta": [1]}},
        "grid": step("validation", rows),
        "confirmation": step("validation", rows),
        "test": step("test", tested),
    }
    return " ".join(results_testbed.render(results).split())


def test_words_follow_the_numbers() -> None:
    page = page_of(toy=row(0.15, -0.06, -0.04, beta=1))
    assert "CHAIR_i is better, beyond its interval (−5.0* [−6.0, −4.0])" in page
    assert "no effect can be told on recall (0.0 [−2.0, +2.0]) and mean POPE F1" in page
    assert "1 lower CHAIR_i beyond the interval (1 also after Holm's correction), 1 of them without losing" in page
    assert "nothing here is evidence" not in page
    page = page_of(toy=row(0.25, 0.04, 0.06, f1=-0.05, beta=1))
    assert "CHAIR_i is worse, beyond its interval" in page
    assert "mean POPE F1 is worse, beyond its interval (−5.0* [−7.0, −3.0])" in page
    assert "0 lower CHAIR_i beyond the interval (0 also after Holm's correction), 0 of them" in page
    assert "1 raise it; 0 cannot be told from no effect. So nothing here is evidence" in page
    page = page_of(toy=row(0.15, -0.06, -0.04, recall=-0.05, beta=1))
    assert "1 lower CHAIR_i beyond the interval (1 also after Holm's correction), 0 of them" in page
    assert "recall is worse, beyond its interval" in page


def test_a_method_without_any_effect_is_named() -> None:
    assert "`toy` changed no reply, although it acted." in page_of(toy=row(0.2, changed=0.0, beta=1))
    idle = row(0.2, changed=0.0, beta=1) | {"idle": ["toy"]}
    assert "`toy` changed no reply, and it did nothing." in page_of(toy=idle)


def test_a_small_grid_runs_and_resumes(tmp_path: Path) -> None:
    plan = Plan(1, {"locore": {"beta": [0.15, 0.9]}})
    arguments = argparse.Namespace(folder=str(tmp_path), stop_after="grid", scenes=1)

    def answers() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples*.jsonl")}

    first = sweep_testbed.run_steps(plan, arguments, Console(quiet=True))
    before = answers()
    assert len(before) == len(first["grid"]["rows"])
    assert list(first["grid"]["rows"]) == ["none", "locore beta=0.15", "locore beta=0.9"]
    assert first["grid"]["rows"]["locore beta=0.9"]["effects"]["rows_edited_share"] == 1.0
    assert sweep_testbed.run_steps(plan, arguments, Console(quiet=True)) == first
    assert answers() == before
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == first


def test_optuna_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MitigateError, match=r"pip install 'mitigate\[optuna\]'"):
        sweep_testbed.import_optuna()
    assert sweep_testbed.main(["--optuna", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: --optuna needs Optuna, which is not installed: pip install 'mitigate[optuna]'\n"
    )
    assert sweep_testbed.main(["--only", "nothing"]) == 2
    assert "--only nothing: not in sweep_testbed.yaml" in capsys.readouterr().err


def test_optuna_draws_from_the_ranges_of_the_grid() -> None:
    class Trial:
        def suggest_int(self, key: str, low: int, high: int) -> Any:
            return (key, "int", low, high)

        def suggest_float(self, key: str, low: float, high: float, step: float) -> Any:
            return (key, "float", low, high, step)

        def suggest_categorical(self, key: str, options: list[str]) -> Any:
            return (key, "one of", options)

    assert sweep_testbed.suggest(Trial(), "window", [3, 8, 5]) == ("window", "int", 3, 8)
    assert sweep_testbed.suggest(Trial(), "beta", [0.3, 0.05]) == ("beta", "float", 0.05, 0.3, 0.01)
    assert sweep_testbed.suggest(Trial(), "proposal", ["a", "b"]) == ("proposal", "one of", ["a", "b"])
