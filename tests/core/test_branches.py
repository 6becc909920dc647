"""Extra streams: against plain forwards of the same model over the same tokens, one sample at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from mitigate.core import Access, Branch, Fidelity, Method, Point, Rows, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.errors import HookError, PluginError, UnsupportedModel
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from tests.references import runs
from tests.references.tiny import IMAGE, PAD, make_inputs, split_rows

PROMPTS = [(3, 1, 6), (2, 1, 3), (4, 2, 2)]
WRITES = frozenset({Point.NEXT_TOKEN_LOGITS, Point.IMAGE_INPUT, Point.TEXT_INPUT, Point.ATTENTION_PROBS})


@dataclass(frozen=True, kw_only=True)
class Contrast(Method):
    """(1 + a) l - a l' with the branch's logits l', every ``every`` steps."""

    name: ClassVar[str] = "contrast"
    summary: ClassVar[str] = "contrasts with a branch"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=WRITES, forwards_per_token=1)

    branch: str = "other"
    images: bool = False
    a: float = 1.0
    every: int = 1
    point: Point | None = None

    def branches(self):
        return [Branch(name=self.branch, images=self.images)]

    def subscriptions(self, model):
        found = [Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]
        if self.point is not None:
            layers = (1,) if self.point is Point.ATTENTION_PROBS else ()
            there = frozenset({self.branch})
            found.append(
                Subscription(point=self.point, access=Access.WRITE, layers=layers, rows=Rows.ALL, branches=there)
            )
        return found

    def on_next_token_logits(self, event, state):
        if event.step % self.every:
            return None
        other = event.branch_logits(self.branch)
        state.trace(event, other=other)
        return (1 + self.a) * event.logits - self.a * other

    def on_image_input(self, event, state):
        return [-image for image in event.images]

    def on_text_input(self, event, state):
        return [torch.cat([row[:1], row[-1:], row[1:]]) for row in event.ids]

    def on_attention_probs(self, event, state):
        return event.probs.flip(-1)


def reference(model, sample, images, a, steps, edit=lambda ids, pixels: (ids, pixels)):
    """Greedy tokens and the branch's logits per step, from two plain full forwards a step."""
    ids, pixels = sample["input_ids"], sample["pixel_values"]
    prompt, picture = edit(ids, pixels)
    if not images:
        prompt, picture = prompt[:, prompt[0] != IMAGE], None
    tokens: list[int] = []
    seen = []
    for _ in range(steps):
        fresh = torch.tensor([tokens], dtype=ids.dtype)
        main = model(input_ids=torch.cat([ids, fresh], 1), pixel_values=pixels).logits[0, -1]
        other = model(input_ids=torch.cat([prompt, fresh], 1), pixel_values=picture).logits[0, -1]
        seen.append(other)
        tokens.append(int(((1 + a) * main - a * other).argmax()))
    return tokens, torch.stack(seen)


def branch_logits(handle):
    return torch.tensor([trace.values["other"] for trace in handle.trace() if "other" in trace.values]).transpose(0, 1)


EDITS = {
    "without images": ({"images": False}, lambda ids, pixels: (ids, pixels)),
    "other images": ({"images": True, "point": Point.IMAGE_INPUT}, lambda ids, pixels: (ids, -pixels)),
    "other words": (
        {"images": True, "point": Point.TEXT_INPUT},
        lambda ids, pixels: (torch.cat([ids[:, :1], ids[:, -1:], ids[:, 1:]], 1), pixels),
    ),
    "unedited": ({"images": True}, lambda ids, pixels: (ids, pixels)),
}


@pytest.mark.parametrize("kind", list(EDITS))
def test_a_branch_follows_the_main_stream(model, kind):
    options, edit = EDITS[kind]
    inputs = make_inputs(model, PROMPTS, seed=3)
    with Stack([Contrast(a=0.7, **options)]).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=3, trace=True)
        seen, telemetry = branch_logits(handle), handle.telemetry()
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, others = reference(model, sample, options["images"], 0.7, 5, edit)
        assert out[row, -5:].tolist() == tokens
        torch.testing.assert_close(seen[row], others, rtol=0, atol=2e-5)
        assert telemetry[row]["contrast"]["extra_forwards"] == 5


def test_other_methods_do_not_act_in_a_branch(model):
    """The branch of a stack with an attention method is that of the plain model."""
    inputs = make_inputs(model, PROMPTS, seed=4)
    with Stack([LocoRE(beta=4.0), Contrast(images=True)]).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=PAD, trace=True)
        seen = branch_logits(handle)
    plain = runs.generate(model, [], inputs, 1)[0]
    torch.testing.assert_close(seen[:, 0], plain.logits[0], rtol=0, atol=2e-5)
    for row, sample in enumerate(split_rows(inputs, 6)):
        ids = torch.cat([sample["input_ids"], out[row : row + 1, -4:-1]], 1)
        expected = model(input_ids=ids, pixel_values=sample["pixel_values"]).logits[0, -1]
        torch.testing.assert_close(seen[row, -1], expected, rtol=0, atol=2e-5)


def test_hooks_of_a_branch_stay_in_it(model):
    """With weight zero on the contrast the main stream is the plain model's, bit for bit, whatever the branch does."""
    inputs = make_inputs(model, PROMPTS, seed=5)
    plain = runs.generate(model, [], inputs, 4)[0]
    edited, _ = runs.generate(model, [Contrast(a=0.0, images=True, point=Point.ATTENTION_PROBS)], inputs, 4)
    assert torch.equal(edited.sequences, plain.sequences)
    for one, other in zip(edited.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with Stack([Contrast(images=True, point=Point.ATTENTION_PROBS)]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=PAD, trace=True)
        assert (branch_logits(handle)[:, 0] - plain.logits[0]).abs().max() > 0.01


def count_forwards(model, run):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        run()
    finally:
        hook.remove()
    return len(calls)


def test_equal_plain_branches_are_run_once(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=6)

    def run(*methods):
        return count_forwards(model, lambda: runs.generate(model, list(methods), inputs, 4))

    one, other = Contrast(branch="blind"), Contrast(branch="without")
    assert run() == 4
    assert run(one) == 8
    assert run(one, other) == 8
    assert run(one, Contrast(images=True)) == 12
    assert run(one, Contrast(images=True, point=Point.IMAGE_INPUT), Contrast(images=True)) == 16
    _, telemetry = runs.generate(model, [one, other], inputs, 4)
    assert telemetry[0]["contrast"]["extra_forwards"] == 4  # who asks first pays
    assert "extra_forwards" not in telemetry[0]["contrast_2"]


def test_a_branch_runs_when_it_is_asked(model):
    """Skipped steps are caught up in one forward, with the same logits."""
    inputs = make_inputs(model, PROMPTS, seed=7)
    assert count_forwards(model, lambda: runs.generate(model, [Contrast(every=100)], inputs, 6)) == 7
    with Stack([Contrast(a=0.0, every=3)]).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=PAD, eos_token_id=3, trace=True)
        seen = branch_logits(handle)
    for row, sample in enumerate(split_rows(inputs, 6)):
        words = sample["input_ids"][:, sample["input_ids"][0] != IMAGE]
        for index, step in enumerate((0, 3, 6)):
            fed = torch.cat([words, out[row : row + 1, -7:][:, :step]], 1)
            torch.testing.assert_close(seen[row, index], model(input_ids=fed).logits[0, -1], rtol=0, atol=2e-5)


def test_what_late_branches_cost_is_counted(model):
    """A branch that starts late runs its prompt and what it missed; both passes are counted."""
    inputs = make_inputs(model, PROMPTS, seed=7)
    late = variant(
        on_next_token_logits=lambda self, event, state: event.branch_logits("other") if event.step == 3 else None
    )
    assert count_forwards(model, lambda: runs.generate(model, [late], inputs, 5)) == 7
    assert runs.generate(model, [late], inputs, 5)[1][0]["variant"]["extra_forwards"] == 2


def test_permuted_beams_cost_one_forward_a_step(model):
    inputs = make_inputs(model, PROMPTS, seed=8)

    def run():
        runs.generate(model, [Contrast()], inputs, 6, num_beams=3, eos_token_id=3)

    assert count_forwards(model, run) == 12


def test_samples_that_have_ended_are_left_alone_in_a_branch(model):
    inputs = make_inputs(model, PROMPTS[:2], seed=9)
    method = Contrast(a=0.0, images=True, point=Point.ATTENTION_PROBS)
    first = runs.generate(model, [method], inputs, 1)[0].sequences[0, -1].item()
    _, once = runs.generate(model, [method], inputs, 1)
    _, telemetry = runs.generate(model, [method], inputs, 5, eos_token_id=first)
    assert telemetry[0]["contrast"]["rows_edited"] == once[0]["contrast"]["rows_edited"]
    assert telemetry[0]["contrast"]["extra_forwards"] == 1
    assert telemetry[1]["contrast"]["rows_edited"] > once[1]["contrast"]["rows_edited"]


def test_names_are_a_methods_own(model):
    """Two methods that call different branches the same do not meet."""
    inputs = make_inputs(model, PROMPTS, seed=9)
    plain = Contrast(a=0.5, images=True)
    edited = Contrast(a=0.0, images=True, point=Point.ATTENTION_PROBS)
    alone, _ = runs.generate(model, [plain], inputs, 4)
    both, _ = runs.generate(model, [edited, plain], inputs, 4)
    torch.testing.assert_close(torch.stack(both.logits), torch.stack(alone.logits), rtol=0, atol=1e-5)


def test_branches_beside_the_direct_path(model):
    """A branch's pass does not overwrite the frozen norm of the main stream's step."""
    inputs = make_inputs(model, PROMPTS[:2], seed=10)
    direct = SGRS(alpha=1.0, proposal="greedy_order", gradient="direct", layers="0.5-0.75")

    def traced(*methods):
        with Stack(methods).attach(model) as handle:
            handle.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=PAD, trace=True)
            return [trace.values for trace in handle.trace() if trace.method == "sgrs"]

    alone = traced(direct)
    assert len(alone) == 4
    assert str(traced(Contrast(a=0.0), direct)) == str(alone)


@pytest.mark.parametrize("way", ["beams", "no cache", "beams without cache", "sampling", "chunks"])
def test_ways_of_decoding(model, way):
    """The tokens of the branch are those of its own row's history, also when beams are permuted."""
    options: dict[str, Any] = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "no cache": {"use_cache": False},
        "beams without cache": {"num_beams": 3, "use_cache": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "chunks": {"prefill_chunk_size": 50},
    }[way]
    inputs = make_inputs(model, PROMPTS[:2], seed=8)
    if way == "chunks":
        inputs = make_inputs(model, [(60, 0, 6), (50, 0, 3)], seed=8)
    method = Contrast(a=1.0, images=False)
    processors: list[Any] = []

    class Check:
        """A logits processor that recomputes every row from its own tokens."""

        def __call__(self, input_ids, scores):
            width = inputs["input_ids"].shape[1]
            copies = len(input_ids) // len(inputs["input_ids"])
            for row, ids in enumerate(input_ids):
                prompt = inputs["input_ids"][row // copies]
                mask = inputs["attention_mask"][row // copies].bool()
                words = torch.cat([prompt[mask & (prompt != IMAGE)], ids[width:]])
                processors.append((words, scores[row].clone()))
            return scores

    with Stack([method]).attach(model) as handle:
        torch.manual_seed(0)
        kwargs = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": PAD, "eos_token_id": 3, **options}
        handle.generate(**inputs, logits_processor=[Check()], trace=True, **kwargs)
        traces = [row for trace in handle.trace() if "other" in trace.values for row in trace.values["other"]]
    assert len(traces) == len(processors) > 4
    for other, (words, _) in zip(traces, processors, strict=True):
        expected = model(input_ids=words[None]).logits[0, -1]
        torch.testing.assert_close(torch.tensor(other), expected, rtol=0, atol=2e-5)


def test_the_caches_method_is_given_back(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=9)
    out, _ = runs.generate(model, [Contrast()], inputs, 3)
    assert "reorder_cache" not in vars(out.past_key_values)
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("order", [0, 1])
def test_branches_beside_gradients(model, order):
    """SGRS differentiates the logits the contrast left; its gradients are those of the contrast's main share."""
    inputs = make_inputs(model, PROMPTS[:2], seed=10)
    methods: list[Method] = [SGRS(alpha=0.3), Contrast(a=0.5)]
    out, telemetry = runs.generate(model, methods[:: 1 - 2 * order], inputs, 4)
    assert telemetry[0]["contrast"]["extra_forwards"] == 4
    assert telemetry[0]["sgrs"]["extra_backwards"] >= 1
    again, _ = runs.generate(model, methods[:: 1 - 2 * order], inputs, 4)
    assert torch.equal(out.sequences, again.sequences)


def test_forwards_made_by_hand(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=11)
    plain = model(**inputs).logits[0, -1]
    with Stack([Contrast(a=0.5)]).attach(model):
        first = model(**inputs, use_cache=True)
        token = first.logits[:, -1].argmax(-1)
        second = model(input_ids=token[:, None], past_key_values=first.past_key_values)
    words = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
    other = model(input_ids=words).logits[0, -1]
    torch.testing.assert_close(first.logits[0, -1], 1.5 * plain - 0.5 * other, rtol=0, atol=2e-5)
    ids = torch.cat([inputs["input_ids"], token[:, None]], 1)
    plain = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
    other = model(input_ids=torch.cat([words, token[:, None]], 1)).logits[0, -1]
    torch.testing.assert_close(second.logits[0, -1], 1.5 * plain - 0.5 * other, rtol=0, atol=2e-5)


def variant(**changes):
    return type("Variant", (Contrast,), {"name": "variant", **changes})()


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        (variant(tags=Tags(writes=WRITES)), PluginError, "forwards_per_token"),
        (variant(branches=lambda self: [Branch(name="main")]), PluginError, "named 'main'"),
        (
            variant(branches=lambda self: [Branch(name="b"), Branch(name="b", images=False)]),
            PluginError,
            "two branches",
        ),
        (
            variant(
                subscriptions=lambda self, model: [
                    Subscription(point=Point.IMAGE_INPUT, access=Access.WRITE, branches=frozenset({"othr"}))
                ]
            ),
            PluginError,
            "did you mean 'other'",
        ),
        (
            variant(
                subscriptions=lambda self, model: [
                    Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE, branches=frozenset({"other"}))
                ]
            ),
            UnsupportedModel,
            "not served in a branch",
        ),
        (
            variant(
                subscriptions=lambda self, model: [Subscription(point=Point.TEXT_INPUT, access=Access.WRITE)],
            ),
            UnsupportedModel,
            "served in branches",
        ),
    ],
)
def test_senseless_branches_are_refused(model, method, error, match):
    with pytest.raises(error, match=match), Stack([method]).attach(model):
        pass


def test_an_undeclared_branch_is_named(model):
    method = variant(on_next_token_logits=lambda self, event, state: event.branch_logits("blind"))
    with Stack([method]).attach(model), pytest.raises(HookError, match=r"'blind', which it does not declare; .* other"):
        model(**make_inputs(model, PROMPTS[:1]))
