"""Where weights go: device maps, disk, and memory that is too small."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mitigate import Stack
from mitigate.adapters import LoadedModel, load_model
from mitigate.adapters.placing import (
    check_devices,
    device_arguments,
    free_bytes,
    input_device,
    needed_bytes,
    stored_numbers,
)
from mitigate.compose import compose_run
from mitigate.core.differentiable import check_gradients
from mitigate.errors import ConfigError
from mitigate.methods.sgrs import SGRS
from mitigate.runner.devices import is_divided, place
from mitigate.testbed.model import checkpoint_path

PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
#: What lies on disk, from nothing but the first layers to everything.
MAPS: dict[str, dict[str, Any]] = {
    "cpu and disk": {"device_map": "auto", "max_memory": {"cpu": "2MB"}},
    "disk": {"device_map": dict.fromkeys(PARTS, "disk")},
}


def answer(loaded: LoadedModel, method: SGRS) -> tuple[torch.Tensor, dict[str, float]]:
    inputs = loaded.inputs(["Describe the picture."], [[PICTURE]])
    with Stack([method]).attach(loaded.model, loaded.processor) as handle:
        tokens = handle.generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokens, {key: value for key, value in handle.telemetry()[0]["sgrs"].items() if key != "seconds"}


@pytest.fixture(scope="module")
def whole() -> LoadedModel:
    return load_model("testbed")


@pytest.mark.parametrize("name", MAPS)
def test_a_divided_model_answers_as_a_whole_one(name: str, whole: LoadedModel, tmp_path: Path) -> None:
    loaded = load_model("testbed", offload_folder=str(tmp_path), **MAPS[name])
    assert is_divided(loaded.model)
    assert input_device(loaded.model).type == "cpu"
    assert any(part.device.type == "meta" for part in loaded.model.parameters())
    place(loaded.model, torch.device("cpu"))  # leaves it alone
    for gradient in ("exact", "direct"):
        method = SGRS(layers="3-5", gradient=gradient, proposal="greedy_order")
        expected, counted = answer(whole, method)
        tokens, counters = answer(loaded, method)
        assert torch.equal(tokens, expected)
        assert counters == pytest.approx(counted)
    check_gradients("sgrs", loaded.model, loaded.adapter)


def test_a_whole_model_is_not_divided(whole: LoadedModel) -> None:
    assert not is_divided(whole.model)
    assert input_device(whole.model) == torch.device("cpu")


def test_inputs_go_where_a_divided_model_wants_them() -> None:
    """Whatever device its first weights wait on."""
    model: Any = torch.nn.Linear(2, 2)
    model._hf_hook = SimpleNamespace()
    with torch.device("meta"):
        assert input_device(torch.nn.Linear(2, 2)) == torch.device("cpu")  # type: ignore[arg-type]
    for wanted, device in ((None, "cpu"), ("cuda:1", "cuda:1")):
        model._hf_hook.execution_device = wanted
        assert input_device(model) == torch.device(device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("foo", None, None), "model.device_map=foo is unknown; use auto, balanced, sequential or a mapping"),
        ((None, {"cpu": "1GB"}, None), "model.max_memory=.* has no effect without model.device_map"),
        ((None, None, "x"), "model.offload_folder=x has no effect without model.device_map"),
        (({}, None, None), "model.device_map={} names no part"),
        (({"lm_head": "meta"}, None, None), "model.device_map: meta is no device; use the number of a GPU, cpu"),
        (({"lm_head": [1]}, None, None), r"model.device_map: \[1\] is no device"),
        (("auto", {"banana": "1GB"}, None), "model.max_memory: banana is no device"),
        (("auto", {"cpu": "-1GB"}, None), "model.max_memory: -1GB is no amount of memory; use bytes, or text such as"),
        (("auto", {"cpu": None}, None), "model.max_memory: None is no amount"),
        (("auto", None, f"{__file__}/x"), "model.offload_folder=.*/x cannot be made: Not a directory; name another"),
    ],
)
def test_device_maps_that_are_refused(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        device_arguments(*arguments)


def test_gpus_are_numbers() -> None:
    made = device_arguments({"lm_head": "0", "": "cpu"}, {"0": "20GB", "cpu": "60GB"}, None)
    assert made == {"device_map": {"lm_head": 0, "": "cpu"}, "max_memory": {0: "20GB", "cpu": "60GB"}}


def test_a_map_that_does_not_fit_the_model() -> None:
    with pytest.raises(
        ConfigError, match=r"model.device_map=.* does not work for 'testbed'.*\nuse model.device_map=auto"
    ):
        load_model("testbed", device_map={"": "cpu", "lm_head": "disk"})
    with pytest.raises(ConfigError, match=r"the model has no part language_model; it has model, model.vision_tower, "):
        load_model("testbed", device_map={"": "cpu", "language_model": "cpu"})


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"device_map": {"lm_head": 0, "": "cpu"}}, 0),
        ({"device_map": {"lm_head": "cuda", "": "cpu"}}, 0),
        ({"device_map": {"lm_head": "cuda:2", "": "cpu"}}, 2),
        ({"device_map": "auto", "max_memory": {1: "1GB", "cpu": "1GB"}}, 1),
    ],
)
def test_gpus_that_are_not_there(arguments: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.device_count", lambda: number + 1)
    check_devices(arguments)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: number)
    with pytest.raises(ConfigError, match=f"torch sees {number} GPUs on this machine, and none is number {number}"):
        check_devices(arguments)


# --------------------------------------------------------------------------------------------------------------- memory


def test_numbers_are_counted_without_reading_them(tmp_path: Path) -> None:
    """One file, and shards of which the index leaves one out."""
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert stored_numbers(str(tmp_path), None, local=True) == {"F32": 15, "F16": 7}
    save_file({"c": torch.zeros(2, dtype=torch.int64), "d": torch.zeros(())}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    numbers = stored_numbers(str(tmp_path), None, local=True)
    assert numbers == {"F32": 16, "F16": 7, "I64": 2}
    assert needed_bytes(numbers, torch.float16, None) == 2 * 23 + 16
    assert needed_bytes(numbers, torch.float32, 4) == 23 / 2 + 16
    assert stored_numbers(str(tmp_path / "nowhere"), None, local=True) == {}


def test_the_testbed_needs_what_it_takes(whole: LoadedModel) -> None:
    taken = sum(part.numel() * 4 for part in whole.model.parameters())
    assert needed_bytes(stored_numbers(checkpoint_path(), None, local=True), torch.float32, None) == taken


@pytest.mark.parametrize(("free", "fits"), [(1e6, False), (1e9, True), (None, True)])
def test_too_little_memory(free: float | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mitigate.adapters.placing.free_bytes", lambda device: free)
    if fits:
        load_model("testbed")
        return
    with pytest.raises(
        ConfigError, match=r"needs at least 0\.0 GB in float32, and cpu has 0\.0 GB free\n.*model.dtype=b"
    ):
        load_model("testbed")
    load_model("testbed", device_map="auto")  # a map finds room by itself


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 + device.index, 80))  # free, all
    assert free_bytes(torch.device("cuda", 1)) == 4


def test_free_memory_is_known_here() -> None:
    assert (free_bytes(torch.device("cpu")) or 0) > 1e6
    assert free_bytes(torch.device("meta")) is None


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.device_map=foo"], "model.device_map=foo must be null, auto, balanced, sequential"),
        (["model.device_map=auto", "trainer.devices=2"], "trainer.devices=2 must be 1, on one node: model.device_map"),
        (["model.offload_folder=x"], "model.offload_folder=x must be left out, or stand beside a model.device_map"),
        (["model.device_map=auto", "model.max_memory=3"], "model.max_memory=3 must be a mapping"),
        (["model.quantization=int3"], "model.quantization=int3 must be null or one of int8, bnb-8bit, bnb-4bit"),
    ],
)
def test_configurations_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(overrides)


def test_where_parts_lie_does_not_name_another_run() -> None:
    plain, divided = compose_run([]), compose_run(["model.device_map=auto", "model.max_memory={0: 20GB}"])
    assert divided.config["model"]["max_memory"] == {"0": "20GB"}
    assert plain.digest == divided.digest != compose_run(["model.quantization=int8"]).digest
