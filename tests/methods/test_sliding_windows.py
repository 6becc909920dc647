"""Layers that no longer see the picture: methods act on what a layer sees, whatever the cache happens to keep."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from mitigate.core import Access, Method, Phase, Point, Rows, Subscription
from mitigate.core.points import MAIN_PHASES
from mitigate.core.stack import Stack
from mitigate.errors import UnsupportedModel
from mitigate.methods.clva import CLVA
from mitigate.methods.dleaf import DLEAF
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from mitigate.testing.tiny import Prompt, TinyModel, tiny_model
from tests.core.test_choosing import Watch
from tests.core.test_points import Probe

#: Layer 1 sees everything, the others the latest 24 keys: the picture's last ones at first, and then none.
WINDOW, STEPS = 24, 14
ASKED = (Prompt("are there two red cars", (1, 2)), Prompt("describe this image in detail please", (4,)))


@cache
def tiny() -> TinyModel:
    return tiny_model("gemma3")


@cache
def plain() -> torch.Tensor:
    return generate([])[0]


def generate(methods: list[Method], **options: Any) -> tuple[torch.Tensor, list[Any]]:
    """Logits ``[T, B, V]`` and telemetry."""
    subject = tiny()
    with Stack(methods).attach(subject.model, subject.processor) as handle:
        out = handle.generate(
            **subject.inputs(ASKED), max_new_tokens=STEPS, do_sample=False, pad_token_id=subject.pad_token,
            eos_token_id=[], return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        return torch.stack(out.logits), handle.telemetry()


class Anywhere(Probe):
    """Acts on masks and values, too."""

    on_attention_mask = on_value_scale = Probe._handle


def writing(point: Point, function: Any) -> Probe:
    subscription = Subscription(
        point=point, access=Access.WRITE, layers=tuple(range(4)), rows=Rows.PREDICTORS, normalised=False
    )
    return Anywhere(subscription=subscription, function=function)


def fading(event: Any) -> torch.Tensor:
    """Gain ``[B, 1, K]`` on every column so far."""
    return (0.5 + torch.arange(event.layout.length) % 3 / 2).expand(event.layout.rows, 1, -1)


def hiding(event: Any) -> torch.Tensor:
    """Hide every third column so far from later ones."""
    columns = torch.arange(event.layout.length)
    rows = event.start + torch.arange(event.mask.shape[2])[:, None]
    return event.mask.masked_fill((columns % 3 == 0) & (columns < rows), torch.finfo(event.mask.dtype).min)


FLAT = writing(Point.ATTENTION_PROBS, lambda event: torch.full_like(event.probs, 1 / event.probs.shape[-1]))
LEVEL = writing(Point.ATTENTION_SCORES, lambda event: torch.zeros_like(event.scores))
VALUES, MASK = writing(Point.VALUE_SCALE, fading), writing(Point.ATTENTION_MASK, hiding)
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize(
    "method",
    [
        FLAT,
        LEVEL,
        VALUES,
        MASK,
        LocoRE(beta=0.5),
        CLVA(early="0", mid="1", deep="2-3", min_anchors=2, alpha=2.0, beta=1.0),
        CLVA(early="0", mid="1", deep="2-3", min_anchors=2, operator="prob_mix", mix=0.8),
        DLEAF(mix_stage="pre", reference_scope="earlier", gate="always", heads="all"),
    ],
)
def test_an_edit_does_not_depend_on_the_keys_that_the_cache_keeps(method: Method) -> None:
    cached, _ = generate([method])
    assert bool(cached.isfinite().all())
    assert float((cached - plain()).abs().max()) > 1e-2
    for way in ({"use_cache": False}, STATIC):
        torch.testing.assert_close(generate([method], **way)[0], cached, rtol=1e-3, atol=1e-3)


def test_what_is_written_on_unseen_keys_is_counted() -> None:
    counted = [sample["bus"]["weight_on_unseen_keys"] for sample in generate([FLAT])[1]]
    columns, lengths = tiny().inputs(ASKED)["input_ids"].shape[1], tiny().inputs(ASKED)["attention_mask"].sum(1)
    for length, found in zip(lengths.tolist(), counted, strict=True):
        expected = 0.0
        for step in range(STEPS):
            seen = length + step
            expected += (1 - seen / (columns + step)) + 3 * (1 - min(seen, WINDOW) / (columns + step))
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_sees_no_picture_is_neither_diagnosed_nor_changed() -> None:
    subject, inputs = tiny(), tiny().inputs(ASKED)
    layout = subject.adapter.layout(
        subject.model, inputs["input_ids"], inputs["attention_mask"], inputs, subject.processor
    )
    logits, telemetry = generate([DLEAF(layers="0,2-3", gate="always", heads="all")])
    for row, sample in enumerate(telemetry):
        last = max(int(span.positions.max()) for span in layout.images[row])
        sees = [last > layout.prompt_length - 1 + step - WINDOW for step in range(STEPS)]
        assert sample["dleaf"]["layers_diagnosed"] == sample["dleaf"]["layers_flagged"] == 3 * sum(sees)
        changed = (logits[:, row] != plain()[:, row]).any(-1).tolist()
        assert changed[: sum(sees)] == sees[: sum(sees)]
        assert not all(sees)


def replayed(subject: TinyModel, layers: tuple[int, ...], **options: Any) -> Any:
    """The last four prompt rows run again with a graph, by a method that asks for that at its first step."""
    kept: list[Any] = []

    def note(event: Any, state: Any) -> None:
        if event.step == 0 and not kept and hasattr(event, "scores"):
            kept.append(event.request.replay(state, rows=4))

    phases = MAIN_PHASES | {Phase.DIAGNOSTIC}
    point, choose = Point.ATTENTION_PROBS, Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE)
    wish = Subscription(point=point, access=Access.GRADIENT, layers=layers, phases=phases, rows=Rows.LAST)
    with Stack([Watch(wishes=(wish, choose), function=note)]).attach(subject.model, subject.processor) as handle:
        handle.generate(**subject.inputs(ASKED), max_new_tokens=1, do_sample=False, **options)
    return kept[0]


def test_prompt_rows_run_again_although_the_cache_let_their_keys_go() -> None:
    subject, replay = tiny(), replayed(tiny(), (0, 2))
    inputs = subject.inputs(ASKED)
    with torch.no_grad():
        expected = subject.model(**inputs).logits[:, replay.columns]
    assert inputs["input_ids"].shape[1] > WINDOW
    assert bool(replay.valid.all())
    torch.testing.assert_close(replay.logits, expected, rtol=1e-4, atol=1e-4)


def test_prompt_rows_that_cannot_run_again_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="paligemma see the tokens they would have to predict"):
        replayed(tiny_model("paligemma"), (0, 2))


def test_history_from_a_prompt_that_sees_itself_whole_is_refused_when_the_stack_is_built() -> None:
    subject = tiny_model("paligemma")
    refusal = r"paligemma see those they would have .* methods\.sgrs\.history_init=empty"
    stack = Stack([SGRS(history_init="prompt_tail")])
    with pytest.raises(UnsupportedModel, match=refusal), stack.attach(subject.model, subject.processor):
        pass
