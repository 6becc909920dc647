"""What observers record equals what the decoder, written out by hand, gives for the same sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mitigate.adapters import adapter_for
from mitigate.core.stack import Stack
from mitigate.diagnostics.credit import Credit, _seen, asking_rows
from mitigate.diagnostics.drift import Drift
from mitigate.diagnostics.entropy import Entropy
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from tests.references.runs import warm_model
from tests.references.tiny import IMAGE, PAD, full_forward, make_inputs, split_rows

STEPS = 4
SIDE = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return warm_model()


def observed(
    model: Any, diagnostic: Any, inputs: Any, methods: Any = (), *, first: bool = False
) -> tuple[Any, torch.Tensor]:
    """The observer's state, and the generated tokens; the observer is the stack's last method, or its first."""
    observer = {"o": diagnostic.observer(adapter_for(model).facts(model))}
    others = {f"m{index}": method for index, method in enumerate(methods)}
    stack = Stack({**observer, **others} if first else {**others, **observer})
    with stack.attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=PAD)
        assert handle.bus is not None
        assert handle.bus.last_request is not None
        return handle.bus.last_request.state("o"), out[:, inputs["input_ids"].shape[1] :]


def sequences(model: Any, inputs: Any, fresh: torch.Tensor) -> list[tuple[torch.Tensor, list[int], Any]]:
    """Per sample: its whole unpadded sequence, the image's columns, and the hand-written forward."""
    found = []
    for part, tokens in zip(split_rows(inputs, SIDE), fresh, strict=True):
        ids = torch.cat([part["input_ids"], tokens[None]], 1)
        forward = full_forward(model, ids, part["pixel_values"], collect=True)
        found.append((ids, (ids[0] == IMAGE).nonzero().flatten().tolist(), forward))
    return found


@pytest.fixture(scope="module")
def inputs(model: Any) -> Any:
    return make_inputs(model, [(3, 1, 4), (2, 1, 6)])


def test_entropy_mass_and_abnormal_heads(model: Any, inputs: Any) -> None:
    diagnostic = Entropy()
    state, fresh = observed(model, diagnostic, inputs)
    for row, (ids, image, forward) in enumerate(sequences(model, inputs, fresh)):
        steps = diagnostic.measure(state, row)
        assert len(steps) == STEPS
        for step, measures in enumerate(steps):
            query = ids.shape[1] - STEPS + step - 1  # the row that predicted this token
            for layer, probs in enumerate(forward.probs):
                weights = probs[:, query, image]
                mass = weights.sum(1)
                pooled = weights.sum(0) / mass.sum()
                entropy = -(pooled * pooled.log()).sum()
                assert measures["entropy"][layer] == pytest.approx(float(entropy), abs=1e-4)
                assert measures["mass"][layer] == pytest.approx(float(mass.mean()), abs=1e-5)
                assert measures["abnormal"][layer] == int((mass < mass.mean()).sum())
            assert measures["image_tokens"] == SIDE * SIDE


def test_drift_compares_every_layer_with_early_and_middle_means(model: Any, inputs: Any) -> None:
    diagnostic = Drift(early="0-1", middle="2-3", deep="4-5", objects=False)
    state, fresh = observed(model, diagnostic, inputs)
    for row, (ids, image, forward) in enumerate(sequences(model, inputs, fresh)):
        for step, measures in enumerate(diagnostic.measure(state, row)):
            query = ids.shape[1] - STEPS + step - 1
            maps = []
            for probs in forward.probs:
                weights = probs[:, query, image].double()
                maps.append((weights / weights.sum(1, keepdim=True)).mean(0))
            for side, window in (("noise", maps[0:2]), ("anchors", maps[2:4])):
                mean = torch.stack(window).mean(0)
                for layer, own in enumerate(maps):
                    middle = (own + mean) / 2
                    expected = {
                        "bhattacharyya": (own * mean).sqrt().sum(),
                        "hellinger": (1 - (own * mean).sqrt().sum()).clamp_min(0).sqrt(),
                        "jensen_shannon": ((own * (own / middle).log()).sum() + (mean * (mean / middle).log()).sum())
                        / 2,
                    }
                    for name, value in expected.items():
                        assert measures[f"{name}_{side}"][layer] == pytest.approx(float(value), abs=2e-4), (name, layer)
            contrast = (torch.stack(maps[2:4]).mean(0) - torch.stack(maps[0:2]).mean(0)).clamp_min(0).sum()
            assert measures["contrast"] == pytest.approx(float(contrast), abs=1e-5)


def test_credit_averages_the_questions_rows_and_the_tokens_norms(model: Any, inputs: Any) -> None:
    diagnostic = Credit(layers="1-2")
    state, fresh = observed(model, diagnostic, inputs)
    for row, (ids, image, forward) in enumerate(sequences(model, inputs, fresh)):
        asking = range(image[-1] + 1, ids.shape[1] - STEPS)
        weights = sum(forward.probs[layer][:, query, image].sum(0) for layer in (1, 2) for query in asking)
        share = weights / weights.sum()
        seen = _seen(state, row)
        assert seen["entropy"] == pytest.approx(float(-(share * share.log()).sum()), abs=1e-4)
        norms = [float(hidden[image].norm(dim=-1).mean()) for hidden in forward.hidden]
        assert seen["norms"] == pytest.approx(norms, rel=1e-4)


def test_only_text_after_the_last_picture_asks(model: Any) -> None:
    inputs = make_inputs(model, [(3, 2, 4), (2, 1, 6)], gap=3)
    layout = adapter_for(model).layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)
    assert asking_rows(layout).sum(1).tolist() == [4, 6]
    assert asking_rows(layout.grown(layout.length + 2))[:, -2:].sum() == 0


@pytest.mark.parametrize("diagnostic", [Entropy(), Drift(objects=False), Credit()], ids=lambda item: item.name)
@pytest.mark.parametrize("method", [None, LocoRE(beta=0.6), SGRS()], ids=["none", "locore", "sgrs"])
def test_observers_change_no_token(model: Any, inputs: Any, diagnostic: Any, method: Any) -> None:
    methods = [] if method is None else [method]
    with Stack(methods).attach(model) as handle:
        plain = handle.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=PAD
        )[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(observed(model, diagnostic, inputs, methods)[1], plain)


@pytest.mark.parametrize("first", [False, True])
def test_observers_see_what_the_stack_left(model: Any, inputs: Any, first: bool) -> None:
    diagnostic = Entropy()
    before, _ = observed(model, diagnostic, inputs)
    after, _ = observed(model, diagnostic, inputs, [LocoRE(beta=5.0, mode="post_renorm", layers="2")], first=first)
    first = diagnostic.measure(before, 0)[0]["mass"], diagnostic.measure(after, 0)[0]["mass"]
    assert first[0][:2] == first[1][:2]
    assert first[1][2] < first[0][2] - 1e-3  # more attention to the text just before, less to the picture


def test_samples_without_a_picture_measure_nothing(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4), (5, 0, 0)])
    entropy, drift, credit = Entropy(), Drift(objects=False), Credit()
    assert entropy.measure(observed(model, entropy, inputs)[0], 1)[0]["image_tokens"] == 0
    noise = drift.measure(observed(model, drift, inputs)[0], 1)[0]["bhattacharyya_noise"]
    assert all(value != value for value in noise)
    assert _seen(observed(model, credit, inputs)[0], 1)["entropy"] is None
