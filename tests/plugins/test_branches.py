"""Extra streams, seen from outside packages: isolated from the main stream, scoped, shared, and run only when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from mitigate_pai.pai import PAI
from mitigate_vcd.vcd import VCD
from transformers import DynamicCache
from transformers.generation import StoppingCriteria

from mitigate.core import Access, Branch, Fidelity, Method, Point, Rows, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from tests.plugins.drive import PROMPTS, batch, counted, fresh, generate
from tests.references.tiny import EOS, IMAGE, PAD, tiny_llava

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(seed=3).eval()


@dataclass(frozen=True, kw_only=True)
class Listener(Method):
    """Reads the next token's logits in a stream of its own, and may edit that stream."""

    name: ClassVar[str] = "listener"
    summary: ClassVar[str] = "listens"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.NEXT_TOKEN_LOGITS}),
        writes=frozenset({Point.IMAGE_INPUT, Point.ATTENTION_SCORES, Point.HIDDEN_STATES}),
        forwards_per_token=1,
    )

    images: bool = True
    edits: bool = False
    asks: tuple[int, ...] = tuple(range(99))
    heard: ClassVar[list[torch.Tensor]] = []

    def branches(self) -> Sequence[Branch]:
        return [Branch(name="mine", images=self.images)]

    def subscriptions(self, model: Any) -> list[Subscription]:
        wanted = [Subscription(point=Point.NEXT_TOKEN_LOGITS)]
        if self.edits:
            mine, write = frozenset({"mine"}), Access.WRITE
            every = tuple(range(model.layers))
            wanted += [
                Subscription(point=Point.ATTENTION_SCORES, access=write, layers=every, rows=Rows.ALL, branches=mine),
                Subscription(point=Point.HIDDEN_STATES, access=write, layers=every, branches=mine),
            ]
            if self.images:
                wanted.append(Subscription(point=Point.IMAGE_INPUT, access=write, branches=mine))
        return wanted

    def on_image_input(self, event: Any, state: Any) -> list[torch.Tensor]:
        return [-image for image in event.images]

    def on_attention_scores(self, event: Any, state: Any) -> torch.Tensor:
        assert event.branch == "mine"
        return event.scores * 0.5

    def on_hidden_states(self, event: Any, state: Any) -> torch.Tensor:
        assert event.branch == "mine"
        return event.hidden * 1.1

    def on_next_token_logits(self, event: Any, state: Any) -> None:
        assert event.branch == "main"
        if event.step in self.asks:
            self.heard.append(event.branch_logits("mine"))


@pytest.fixture(autouse=True)
def heard() -> list[torch.Tensor]:
    Listener.heard.clear()
    return Listener.heard


def step_by_step(model: Any, inputs: dict[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """Run the plain model over a prompt and then given tokens, as generation does; logits ``[T + 1, B, V]``."""
    cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(**inputs, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    logits = [out.logits[:, -1]]
    for column in tokens.T:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        out = model(input_ids=column[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1])
    return torch.stack(logits), cache


def without_pictures(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same prompts with the pictures' tokens cut out, padded anew."""
    rows = [
        ids[mask.bool() & (ids != IMAGE)]
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    width = max(map(len, rows))
    fill = [torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows]
    seen = [torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
    return {"input_ids": torch.stack(fill), "attention_mask": torch.stack(seen)}


# ------------------------------------------------------------------------------------------------------------ isolation


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_the_main_stream_does_not_feel_a_branch(model: Any, images: bool, edits: bool, heard: list[Any]) -> None:
    inputs = batch(model, seed=1)
    expected, _ = generate(model, [], inputs, STEPS)
    out, _ = generate(model, [Listener(images=images, edits=edits)], inputs, STEPS)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert len(heard) == len(expected.logits)
    same = torch.stack(
        [torch.isclose(mine, main, atol=1e-4).all(1) for mine, main in zip(heard, out.logits, strict=True)]
    )
    pictured = torch.tensor([images, images, True])  # the third sample has no picture to lose
    assert torch.equal(same.all(0), pictured & (not edits))


def test_the_main_cache_holds_what_the_plain_model_would_have_written(model: Any) -> None:
    inputs = batch(model, seed=1)
    methods = [PAI(alpha=0.0, gamma=2.0), VCD(), Listener(edits=True)]
    with counted(model.lm_head) as forwards:
        out, _ = generate(model, methods, inputs, STEPS, eos_token_id=[])
    assert len(forwards) == 4 * STEPS
    fed = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    _, plain = step_by_step(model, inputs, fed)
    for ours, theirs in zip(out.past_key_values.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


# --------------------------------------------------------------------------------------------------------------- scope


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_methods_do_not_reach_the_text_only_stream(model: Any, before: bool, heard: list[Any]) -> None:
    """PAI shares its stream with a listener, which hears the plain model's text-only logits bit for bit."""
    inputs = batch(model, seed=2)
    pai = PAI(alpha=1.0, gamma=2.0, layers="all")
    methods = [Listener(images=False), pai, LocoRE(beta=1.0)]
    out, telemetry = generate(model, methods if before else methods[::-1], inputs, STEPS, eos_token_id=[])
    assert all(row["pai"]["rows_edited"] > 0 for row in telemetry[:2])
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    plain, _ = step_by_step(model, without_pictures(inputs), tokens[:, :-1])
    assert torch.equal(torch.stack(heard), plain)


def test_methods_do_not_reach_a_branch_with_pictures(model: Any, heard: list[Any]) -> None:
    inputs = batch(model, seed=2)
    out, _ = generate(model, [PAI(alpha=1.0), VCD(), Listener(), LocoRE()], inputs, STEPS, eos_token_id=[])
    plain, _ = step_by_step(model, inputs, out.sequences[:, inputs["input_ids"].shape[1] : -1])
    assert torch.equal(torch.stack(heard), plain)


# ------------------------------------------------------------------------------------------------------- shared, or not


@pytest.mark.parametrize(
    ("methods", "streams"),
    [
        ([PAI()], 1),
        ([PAI(), Listener(images=False)], 1),
        ([PAI(), PAI(gamma=3.0)], 1),
        ([PAI(), Listener(images=False, edits=True)], 2),
        ([VCD(), Listener()], 2),
        ([VCD(), VCD(noise_step=999)], 2),
        ([PAI(), VCD()], 2),
        ([PAI(), VCD(), Listener(), Listener(images=False)], 3),
        ([PAI(gamma=1.0), VCD(alpha=0.0)], 0),
    ],
)
def test_plain_streams_are_shared_and_forwards_counted_once(model: Any, methods: list[Method], streams: int) -> None:
    with counted(model.lm_head) as forwards:
        _, telemetry = generate(model, methods, batch(model, PROMPTS[:2]), STEPS, eos_token_id=[])
    assert len(forwards) == (1 + streams) * STEPS
    for row in telemetry:
        counted_forwards = sum(counters.get("extra_forwards", 0.0) for counters in row.values())
        assert counted_forwards == streams * STEPS


def test_a_shared_stream_says_the_same_to_both(model: Any, heard: list[Any]) -> None:
    inputs = batch(model, seed=1)
    alone, _ = generate(model, [PAI(gamma=2.0)], inputs, STEPS)
    shared, _ = generate(model, [PAI(gamma=2.0), Listener(images=False)], inputs, STEPS)
    assert torch.equal(torch.stack(alone.logits), torch.stack(shared.logits))
    assert len(heard) == len(shared.logits)


# ---------------------------------------------------------------------------------------------------------------- lazy


def test_a_branch_nobody_asks_runs_never(model: Any) -> None:
    with counted(model.lm_head) as forwards:
        _, telemetry = generate(model, [Listener(asks=())], batch(model), STEPS, eos_token_id=[])
    assert len(forwards) == STEPS
    assert "extra_forwards" not in telemetry[0]["listener"]


def test_a_branch_catches_up_when_it_is_asked(model: Any, heard: list[Any]) -> None:
    """Asked at steps 2 and 5 only: the prompt, then all tokens since, in one forward each time."""
    inputs = batch(model, seed=3)
    with counted(model.lm_head) as forwards:
        out, telemetry = generate(model, [Listener(asks=(2, 5))], inputs, STEPS, eos_token_id=[])
    assert len(forwards) == STEPS + 3
    assert [row["listener"]["extra_forwards"] for row in telemetry] == [3, 3, 3]
    for logits, step in zip(heard, (2, 5), strict=True):
        torch.testing.assert_close(logits, out.logits[step], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- decoding


class AfterTokens(StoppingCriteria):
    """Ends a row after its own number of tokens."""

    def __init__(self, prompt: int, limits: Sequence[int]) -> None:
        self._prompt, self._limits = prompt, torch.tensor(limits)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] - self._prompt) >= self._limits


@pytest.mark.parametrize("method", [PAI(alpha=1.0, gamma=2.0), VCD()], ids=lambda method: method.name)
def test_finished_samples_neither_change_nor_count(model: Any, method: Method) -> None:
    inputs = batch(model, PROMPTS[:2], seed=4)
    free, _ = generate(model, [method], inputs, STEPS, eos_token_id=[])
    stop = [AfterTokens(inputs["input_ids"].shape[1], [2, STEPS])]
    out, telemetry = generate(model, [method], inputs, STEPS, eos_token_id=[], stopping_criteria=stop)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[1], free.sequences[1])
    assert torch.equal(out.sequences[0, : width + 2], free.sequences[0, : width + 2])
    assert [row[method.name]["extra_forwards"] for row in telemetry] == [2, STEPS]
    assert [row[method.name]["steps_edited"] for row in telemetry] == [2, STEPS]
    _, short = generate(model, [method], inputs, 2, eos_token_id=[])
    for counter in ("tokens_dropped", "argmax_changed"):
        assert telemetry[0][method.name][counter] == short[0][method.name][counter]


@pytest.mark.parametrize("methods", [[PAI(alpha=1.0, gamma=2.0)], [VCD()], [VCD(), PAI()]], ids=len)
def test_stop_strings(model: Any, methods: list[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    """generate makes the criterion itself; here one that ends the first row after two tokens."""
    inputs = batch(model, PROMPTS[:2], seed=4)
    width = inputs["input_ids"].shape[1]
    free, _ = generate(model, methods, inputs, STEPS, eos_token_id=[])
    criterion = AfterTokens(width, [2, STEPS])
    monkeypatch.setattr("transformers.generation.utils.StopStringCriteria", lambda **_: criterion)
    settings = {"eos_token_id": EOS, "stop_strings": ["dog"], "tokenizer": "tokenizer"}
    out, telemetry = generate(model, methods, inputs, STEPS, **settings)
    assert torch.equal(out.sequences[1], free.sequences[1])
    assert out.sequences[0, width:].tolist() == [*free.sequences[0, width : width + 2].tolist(), *[PAD] * (STEPS - 2)]
    for method in methods:  # the padding that the row is fed tells that it has ended: one step later
        assert [row[method.name]["steps_edited"] for row in telemetry] == [3, STEPS]


@pytest.mark.parametrize("method", [PAI(gamma=2.0), VCD()], ids=lambda method: method.name)
def test_branches_follow_the_beams_without_starting_over(model: Any, method: Method) -> None:
    inputs = batch(model, seed=4)
    with counted(model.lm_head) as forwards, counted(model.model.vision_tower) as towers:
        generate(model, [method], inputs, STEPS, min_new_tokens=STEPS, num_beams=3)
    assert len(forwards) == 2 * STEPS
    assert len(towers) == (2 if method.name == "vcd" else 1)


def test_hand_made_forwards_see_the_branch_too(model: Any) -> None:
    """Outside generate: the prompt, then token by token with the caller's own cache."""
    inputs = batch(model, seed=5)
    out, _ = generate(model, [PAI(alpha=1.0, gamma=2.0)], inputs, 4, eos_token_id=[])
    fed = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    with Stack([PAI(alpha=1.0, gamma=2.0)]).attach(model):
        logits, _ = step_by_step(model, inputs, fed)
    assert torch.equal(logits, torch.stack(out.logits))


@pytest.mark.parametrize("other", [PAI(alpha=1.0, gamma=2.0), VCD()], ids=lambda method: method.name)
@pytest.mark.parametrize("history", ["empty", "prompt_tail"])
def test_with_a_method_that_differentiates_and_selects(model: Any, other: Method, history: str) -> None:
    """SGRS chooses from the guided logits, so it never picks a token below the cut-off; both orders agree."""
    inputs = batch(model, seed=6)
    sgrs = SGRS(alpha=3.0, layers="all", history_init=history)
    results = [generate(model, methods, inputs, STEPS) for methods in ([other, sgrs], [sgrs, other])]
    (first, telemetry), (second, _) = results
    assert torch.equal(first.sequences, second.sequences)
    assert sum(row["sgrs"]["rejections"] for row in telemetry) > 0
    assert all(row[other.name]["extra_forwards"] > 0 for row in telemetry[:2])
    for row, tokens in enumerate(fresh(first, inputs)):
        logits = torch.stack(first.logits, 1)[row]
        assert bool(logits[range(len(tokens)), tokens].isfinite().all())
    assert all(parameter.grad is None for parameter in model.parameters())
