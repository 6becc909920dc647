"""SCR against the naive implementation of its equations."""

from __future__ import annotations

import pytest
import torch

from mitigate.errors import ConfigError
from mitigate.methods.scr import SCR, choose
from tests.references import naive_scr, runs
from tests.references.tiny import EOS, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (5, 1, 0)]
#: Rank values of the hand-made 5x5 grid; the border holds the largest and must never become a source.
GRID = [9, 9, 9, 9, 9, 9, 5, 3, 2, 9, 9, 4, 6, 1, 9, 9, 0.5, 0.7, 0.9, 9, 9, 9, 9, 9, 9]


def generate(model, method, inputs, steps=6, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


@pytest.mark.parametrize("ownership", ["topk_then_exclude", "greedy_nms"])
@pytest.mark.parametrize(("neighbourhood", "k_src"), [("8", 3), ("4", 5), ("radius2", 2), ("8", 99)])
def test_equals_naive_full_sequence(ownership, neighbourhood, k_src):
    model = tiny_llava(seed=k_src)
    inputs = make_inputs(model, PROMPTS, seed=k_src)
    method = SCR(
        lam=1.6, k_src=k_src, layers="0-2", diagnostic_layers="1-3", ownership=ownership, neighbourhood=neighbourhood
    )
    out, _ = generate(model, method, inputs)
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, logits = naive_scr.generate(
            model,
            **sample,
            lam=1.6,
            k_src=k_src,
            early_layers=range(3),
            diag_layers=range(1, 4),
            ownership=ownership,
            neighbourhood=neighbourhood,
            max_new_tokens=6,
            eos=(EOS,),
        )
        assert fresh[row, : len(tokens)].tolist() == tokens
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_equals_naive_to_1e_5():
    """In float64, where the reference's own rounding does not count; norms and rotary angles stay float32."""
    model = tiny_llava(seed=5).double()
    inputs = make_inputs(model, PROMPTS, seed=5)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out, _ = generate(model, SCR(lam=1.6, k_src=5, layers="0-2", diagnostic_layers="1-3"), inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, logits = naive_scr.generate(
            model, **sample, lam=1.6, k_src=5, early_layers=range(3), diag_layers=range(1, 4),
            max_new_tokens=6, eos=(EOS,),
        )  # fmt: skip
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        torch.testing.assert_close(ours, logits.float(), rtol=0, atol=1e-5)


def test_cached_equals_uncached(model):
    inputs = make_inputs(model, PROMPTS, seed=3)
    cached, _ = generate(model, SCR(lam=1.5, k_src=4), inputs)
    uncached, _ = generate(model, SCR(lam=1.5, k_src=4), inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)


def test_hand_made_grid():
    sources, owners = choose(GRID, (5, 5), 2, "topk_then_exclude", "8")
    assert sources == [12, 6]
    assert sorted(n for n, s in owners.items() if s == 12) == [7, 8, 11, 13, 16, 17, 18]
    assert sorted(n for n, s in owners.items() if s == 6) == [0, 1, 2, 5, 10]
    sources, owners = choose(GRID, (5, 5), 3, "topk_then_exclude", "8")
    assert sources == [12, 6, 11]
    assert [n for n, s in owners.items() if s == 11] == [15]
    assert choose(GRID, (5, 5), 2, "greedy_nms", "8")[0] == [12]


def test_grid_without_interior_stays_as_it_is():
    assert choose([1.0] * 8, (2, 4), 3, "topk_then_exclude", "8") == ([], {})


def test_repeated_application_has_the_closed_form():
    """n layers of Eq. 1 on a residual stream that adds nothing: owned 1 + lam (1 - lam^-n), sources lam^-n."""
    from types import SimpleNamespace

    from mitigate.core import HiddenStates, MethodState, Phase
    from mitigate.methods.scr import Edit

    method, state = SCR(lam=1.1), MethodState("scr", 1)
    state.edit = Edit(torch.tensor([[0, 1]]), torch.tensor([[0, 0], [0, 2]]), torch.tensor([0, 0]), span=(0, 2))
    hidden = torch.ones(1, 4, 2, dtype=torch.float64)
    for _ in range(12):
        event = HiddenStates(
            phase=Phase.PREFILL, step=0, branch="main", request=SimpleNamespace(), layer=0, hidden=hidden, start=0
        )
        hidden = method.on_hidden_states(event, state)
    shrunk = 1.1**-12
    expected = torch.tensor([1 + 1.1 * (1 - shrunk), shrunk, 1 + 1.1 * (1 - shrunk), 1.0], dtype=torch.float64)
    torch.testing.assert_close(hidden[0, :, 0], expected)


def test_random_sources_follow_the_seed_and_the_sample(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    method = SCR(lam=2.0, k_src=3, source_selection="random")

    def logits(**kwargs):
        out, telemetry = generate(model, method, inputs, steps=1, **kwargs)
        assert "extra_forwards" not in telemetry[0]["scr"]
        return out.logits[0]

    assert torch.equal(logits(seed=1), logits(seed=1))
    assert not torch.equal(logits(seed=1), logits(seed=2))
    assert not torch.equal(logits(sample_ids=["a"]), logits(sample_ids=["b"]))


def test_identity_costs_nothing(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    _, telemetry = generate(model, SCR.identity(), inputs)
    assert set(telemetry[0]["scr"]) == {"seconds"}


@pytest.mark.parametrize("values", [{"lam": 0.9}, {"k_src": 0}, {"ownership": "both"}, {"neighbourhood": "6"}])
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.scr.{next(iter(values))}="):
        SCR(**values)
