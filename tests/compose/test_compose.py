from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from mitigate.compose import ResolvedRun, comparison_name, compose_comparison, compose_run, compose_sweep
from mitigate.errors import ConfigError, PluginError
from mitigate.registry import Entry, methods
from tests.toys import Chooser, Toy

OUTSIDE = Entry("any", "outside_configs", "outside")

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def outside_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of configuration files, as another distribution would add it."""
    conf = tmp_path / "outside_configs"
    for group in ("model", "stack", "experiment"):
        (conf / group).mkdir(parents=True)
    (conf / "__init__.py").touch()
    (conf / "model" / "tuned.yaml").write_text(
        "name: tuned\npath: somewhere\ntuned:\n  toy: {beta: 0.2, window: 9, picks: [4]}\n"
    )
    (conf / "stack" / "outside_pair.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /methods: [chooser, toy]\n"
        "methods:\n  toy:\n    beta: 0.3\n    layers: 0-1\n"
    )
    (conf / "experiment" / "outside.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /stack: outside_pair\n"
        "seed: 5\nmethods:\n  toy:\n    strict: true\n    layers: 0-2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mitigate.compose.search_path.config_packages", lambda: (OUTSIDE,))
    monkeypatch.delitem(sys.modules, "outside_configs", raising=False)
    return conf


def sources(run: ResolvedRun, key: str) -> dict[str, tuple[Any, str]]:
    prefix = f"methods.{key}."
    return {
        name.removeprefix(prefix): (run.config["methods"][key][name.removeprefix(prefix)], source)
        for name, source in run.provenance.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("order", [["toy", "chooser"], ["chooser", "toy"]])
def test_methods_keep_their_order(order: list[str]) -> None:
    run = compose_run([f"methods=[{','.join(order)}]", "methods.toy.beta=1", "methods.chooser.alpha=0"])
    assert list(run.methods) == list(run.config["methods"]) == order
    assert run.stack_name == "+".join(order)
    assert run.methods["toy"] == Toy(beta=1.0)
    assert run.methods["chooser"] == Chooser(alpha=0.0)


def test_the_empty_run_is_complete() -> None:
    run = compose_run()
    assert run.methods == {}
    assert run.stack_name == run.config["stack"] == "none"
    assert run.config["model"]["name"] == "testbed"
    assert run.config["benchmark"] == {"name": "testbed", **run.benchmark.params()}
    assert run.config["tracker"]["mode"] == "offline"
    assert "tuned" not in run.config["model"]
    assert set(run.provenance.values()) == {"default"}


def test_every_layer_of_values_outranks_the_one_below(outside_configs: Path) -> None:
    run = compose_run(["model=tuned", "stack=outside_pair", "methods.toy.preset=lineage", "methods.toy.window=3"])
    assert sources(run, "toy") == {
        "preset": ("lineage", "command line"),
        "window": (3, "command line"),  # over the model's 9
        "beta": (0.3, "stack outside_pair"),  # over the preset's 0.7 and the model's 0.2
        "layers": ("0-1", "stack outside_pair"),  # over the preset's 1-2
        "picks": ([4], "model tuned"),
        "ceiling": (None, "default"),
        "strict": (False, "default"),
    }
    assert run.methods["toy"] == Toy(beta=0.3, layers="0-1", window=3, picks=(4,))
    assert list(run.methods) == ["chooser", "toy"]
    assert run.stack_name == "outside_pair"


def test_a_preset_that_was_asked_for_outranks_tuned_values(outside_configs: Path) -> None:
    found = sources(compose_run(["model=tuned", "methods=[toy]", "methods.toy.preset=lineage"]), "toy")
    assert found["beta"] == (0.7, "preset lineage")  # over the model's 0.2
    assert found["layers"] == ("1-2", "preset lineage")
    assert found["window"] == (9, "model tuned")  # the preset says nothing about it


def test_tuned_values_outrank_a_preset_that_nobody_asked_for(outside_configs: Path) -> None:
    found = sources(compose_run(["model=tuned", "methods=[toy]"]), "toy")
    assert found["preset"] == ("paper", "default")
    assert found["beta"] == (0.2, "model tuned")


@pytest.mark.parametrize("value", ["0.15", "0.2", "0.3", "0.7"])
def test_the_command_line_always_wins(outside_configs: Path, value: str) -> None:
    base = ["model=tuned", "stack=outside_pair", "methods.toy.preset=lineage"]
    found = sources(compose_run([*base, f"methods.toy.beta={value}"]), "toy")
    assert found["beta"] == (float(value), "command line")


def test_experiments_set_groups_and_values(outside_configs: Path) -> None:
    run = compose_run(["experiment=outside"])
    assert (run.config["seed"], run.provenance["seed"]) == (5, "experiment outside")
    assert sources(run, "toy")["strict"] == (True, "experiment outside")
    assert sources(run, "toy")["beta"] == (0.3, "stack outside_pair")
    assert sources(run, "toy")["layers"] == ("0-2", "experiment outside")  # over the stack's 0-1


def test_values_of_a_preset_for_methods_that_are_not_selected(outside_configs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"stack outside_pair sets methods.toy.beta, but methods=\[chooser\] does not"
    ):
        compose_run(["experiment=outside", "methods=[chooser]"])


def test_a_wrong_key_in_a_file_is_an_error(outside_configs: Path) -> None:
    preset = outside_configs / "stack" / "outside_pair.yaml"
    preset.write_text(preset.read_text().replace("beta", "betta"))
    with pytest.raises(ConfigError, match="betta"):
        compose_run(["stack=outside_pair"])
    model = outside_configs / "model" / "tuned.yaml"
    model.write_text(model.read_text().replace("window", "windo"))
    with pytest.raises(ConfigError, match=r"tuned.toy has no parameter 'windo'; did you mean 'window'"):
        compose_run(["model=tuned", "methods=[toy]"])


def test_taking_a_method_out() -> None:
    run = compose_run(["methods=[toy,chooser]", "~methods.toy"])
    assert list(run.methods) == ["chooser"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([], "outside_pair"),
        (["methods.toy.beta=1"], "outside_pair"),
        (["~methods.chooser"], "toy"),
        (["+methods.late={name: toy}"], "chooser+toy+late"),
        (["~methods.chooser", "~methods.toy"], "none"),
    ],
)
def test_a_stack_is_called_what_it_is(outside_configs: Path, changes: list[str], name: str) -> None:
    run = compose_run(["stack=outside_pair", *changes])
    assert run.stack_name == run.config["stack"] == name


def test_a_second_copy_under_its_own_key() -> None:
    run = compose_run(["methods=[toy]", "+methods.late={name: toy, beta: 1, preset: lineage}", "methods.late.window=7"])
    assert run.methods == {"toy": Toy(), "late": Toy(beta=1.0, layers="1-2", window=7)}
    assert run.stack_name == "toy+late"
    assert sources(run, "late")["beta"] == (1.0, "command line")
    assert sources(run, "late")["layers"] == ("1-2", "preset lineage")


def test_interpolations_see_final_values() -> None:
    run = compose_run(["methods=[toy]", "methods.toy.ceiling=${methods.toy.beta}", "seed=${decoding.max_new_tokens}"])
    assert run.methods["toy"] == Toy(ceiling=0.15)
    assert run.config["seed"] == run.config["decoding"]["max_new_tokens"]


def test_group_choices_have_a_source() -> None:
    run = compose_run(["decoding=sample", "decoding.temperature=0.5", "model=llava-1.5-7b"])
    assert run.provenance["decoding.do_sample"] == "decoding sample"
    assert run.provenance["decoding.temperature"] == "command line"
    assert run.provenance["model.layers"] == "model llava-1.5-7b"
    assert run.provenance["decoding.top_p"] == "default"
    assert run.facts is not None
    assert run.facts.layers == 32


def test_a_pinned_commit_belongs_to_its_repository() -> None:
    def revision(*overrides: str) -> Any:
        return compose_run(["model=llava-1.5-7b", *overrides]).config["model"]["revision"]

    assert len(revision()) == 40
    assert revision("model.path=maker/other") is revision("model.revision=null") is None
    assert revision("model.path=maker/other", "model.revision=v2") == "v2"


def test_a_broken_plugin_stops_only_runs_that_select_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods()._builtin, "ghost", "no_such_module:Ghost")
    assert list(compose_run(["methods=[toy]"]).methods) == ["toy"]
    with pytest.raises(PluginError, match="'ghost' of mitigate cannot be imported"):
        compose_run(["methods=[ghost]"])


def test_names_are_readable_and_follow_the_values() -> None:
    run = compose_run(["methods=[toy]"])
    assert run.run_name == f"testbed-testbed-toy-{run.digest}"
    assert run.digest == compose_run(["methods=[toy]", "methods.toy.beta=0.15", "tracker=none", "name=x"]).digest
    assert compose_run(["name=x"]).run_name == "x"
    assert "some-model" in compose_run(["model=hf", "model.path=/models/some-model/"]).run_name
    others = (["methods=[toy]", "seed=1"], ["methods=[toy]", "methods.toy.beta=0.2"], ["methods=[toy,chooser]"])
    digests = {compose_run(other).digest for other in [*others, ["methods=[chooser,toy]"]]}
    assert len({*digests, run.digest}) == 5


def test_a_sweep_is_the_product_of_its_values() -> None:
    runs = compose_sweep(["methods=[toy],[chooser],[]", "decoding.max_new_tokens=32,64"])
    found = [(run.stack_name, run.config["decoding"]["max_new_tokens"]) for run in runs]
    assert found == [(stack, tokens) for stack in ("toy", "chooser", "none") for tokens in (32, 64)]


def test_sweeps_keep_quotes_and_copies() -> None:
    runs = compose_sweep(["methods=[toy]", "methods.toy.beta=choice(0.1,0.2)", "+methods.b={name: toy}", "name='a b'"])
    assert [run.methods["toy"] for run in runs] == [Toy(beta=0.1), Toy(beta=0.2)]
    assert {run.config["name"] for run in runs} == {"a b"}


def test_jobs_that_differ_only_in_their_folder_are_no_repetition() -> None:
    assert len(compose_sweep(["stack=none", "name=a,b"])) == 2
    assert len(compose_sweep(["stack=none", "runs_dir=a,b"])) == 2


def test_a_comparison_has_one_run_per_stack() -> None:
    notes: list[str] = []
    runs = compose_comparison(
        ["stacks=[none,toy,chooser+toy]", "methods.toy.beta=1", "methods.chooser.alpha=0", "benchmark.limit=3"], notes
    )
    assert [run.stack_name for run in runs] == ["none", "toy", "chooser+toy"]
    assert [run.config["stack"] for run in runs] == ["none", "toy", "chooser+toy"]
    assert [dict(run.methods) for run in runs] == [
        {},
        {"toy": Toy(beta=1.0)},
        {"chooser": Chooser(alpha=0.0), "toy": Toy(beta=1.0)},
    ]
    assert {run.config["benchmark"]["limit"] for run in runs} == {3}
    assert notes == []


def test_a_stack_is_the_same_run_alone_and_in_any_comparison() -> None:
    alone = compose_run(["methods=[toy]"])
    (_, compared) = compose_comparison(["stacks=[none,toy]"])
    assert compared.config == alone.config


@pytest.mark.parametrize(
    ("stacks", "names", "note"),
    [
        ("[toy]", ["none", "toy"], "added"),
        ("[toy,none]", ["none", "toy"], "moved to the front"),
        ("[null,toy]", ["none", "toy"], None),
    ],
)
def test_the_baseline_comes_first(stacks: str, names: list[str], note: str | None) -> None:
    notes: list[str] = []
    assert [run.stack_name for run in compose_comparison([f"stacks={stacks}"], notes)] == names
    assert [note in found for found in notes] == ([] if note is None else [True])


def test_comparison_names_follow_stacks_and_values() -> None:
    first = comparison_name(compose_comparison(["stacks=[none,toy]"]))
    assert first.startswith("testbed-testbed-2-stacks-")
    assert first == comparison_name(compose_comparison(["stacks=[none,toy]", "tracker=none"]))
    assert first != comparison_name(compose_comparison(["stacks=[none,toy]", "methods.toy.beta=1"]))
    assert comparison_name(compose_comparison(["stacks=[none,toy]", "name=mine"])) == "mine"


def test_an_open_hydra_is_left_as_it_was() -> None:
    state = GlobalHydra.instance().hydra
    compose_run()
    assert GlobalHydra.instance().hydra is state
