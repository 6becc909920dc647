"""Everything a user can get wrong on the command line: who is named, and what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from mitigate.compose import compose_comparison, compose_comparison_sweep, compose_run, compose_sweep
from mitigate.errors import ConfigError, StackConflict, UnknownName

pytestmark = pytest.mark.usefixtures("toys")

RUNS = [
    # groups
    ("methods=toy", r"methods is a list; write 'methods=\[toy\]'"),
    ("methods=[toy,toy]", r"names toy twice; .*'\+methods.toy_2=\{name: toy\}'"),
    ("methods=[tou]", "unknown method 'tou'; did you mean 'toy'"),
    ("methods=[3]", "3 is no method name"),
    ("~methods", "drop ~methods"),
    ("model=testbad", "did you mean 'testbed'"),
    ("model=null", "model takes one name"),
    ("model=[testbed]", "model takes one name"),
    ("stack=non", "did you mean 'none'"),
    ("benchmark=testbad", "unknown benchmark 'testbad'; did you mean 'testbed'"),
    ("benchmark=null", "benchmark takes one name"),
    ("tracker=ofline", "did you mean 'offline'"),
    ("decoding=greddy", "did you mean 'greedy'"),
    ("trainer=tpu", "known: cpu, ddp, gpu"),
    ("experiment=quik", "did you mean 'quick'"),
    ("+model=testbed", r"drop the leading \+"),
    ("foo/bar=x", "no such group"),
    # keys
    ("sgrs", "'sgrs' is no override; write key=value"),
    ("a b=1", "cannot read 'a b=1' as key=value"),
    ("name=[a", "cannot read"),
    ("sed=1", "unknown key 'sed' .*did you mean 'seed'"),
    ("decoding.max_tokens=4", "decoding has no key 'max_tokens'; did you mean 'max_new_tokens'"),
    ("trainer.batchsize=4", "did you mean 'batch_size'"),
    ("benchmark.limt=4", "testbed has no parameter 'limt'; did you mean 'limit'"),
    ("seed.x=1", "seed is a single value"),
    ("+seed=1", r"drop the leading \+"),
    ("~seed", "only methods can be taken out"),
    ("hydra.run.dir=x", "no effect here"),
    ("stacks=[none]", "a run has one stack"),
    ("model.tuned.toy.beta=1", r"set methods\.NAME\.PARAMETER instead"),
    # types and values
    ("seed=one", "seed=one has the wrong type: seed is int"),
    ("decoding.max_new_tokens=1.5", "max_new_tokens is int"),
    ("decoding.do_sample=maybe", "do_sample is bool"),
    ("tracker.tags=a", r"tags is list\[str\]"),
    ("benchmark.limit=abc", r"limit is int \| None"),
    ("benchmark.limit=0", "benchmark.limit=0 must be at least 1"),
    ("seed=???", r"give a value instead of \?\?\?"),
    ("seed=1,2", "several values: add -m"),
    ("methods=[toy],[]", "several values: add -m"),
    ("seed=-1", r"seed=-1 must be at least 0 and below 2\*\*32"),
    ("seed=4294967296", r"seed=4294967296 must be at least 0 and below 2\*\*32"),
    ("trainer.accelerator=foo", "trainer.accelerator=foo must be one of auto, cpu, gpu"),
    ("trainer.strategy=foo", "trainer.strategy=foo must be auto, or ddp"),
    ("trainer.devices=0", "trainer.devices=0 must be at least 1"),
    ("model.revision=main", "model.revision=main has no effect: the testbed ships"),
    ("decoding.max_new_tokens=0", "must be at least 1"),
    ("decoding.temperature=0.5", "no effect without sampling; add decoding=sample"),
    ("decoding.top_p=2", "top_p=2.0 must be above 0 and at most 1"),
    ("model.dtype=int8", "must be one of float32, bfloat16, float16"),
    ("model=hf", "model.path= must name a checkpoint"),
    ("tracker.name=wandbb", "did you mean 'wandb'"),
    ("tracker.mode=on", "tracker.mode=on must be one of offline, online, disabled, shared"),
    ("name=a/b", "plain folder name"),
    ("trainer.batch_size=0", "must be at least 1"),
    ("name=${nothing}", "nothing"),
]

METHODS = [
    ("methods.chooser.alpha=1", r"sets a value of chooser, which is not in the stack \(toy\)"),
    ("methods.toi.beta=1", "unknown method 'toi'; did you mean 'toy'"),
    ("methods.toy.betta=1", "toy has no parameter 'betta'; did you mean 'beta'"),
    ("methods.toy.beta=abc", "methods.toy.beta=abc has the wrong type: beta is float"),
    ("methods.toy.beta=null", "beta is float"),
    ("methods.toy.window=1.5", "window is int"),
    ("methods.toy.window=0", "methods.toy.window=0 must be positive"),
    ("methods.toy.picks=[a]", r"picks is tuple\[int, ...\]"),
    ("methods.toy.preset=linage", "methods.toy.preset=linage is unknown; did you mean 'lineage'"),
    ("methods.toy.name=chooser", "a method's name is fixed"),
    ("methods.toy=3", "toy is already in the stack"),
    ("~methods.chooser", "takes nothing out: the stack is toy"),
    ("+methods.late={beta: 1}", "needs its name"),
    ("+methods.late={name: toi}", "did you mean 'toy'"),
    ("+methods.late={name: toy, bta: 1}", "late has no parameter 'bta'; did you mean 'beta'"),
    ("+methods.late={name: toy, window: 1.5}", "window is int"),
    ("methods.late={name: toy}", r"late is new; put a \+ before methods"),
    ("+methods.toy={name: toy}", "toy is already in the stack"),
    ("methods.toy.beta=${decoding.nothing}", "decoding.nothing"),
]


@pytest.mark.parametrize(("override", "message"), RUNS)
def test_run(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_run([override])
    assert 1 <= len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(("override", "message"), METHODS)
def test_values_of_methods(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_run(["methods=[toy]", override])
    assert 1 <= len(str(caught.value).splitlines()) <= 2


def test_value_of_a_method_that_was_taken_out() -> None:
    with pytest.raises(ConfigError, match="not in the stack"):
        compose_run(["methods=[toy,chooser]", "~methods.toy", "methods.toy.beta=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stack=locore", "methods=[toy]"], r"stack=locore and methods=\[toy\] both choose the methods"),
        (["methods=[]", "stack=none"], "both choose the methods"),
        (["stack=locore", "stack=scr"], "stack=locore and stack=scr: stack is chosen once"),
        (["model=testbed", "model=llava-1.5-7b"], "model is chosen once"),
        (["methods=[toy]", "methods=[chooser]"], "methods is chosen once"),
        (["benchmark=testbed", "benchmark=testbed"], "benchmark is chosen once"),
    ],
)
def test_choices_that_contradict_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(overrides)


def test_a_refused_value_of_a_preset_is_traced_to_it() -> None:
    hint = r"names layer 9.*\nthe value comes from preset lineage; set methods.locore.layers=VALUE"
    with pytest.raises(ConfigError, match=hint):
        compose_run(["methods=[locore]", "methods.locore.preset=lineage"])
    with pytest.raises(ConfigError, match="names layer 9") as caught:
        compose_run(["methods=[locore]", "methods.locore.layers=9"])
    assert "comes from" not in str(caught.value)


def test_a_method_that_needs_the_testbed_on_another_model() -> None:
    with pytest.raises(ConfigError, match=r"control_probe works on model=testbed only.*choose model=testbed"):
        compose_run(["stack=control_probe", "model=llava-1.5-7b"])
    assert list(compose_run(["stack=control_probe"]).methods) == ["control_probe"]


@pytest.mark.parametrize("text", ["[]", "{", '{"text_config": {"num_hidden_layers": "four"}}'])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json is no model configuration \("):
        compose_run(["model=hf", f"model.path={tmp_path}", "stack=scr"])


def test_all_devices_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices=-1 must be at least 1 with trainer.accelerator=cpu"):
        compose_run(["trainer=cpu", "trainer.devices=-1"])


@pytest.mark.parametrize("mode", ["null", "offline", "online", "disabled", "shared"])
def test_every_mode_of_the_tracker_composes(mode: str) -> None:
    assert compose_run([f"tracker.mode={mode}"]).config["tracker"]["mode"] == (None if mode == "null" else mode)


def test_beams_and_a_method_that_chooses_tokens() -> None:
    with pytest.raises(StackConflict, match=r"chooser .*num_beams=5; use decoding.num_beams=1 or take chooser out"):
        compose_run(["methods=[chooser]", "decoding=beam"])


def test_two_methods_that_choose_tokens() -> None:
    geometry = ["model=llava-1.5-7b"]
    with pytest.raises(StackConflict, match="chooser and again"):
        compose_run([*geometry, "methods=[chooser]", "+methods.again={name: chooser}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stacks=none"], r"must be a list of names; write 'stacks=\[none"),
        (["stacks=[none,toi]"], "unknown stack 'toi' .*did you mean 'toy'"),
        (["stacks=[none,toy+toi]"], r"unknown stack 'toy\+toi' \('toi'\); did you mean 'toy'"),
        (["stacks=[none,toy+toy]"], r"stacks: toy\+toy names toy twice; name it once"),
        (["stacks=[none+toy]"], r"stacks: none\+toy adds to none, the stack without methods; write toy"),
        (["stacks=[none,null]"], r"stacks names none twice \(null is none, too\)"),
        (["stacks=[none,toy+chooser,'toy + chooser']"], r"stacks names toy\+chooser twice"),
        (["stacks=[]"], r"stacks=\[\] compares nothing; write 'stacks=\[none"),
        (["model=testbed", "model=testbed"], "model is chosen once"),
        (["stacks=[none,toy,toy]"], "stacks names toy twice"),
        (["stacks=[none,3]"], "must be a list of names"),
        (["stacks=[none,toy]", "methods.chooser.alpha=1"], "no stack of the comparison has chooser"),
        (["stacks=[none,toy]", "methods.toi.alpha=1"], "did you mean 'toy'"),
        (["stacks=[none,toy]", "methods.toy.betta=1"], "did you mean 'beta'"),
        (["methods=[toy]"], r"a comparison takes stacks=\[none"),
        (["stack=none"], r"a comparison takes stacks=\[none"),
        (["stacks=[none]", "~methods.toy"], r"a comparison takes stacks=\[none"),
        (["stacks=[none]", "+methods.x={name: toy}"], r"a comparison takes stacks=\[none"),
    ],
)
def test_comparison(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_comparison(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "no override has several"),
        (["seed=interval(0,1)"], "only lists"),
        (["methods=[toy]", "methods.toy.beta=0.1,abc"], "beta=abc has the wrong type"),
        (["methods=[toy],[tou]"], "did you mean 'toy'"),
        (["seed=1,1"], r"job 2 \(seed=1\) repeats job 1"),
        (["stack=none", "tracker=none,offline"], "repeats job 1"),
    ],
)
def test_a_sweep_is_checked_whole(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_sweep(overrides)


def test_a_sweep_of_comparisons_is_checked_whole() -> None:
    with pytest.raises(ConfigError, match="repeats job 1"):
        compose_comparison_sweep(["stacks=[none,toy],[none,toy]"])
    with pytest.raises(UnknownName, match="unknown stack"):
        compose_comparison_sweep(["stacks=[none],[none,nothing]"])
