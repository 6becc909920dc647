"""Quantised models: what runs on them, and what is refused. What needs torchao or bitsandbytes is skipped without."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mitigate import Stack
from mitigate.adapters import adapter_for, load_model
from mitigate.adapters.quantising import QUANTIZATIONS
from mitigate.compose import checks
from mitigate.core.differentiable import check_gradients
from mitigate.core.direct import DirectPath
from mitigate.errors import ConfigError, DataError, MitigateError, UnsupportedModel
from mitigate.methods.sgrs import SGRS
from mitigate.testing.tiny import tiny_model

PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")


class Packed(nn.Module):
    """A linear map with weights of eight bits, as quantised layers are: no matrix to read, gradients or none."""

    def __init__(self, linear: nn.Linear, gradients: bool) -> None:
        super().__init__()
        self.in_features, self.gradients = linear.in_features, gradients
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = torch.zeros(linear.out_features)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, states: Tensor) -> Tensor:
        states = states if self.gradients else states.detach()
        return nn.functional.linear(states, self.dense().to(states.dtype), self.bias.to(states.dtype))


def packed(gradients: bool) -> Any:
    """The tiny LLaVA with packed output projections."""
    tiny = tiny_model("llava")
    for layer in adapter_for(tiny.model).decoder_layers(tiny.model):
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj, gradients)
    return tiny


def run(model: Any, processor: Any, gradient: str) -> dict[str, float]:
    inputs = adapter_for(model).inputs(model, processor, ["what is there"], [[PICTURE]])
    with Stack([SGRS(layers="all", gradient=gradient)]).attach(model, processor) as handle:
        handle.generate(**inputs, max_new_tokens=3)
        return dict(handle.telemetry()[0]["sgrs"])


def test_gradients_are_refused_where_layers_keep_them_back() -> None:
    tiny = packed(gradients=False)
    message = r"sgrs needs gradients.*\(Packed\).*\n.*access='direct'"
    with pytest.raises(UnsupportedModel, match=message):
        run(tiny.model, tiny.processor, "exact")
    assert run(tiny.model, tiny.processor, "direct")["steps"] == 3


class Mute(Packed):
    """Says nothing of it: every gradient is zero."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + 0 * states.sum()


def test_layers_that_let_nothing_but_zeros_through_are_found() -> None:
    tiny = packed(gradients=False)
    for layer in tiny.adapter.decoder_layers(tiny.model):
        layer.self_attn.o_proj.__class__ = Mute
    with pytest.raises(UnsupportedModel, match=r"\(Mute\)"):
        check_gradients("sgrs", tiny.model, tiny.adapter)


def test_gradients_are_tried_whatever_mode_the_caller_is_in() -> None:
    tiny = packed(gradients=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            check_gradients("sgrs", tiny.model, tiny.adapter)


def test_gradients_pass_through_layers_that_let_them() -> None:
    tiny = packed(gradients=True)
    assert run(tiny.model, tiny.processor, "exact")["extra_backwards"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_direct_path_reads_layers_that_have_no_matrix(dtype: torch.dtype) -> None:
    tiny = packed(gradients=False)
    tiny.model.to(dtype)
    adapter = adapter_for(tiny.model)
    path = DirectPath(tiny.model, adapter)
    for index, layer in enumerate(adapter.decoder_layers(tiny.model)):
        module = layer.self_attn.o_proj
        module.bias = torch.linspace(-1, 1, len(module.bias))
        assert torch.allclose(path._weight(index, module).float(), module.dense(), rtol=1e-2, atol=1e-6)


def test_an_exact_zero_before_the_last_norm_leaves_all_slopes_finite() -> None:
    tiny = tiny_model("llava")
    path = DirectPath(tiny.model, tiny.adapter)
    with ExitStack() as undo:
        path.install(undo)
        tiny.adapter.final_norm(tiny.model)(torch.eye(32)[None, :2])
    weights, values = torch.rand(1, 4, 3), torch.rand(1, 2, 3, 8)
    cotangent = torch.rand(1, tiny.adapter.unembedding(tiny.model).out_features)
    slopes = path.gradients({0: (weights, values)}, cotangent)[0]
    assert bool(slopes.isfinite().all())
    assert bool(slopes.any())


def test_words_of_the_configuration() -> None:
    assert tuple(QUANTIZATIONS) == checks._QUANTIZATIONS
    with pytest.raises(ConfigError, match=r"model.quantization=int3 is unknown; use int8, bnb-8bit, bnb-4bit"):
        load_model("testbed", quantization="int3")


@pytest.mark.parametrize(("word", "package"), [("int8", "torchao"), ("bnb-4bit", "bitsandbytes")])
def test_a_package_that_is_not_there(word: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mitigate.adapters.quantising.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf"needs {package}, which is not installed: pip install 'mitigate\[quantized\]'"
    ):
        load_model("testbed", quantization=word)


@pytest.mark.parametrize(("word", "exact"), [("int8", True), ("bnb-8bit", True), ("bnb-4bit", False)])
def test_quantised_models_answer(word: str, exact: bool) -> None:
    """Gradients pass through eight bits; through four it is up to the device, so that only the direct path is sure."""
    pytest.importorskip(QUANTIZATIONS[word].package)
    loaded = load_model("testbed", quantization=word)
    layer = loaded.adapter.decoder_layers(loaded.model)[0]
    whole = load_model("testbed")
    matrix = whole.adapter.decoder_layers(whole.model)[0].self_attn.o_proj.weight
    read = DirectPath(loaded.model, loaded.adapter)._weight(0, layer.self_attn.o_proj)
    error = float((read - matrix).detach().norm() / matrix.detach().norm())
    assert 0 < error < 0.2
    assert run(loaded.model, loaded.processor, "direct")["steps"] == 3
    if exact:
        assert run(loaded.model, loaded.processor, "exact")["extra_backwards"] == 3


@pytest.mark.parametrize("word", ["int8", "bnb-8bit", "bnb-4bit"])
def test_damaged_quantised_weights(word: str, tmp_path: Path) -> None:
    pytest.importorskip(QUANTIZATIONS[word].package)
    loaded = load_model("testbed", quantization=word)
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    inputs = again.inputs(["what is there"], [[PICTURE]])
    with torch.no_grad():
        assert torch.allclose(again.model(**inputs).logits, loaded.model(**inputs).logits, atol=1e-4)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(DataError, match="copy them again") as caught:
        load_model(str(tmp_path))
    assert isinstance(caught.value, MitigateError)
