"""Every stack of paper methods, in every order: it is planned or refused with a reason, it runs, and everybody acts."""

from __future__ import annotations

import itertools

import pytest
import torch

from mitigate.core import Fidelity, ModelFacts
from mitigate.core.stack import Stack
from mitigate.errors import MitigateError
from mitigate.registry import methods
from tests.references.runs import warm_model
from tests.references.tiny import PAD, make_inputs, tiny_processor

#: The methods of papers, as far as they are registered; controls are no method's business.
NAMES = [name for name in methods().names() if methods().get(name).fidelity is not Fidelity.CONTROL]
SUBSETS = [names for size in range(1, len(NAMES) + 1) for names in itertools.combinations(NAMES, size)]
#: Where the paper's own values would do next to nothing on six random layers, stronger ones.
STRONG = {
    "locore": {"beta": 0.5},
    "scr": {"lam": 1.5, "k_src": 4},
    "sgrs": {"alpha": 0.95, "layers": "2-3"},
    "clva": {"alpha": 2.0, "beta": 1.0, "min_anchors": 2},
    "dleaf": {"threshold": "running_mean", "first_layer": "eligible"},
}
#: Counters of the bus and of methods that are above zero only if something was changed or decided.
ACTED = ("rows_edited", "tokens_edited", "steps_edited", "tokens_changed", "gated")
FACTS = {
    "tiny": ModelFacts(family="llava", layers=6, heads=4, kv_heads=2),
    "7B": ModelFacts(family="llava", layers=32, heads=32, kv_heads=32),
    "without a grid": ModelFacts(family="other", layers=28, heads=28, kv_heads=4, spatial_grid=False),
}
PROMPTS = [(3, 1, 6), (2, 2, 4)]


@pytest.fixture(scope="module")
def model():
    return warm_model()


def stack_of(names, **changes):
    return Stack({name: methods().get(name)(**{**STRONG.get(name, {}), **changes.get(name, {})}) for name in names})


def run(model, names, steps=3, **changes):
    """Return tokens, raw logits ``[B, steps, V]`` and telemetry."""
    inputs = make_inputs(model, PROMPTS, seed=1)
    with stack_of(names, **changes).attach(model, tiny_processor(model.config)) as handle:
        out = handle.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=[],
            return_dict_in_generate=True,
            output_logits=True,
        )
        fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
        return fresh, torch.stack(out.logits, 1), handle.telemetry()


def test_the_paper_methods_are_there():
    assert {"locore", "scr", "sgrs"} <= set(NAMES)
    assert not any(name.startswith("control") for name in NAMES)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a method may say that it expects little of a model
@pytest.mark.parametrize("geometry", FACTS)
def test_every_ordered_subset_is_planned_or_refused_with_a_reason(geometry):
    facts = FACTS[geometry]
    planned, refused = set(), {}
    for names in SUBSETS:
        for order in itertools.permutations(names):
            try:
                lines = stack_of(order).plan(facts)
            except MitigateError as refusal:
                refused[order] = str(refusal)
                continue
            assert {line.method for line in lines} == set(order)
            for point in {line.point for line in lines}:  # at every point: the order of the stack
                at_point = list(dict.fromkeys(line.method for line in lines if line.point == point))
                assert at_point == [name for name in order if name in at_point]
            planned.add(frozenset(names))
    for order, reason in refused.items():
        assert any(name in reason for name in order), reason
        assert ";" in reason, "a refusal names the remedy"
    if facts.spatial_grid:
        assert not refused
        assert planned == {frozenset(names) for names in SUBSETS}
    else:
        assert frozenset({"scr"}) not in planned
        assert frozenset({"locore", "sgrs"}) in planned


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_generates_and_everybody_acts(model, names):
    width = model.lm_head.weight.shape[0]
    for order in (names, names[::-1])[: len(names)]:
        tokens, logits, telemetry = run(model, order)
        assert tokens.shape == (len(PROMPTS), 3)
        assert logits.shape == (len(PROMPTS), 3, width)
        assert bool(logits.isfinite().all())
        for sample in telemetry:
            assert list(sample) == [*order, "bus"]
            for name in order:
                assert any(sample[name].get(counter, 0) > 0 for counter in ACTED), (name, sample[name])


def test_the_model_is_itself_again_afterwards(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    before = model(**inputs).logits
    run(model, NAMES)
    assert torch.equal(model(**inputs).logits, before)


def commute(model, one, other, **changes):
    """Whether two methods give the same logits in both orders, within rounding."""
    first, second = (run(model, order, steps=1, **changes)[1] for order in ((one, other), (other, one)))
    return torch.allclose(first, second, rtol=0, atol=1e-5)


@pytest.mark.skipif("dleaf" not in NAMES, reason="no two methods that write the same point are registered")
def test_some_methods_do_not_commute(model):
    """Mixing heads and renormalising them: the order counts. A gain that is the same in all heads commutes with it."""
    assert not commute(model, "dleaf", "locore", locore={"mode": "post_renorm", "beta": 3.0})
    assert commute(model, "dleaf", "locore", locore={"mode": "post_raw", "beta": 3.0})
    assert commute(model, "locore", "scr")  # they meet at different points of a forward, whatever the order


@pytest.mark.skipif(not {"clva", "dleaf"} <= set(NAMES), reason="not registered")
def test_methods_that_look_at_the_same_heads_do_not_commute(model):
    assert not commute(model, "clva", "dleaf")


def test_one_method_twice_does_not_commute_with_itself(model):
    """Scaling the window without and with renormalisation, in both orders."""
    plugin = methods().get("locore")
    raw, normed = plugin(beta=1.0, window=3), plugin(beta=1.0, window=3, mode="post_renorm")
    inputs = make_inputs(model, PROMPTS, seed=1)
    logits = []
    for stack in ([raw, normed], [normed, raw]):
        with Stack(stack).attach(model):
            logits.append(model(**inputs).logits[:, -1])
    assert float((logits[0] - logits[1]).abs().max()) > 1e-2


def test_two_choosers_are_refused_by_name():
    chooser = methods().get("sgrs")
    with pytest.raises(MitigateError, match=r"sgrs and sgrs_2 both want select_token.*keep one of them"):
        Stack([chooser(), chooser()]).plan(FACTS["7B"])
