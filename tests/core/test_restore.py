"""Leaving the context, in whatever way, leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mitigate.core import (
    Access,
    Fidelity,
    Method,
    Point,
    Subscription,
    Tags,
)
from mitigate.core.attention import SERVED_BY
from mitigate.core.stack import Stack
from mitigate.errors import HookError, LayoutError, MitigateError, PluginError, StackConflict, UnsupportedModel
from mitigate.methods.control_probe import ControlProbe
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from tests.references.tiny import PAD, make_inputs

STACK = [SCR(lam=1.5, k_src=3), LocoRE(beta=0.5), SGRS(layers="2-3")]


def snapshot(model):
    hooks = [
        (name, kind, tuple(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    implementations = [
        module.config._attn_implementation for module in model.modules() if getattr(module, "config", None) is not None
    ]
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return hooks, attributes, implementations, flags, model.training


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """Raises at a chosen point."""

    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "raises"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point))
    point: str = "attention_probs"
    error: type[BaseException] = ValueError
    step: int = 2

    def subscriptions(self, model):
        layers = (1,) if self.point in ("attention_probs", "hidden_states") else ()
        return [Subscription(point=Point(self.point), layers=layers)]

    def _handle(self, event, state):
        if event.step >= self.step:
            raise self.error("on purpose")

    on_attention_probs = on_hidden_states = on_next_token_logits = on_step_begin = on_sample_end = _handle


@pytest.fixture
def untouched(model):
    """Compare everything that could be left behind, and the logits bit for bit."""
    inputs = make_inputs(model, [(3, 1, 6), (2, 1, 4)], seed=1)
    before, logits = snapshot(model), model(**inputs).logits
    yield inputs
    assert snapshot(model) == before
    assert not any(module in SERVED_BY for module in model.modules())
    assert torch.equal(model(**inputs).logits, logits)


def test_after_use(model, untouched):
    with Stack(STACK).attach(model) as handle:
        assert "generate" in vars(model)
        handle.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, HookError])
@pytest.mark.parametrize("point", ["attention_probs", "hidden_states", "next_token_logits", "step_begin"])
def test_after_an_error_in_a_method(model, untouched, point, error):
    expected = HookError if error is ValueError else error
    with (
        pytest.raises(expected, match="on purpose"),
        Stack([*STACK, Broken(point=point, error=error)]).attach(model) as handle,
    ):
        handle.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)


def test_error_names_method_point_layer_and_step(model, untouched):
    with (
        Stack([Broken()]).attach(model),
        pytest.raises(HookError, match=r"broken\.on_attention_probs.*|broken\._handle.*"),
    ):
        model.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)
    with Stack([Broken()]).attach(model), pytest.raises(HookError, match=r"layer 1, phase decode, step 2.*on purpose"):
        model.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)


def test_error_names_the_line_of_the_method_not_of_the_library(model, untouched):
    class Wrong(Broken):
        def on_attention_probs(self, event, state):
            return torch.nn.functional.interpolate(event.probs, size=(1, 2, 3))

    line = Wrong.on_attention_probs.__code__.co_firstlineno + 1
    place = rf"step 0: ValueError: [^\n]* \(test_restore\.py:{line}\)$"
    with Stack([Wrong()]).attach(model), pytest.raises(HookError, match=place):
        model.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("during", ["prefill", "diagnostic", "decode"])
def test_after_an_error_in_the_model(model, untouched, error, during):
    calls = {"diagnostic": 0, "prefill": 1, "decode": 3}[during]

    def fail(module, args):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise error("the model broke")

    handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="the model broke"), Stack(STACK).attach(model) as attached:
            attached.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)
    finally:
        handle.remove()


def test_model_is_usable_after_an_error_inside_the_context(model, untouched):
    with Stack([Broken(point="hidden_states")]).attach(model) as handle:
        with pytest.raises(HookError):
            handle.generate(**untouched, max_new_tokens=4, pad_token_id=PAD)
        out = handle.generate(**untouched, max_new_tokens=2, pad_token_id=PAD)
    assert out.shape[1] == untouched["input_ids"].shape[1] + 2


def test_half_failed_attach(model, untouched, monkeypatch):
    def refuse():
        raise UnsupportedModel("no mask function")

    monkeypatch.setattr("mitigate.core.attention.register", refuse)
    with pytest.raises(UnsupportedModel, match="no mask function"), Stack(STACK).attach(model):
        pass


def test_user_hooks_and_own_generate_survive(model, untouched):
    seen = []
    own = model.get_decoder().layers[0].register_forward_hook(lambda *_: seen.append(1) and None)
    model.generate = generate = model.generate
    try:
        with Stack(STACK).attach(model) as handle:
            handle.generate(**untouched, max_new_tokens=2, pad_token_id=PAD)
        assert vars(model)["generate"] is generate
        assert seen
        assert own.id in model.get_decoder().layers[0]._forward_hooks
    finally:
        own.remove()
        del model.generate


def test_one_stack_at_a_time(model, untouched):
    with (
        Stack([LocoRE()]).attach(model),
        pytest.raises(StackConflict, match="already carries"),
        Stack([SCR()]).attach(model),
    ):
        pass


def test_handle_is_dead_after_the_context(model, untouched):
    with Stack([LocoRE()]).attach(model) as handle:
        handle.generate(**untouched, max_new_tokens=1, pad_token_id=PAD)
    with pytest.raises(MitigateError, match="no longer attached"):
        handle.generate(**untouched, max_new_tokens=1)
    assert handle.telemetry()[0]["locore"]["rows_edited"] > 0


def test_two_models_at_once(model):
    from tests.references.tiny import tiny_llava

    other = tiny_llava(seed=4)
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    with Stack([LocoRE(beta=2.0)]).attach(model) as one:
        alone = one.generate(**inputs, max_new_tokens=4, pad_token_id=PAD)
        with Stack([SCR(lam=1.5)]).attach(other) as two:
            two.generate(**inputs, max_new_tokens=4, pad_token_id=PAD)
            assert torch.equal(one.generate(**inputs, max_new_tokens=4, pad_token_id=PAD), alone)


# ------------------------------------------------------------------------------------------------------ clear refusals


def test_two_token_selectors_are_refused_by_name(model):
    with (
        pytest.raises(StackConflict, match=r"sgrs and sgrs_2 both want select_token"),
        Stack([SGRS(), SGRS()]).attach(model),
    ):
        pass


def test_right_padding_is_refused(model):
    inputs = make_inputs(model, [(3, 1, 6), (2, 1, 4)])
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with Stack([LocoRE()]).attach(model), pytest.raises(LayoutError, match="padding_side = 'left'"):
        model.generate(**inputs, max_new_tokens=1)


def test_embeddings_without_ids_are_refused(model):
    with Stack([LocoRE()]).attach(model), pytest.raises(LayoutError, match="input_ids"):
        model.generate(inputs_embeds=torch.randn(1, 5, 64), max_new_tokens=1)


def test_image_tokens_that_fit_no_image_are_refused(model):
    inputs = make_inputs(model, [(3, 1, 6)])
    inputs["input_ids"][0, 5] = 50
    with Stack([LocoRE()]).attach(model), pytest.raises(LayoutError, match="36 of each image"):
        model.generate(**inputs, max_new_tokens=1)


def test_cached_forward_of_a_foreign_prompt_is_refused(model):
    inputs = make_inputs(model, [(3, 1, 6)])
    cache = model(**inputs, use_cache=True).past_key_values
    with Stack([LocoRE()]).attach(model), pytest.raises(LayoutError, match="run the prompt first"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_assisted_decoding_is_refused(model):
    inputs = make_inputs(model, [(3, 1, 6)])
    with Stack([LocoRE()]).attach(model), pytest.raises(StackConflict, match="prompt_lookup_num_tokens"):
        model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_chunks_that_cut_a_picture_are_refused_by_scr(model):
    inputs = make_inputs(model, [(3, 1, 6)])
    with Stack([SCR()]).attach(model), pytest.raises(UnsupportedModel, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=10)


def test_returning_a_value_without_write_access_is_an_error(model):
    class Liar(Broken):
        def on_attention_probs(self, event, state):
            return event.probs * 0.5

    with Stack([Liar(error=ValueError)]).attach(model), pytest.raises(HookError, match="subscribed to read only"):
        model.generate(**make_inputs(model, [(3, 1, 6)]), max_new_tokens=1)


def test_undeclared_points_are_refused(model):
    class Undeclared(Broken):
        tags: ClassVar[Tags] = Tags()

    with pytest.raises(PluginError, match="tags do not say so"), Stack([Undeclared()]).attach(model):
        pass


def test_unserved_point_is_refused(model):
    class Owner(Broken):
        def subscriptions(self, model):
            return [Subscription(point=Point.DRIVE_DECODING, access=Access.WRITE)]

    with pytest.raises(UnsupportedModel, match="drive_decoding"), Stack([Owner()]).attach(model):
        pass


def test_method_classes_are_not_methods():
    with pytest.raises(MitigateError, match="takes methods"):
        Stack([ControlProbe])
