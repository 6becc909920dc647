"""One model over several devices: parts in memory, parts on disk, and every stack does what it does undivided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from mitigate.core.method import Method
from mitigate.core.stack import Stack
from mitigate.registry import methods
from mitigate.runner.devices import is_divided, is_out_of_memory, place
from mitigate.testing.running import REFUSALS
from mitigate.testing.tiny import TinyModel, tiny_model

CPU = torch.device("cpu")
#: Methods by name, ``NAME:PRESET``; the last one reads weights outside their own forward.
STACKS = {
    "none": [],
    "locore": ["locore"],
    "scr": ["scr"],
    "dleaf": ["dleaf"],
    "clva": ["clva"],
    "exact gradients": ["sgrs"],
    "three": ["locore", "scr", "sgrs"],
    "no graph": ["sgrs:forward-only"],
}


def made(name: str) -> Method:
    plugin, _, preset = name.partition(":")
    kind = methods().get(plugin)
    method: Method = kind(**kind.presets[preset]) if preset else kind()
    return method


def answered(tiny: TinyModel, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    with Stack([made(name) for name in names]).attach(tiny.model, tiny.processor) as handle:
        output = handle.generate(
            **tiny.inputs(), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, seed=1
        )
        counted = handle.telemetry()
    for counters in (counters for row in counted for counters in row.values()):
        counters.pop("seconds", None)
    return output.sequences, torch.stack(output.logits, 1), counted


def every_other_layer_on_disk(tiny: TinyModel, folder: Path) -> None:
    """Divide as ``device_map`` does: a hook on every part, the layers by turns in memory and on disk."""
    places = {id(part): name for name, part in tiny.model.named_modules()}
    layers = [places[id(layer)] for layer in tiny.adapter.decoder_layers(tiny.model)]
    parts: dict[str, Any] = {}

    def divide(part: torch.nn.Module, name: str) -> None:
        if name in layers:
            parts[name] = "disk" if layers.index(name) % 2 else "cpu"
        elif any(layer.startswith(f"{name}.") for layer in layers) or not name:
            for child, inner in part.named_children():
                divide(inner, f"{name}.{child}" if name else child)
            for own, _ in part.named_parameters(recurse=False):
                parts[f"{name}.{own}" if name else own] = "cpu"
        else:
            parts[name] = "cpu"

    divide(tiny.model, "")
    dispatch_model(tiny.model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OTHERS = [("qwen2_vl", "three"), ("llava_next", "three"), ("instructblip", "exact gradients")]


@pytest.mark.parametrize(("family", "stack"), [*(("llava", stack) for stack in STACKS), *OTHERS])
def test_a_divided_model_answers_as_the_whole_one(family: str, stack: str, tmp_path: Path) -> None:
    try:
        whole = answered(tiny_model(family), STACKS[stack])
    except REFUSALS as refusal:
        pytest.skip(str(refusal))
    divided = tiny_model(family)
    every_other_layer_on_disk(divided, tmp_path)
    assert is_divided(divided.model)
    assert any(parameter.is_meta for parameter in divided.model.parameters())
    tokens, logits, counted = answered(divided, STACKS[stack])
    assert torch.equal(tokens, whole[0])
    assert torch.equal(logits, whole[1])
    assert counted == whole[2]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("stack", ["three", "no graph"])
def test_a_model_that_waits_outside_its_device_answers_as_one_on_it(stack: str, where: str, tmp_path: Path) -> None:
    """Nothing has a device of its own then: ``model.device`` is meta."""
    whole, waiting = answered(tiny_model("llava"), STACKS[stack]), tiny_model("llava")
    if where == "disk":
        disk_offload(waiting.model, str(tmp_path), execution_device=CPU)
    else:
        cpu_offload(waiting.model, execution_device=CPU)
    assert all(parameter.is_meta for parameter in waiting.model.parameters())
    tokens, logits, counted = answered(waiting, STACKS[stack])
    assert torch.equal(tokens, whole[0])
    assert torch.equal(logits, whole[1])
    assert counted == whole[2]


def test_a_divided_model_is_not_moved(tmp_path: Path) -> None:
    divided = tiny_model("llava")
    every_other_layer_on_disk(divided, tmp_path)
    before = {name: parameter.device for name, parameter in divided.model.named_parameters()}
    place(divided.model, CPU)  # a model with hooks refuses to be moved
    assert {name: parameter.device for name, parameter in divided.model.named_parameters()} == before
    whole = tiny_model("llava").model
    assert not is_divided(whole)
    place(whole, torch.device("meta"))
    assert whole.device.type == "meta"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_two_gpus(family: str, stack: str) -> None:
    whole, divided = tiny_model(family), tiny_model(family)
    expected = answered(whole, STACKS[stack])
    layers = whole.adapter.decoder_layers(whole.model)
    places = {id(part): name for name, part in whole.model.named_modules()}
    parts: dict[str, Any] = {"": 0, **{places[id(layer)]: index % 2 for index, layer in enumerate(layers)}}
    dispatch_model(divided.model, parts, main_device=0, force_hooks=True)
    tokens, logits, _ = answered(divided, STACKS[stack])
    assert torch.equal(tokens.cpu(), expected[0])
    assert torch.allclose(logits.cpu(), expected[1], atol=1e-3)


def test_what_is_out_of_memory() -> None:
    method_failed = RuntimeError("a method failed")
    method_failed.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(method_failed)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB"))
    assert not is_out_of_memory(RuntimeError("no such thing"))
