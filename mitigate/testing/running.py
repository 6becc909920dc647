"""Running a method on a tiny model, and watching its handlers while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from mitigate.core import Event, Method, Point, Selection
from mitigate.core.plan import BoundSubscription, bind
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, PluginError, UnsupportedModel
from mitigate.testing.base import Skip, Subject, fail
from mitigate.testing.tiny import PROMPTS as PROMPTS
from mitigate.testing.tiny import TESTBED, Prompt, TinyModel, tiny_model

if TYPE_CHECKING:
    from mitigate.core.handle import Handle
    from mitigate.core.state import Trace

#: Tokens generated where a check says nothing else.
STEPS = 4
#: Rounding that another shape of the same float32 computation may bring.
TOLERANCE = 1e-3
#: The one-picture prompt alone.
SINGLE = PROMPTS[:1]
#: How a method says no: to a model, or to parameters on this model.
REFUSALS = (UnsupportedModel, ConfigError)

#: Wraps a handler's call: gets the subscription, the event and the call itself, and returns the handler's value.
Around: TypeAlias = Callable[[BoundSubscription, Event, Callable[[], Any]], Any]
Methods: TypeAlias = Sequence[Method] | Mapping[str, Method]

#: Point -> field of its event with the value a handler may replace.
_VALUES = {
    Point.TEXT_INPUT: "ids",
    Point.IMAGE_INPUT: "images",
    Point.VISION: "hidden",
    Point.VISUAL_EMBEDDINGS: "features",
    Point.ATTENTION_MASK: "mask",
    Point.ATTENTION_SCORES: "scores",
    Point.ATTENTION_PROBS: "probs",
    Point.HEAD_OUTPUT: "heads",
    Point.MLP_OUTPUT: "mlp",
    Point.HIDDEN_STATES: "hidden",
    Point.NEXT_TOKEN_LOGITS: "logits",
}


@dataclass(frozen=True)
class Outcome:
    """What a generation gave.

    Parameters
    ----------
    tokens
        ``[B, T]`` generated tokens.
    logits
        ``[B, T, V]`` raw logits they were chosen from.
    telemetry
        Per sample: method key -> counter -> value.
    traces
        What the methods reported, if they were asked.
    """

    tokens: Tensor
    logits: Tensor
    telemetry: list[dict[str, dict[str, float]]]
    traces: list[Trace]

    def row(self, row: int) -> Outcome:
        """Return one sample."""
        part = slice(row, row + 1)
        return replace(self, tokens=self.tokens[part], logits=self.logits[part], telemetry=self.telemetry[part])


@dataclass(frozen=True)
class Call:
    """One call of a handler: what it was given, as it was then, and what it gave back.

    Parameters
    ----------
    item
        The subscription it was called for.
    event
        What it got.
    before
        Copies of the event's tensors, made before the call.
    value
        What it returned.
    """

    item: BoundSubscription
    event: Event
    before: dict[str, Tensor]
    value: Any

    @property
    def point(self) -> Point:
        """Where."""
        return self.item.subscription.point

    @property
    def where(self) -> str:
        """The handler, with layer, phase and step, for messages."""
        return where(self.item, self.event)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return what the handler may replace and what it put there, tensor by tensor; nothing if it did not."""
        name = _VALUES.get(self.point)
        if self.value is None or name is None:
            return []
        new = list(self.value) if isinstance(self.value, list | tuple) else [self.value]
        old = [tensor for label, tensor in self.before.items() if label.partition("[")[0] == name]
        return list(zip(old, new, strict=False))

    @property
    def changed(self) -> bool:
        """Whether it put something else in the place of the value."""
        if isinstance(self.value, Selection):
            scores = self.before["scores"]
            return bool((self.value.chosen.to(scores.device) & (self.value.token != scores.argmax(-1))).any())
        if self.point is Point.VALUE_SCALE and self.value is not None:
            return bool((self.value != 1).any())
        return any(one.shape != other.shape or not torch.equal(one, other) for one, other in self.pairs())


def where(item: BoundSubscription, event: Event) -> str:
    """Name a handler, with layer, phase and step."""
    layer = getattr(event, "layer", None)
    place = f"{'' if layer is None else f'layer {layer}, '}{event.phase.value}, step {event.step}"
    return f"on_{item.subscription.point.value} ({place})"


def stage(subject: Subject) -> TinyModel:
    """Return the model a check runs on: the subject's, or the testbed for a method that is made for it alone.

    Raises
    ------
    Skip
        If the method refuses the model.
    CheckFailure
        If the method contradicts itself, so that no stack with it can be built.
    """
    tiny, method = subject.model, subject.method
    try:
        try:
            method.check_model("tiny", tiny.facts)
        except ConfigError:
            tiny = tiny_model(TESTBED)
            method.check_model(TESTBED, tiny.facts)
        with quiet():
            bind({subject.name: method}, tiny.facts)
    except REFUSALS as refusal:
        raise Skip(f"refuses this model: {refusal}") from refusal
    except PluginError as error:
        fail(str(error))
    return tiny


def prompts_for(method: Method) -> tuple[Prompt, ...]:
    """Return the prompts a method is given at once: a padded batch, or one where it serves one sample at a time."""
    return PROMPTS if method.tags.batch else SINGLE


@contextmanager
def quiet() -> Iterator[None]:
    """Let no warning through: one check looks at them, the others at something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generate(methods: Methods, tiny: TinyModel, inputs: Mapping[str, Any], **options: Any) -> Outcome:
    """Generate greedily with a stack that is attached for this one call; options as for `generate_with`."""
    with quiet(), Stack(methods).attach(tiny.model, tiny.processor) as handle:
        return generate_with(handle, tiny, inputs, **options)


def generate_with(
    handle: Handle,
    tiny: TinyModel,
    inputs: Mapping[str, Any],
    *,
    steps: int = STEPS,
    ends: Sequence[int] = (),
    around: Around | None = None,
    **kwargs: Any,
) -> Outcome:
    """Generate greedily with an attached stack.

    Parameters
    ----------
    inputs
        Of the model.
    steps
        Tokens to generate.
    ends
        Tokens that end a sample; none by default, so that all samples have ``steps`` tokens.
    around
        Called in place of every handler.
    **kwargs
        More arguments of ``handle.generate``.
    """
    options: dict[str, Any] = {
        "max_new_tokens": steps,
        "do_sample": False,
        "pad_token_id": tiny.pad_token,
        "eos_token_id": list(ends),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with watching(handle, around):
        out = handle.generate(**inputs, **options, **kwargs)
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    return Outcome(fresh, torch.stack(out.logits, 1), handle.telemetry(), handle.trace())


@contextmanager
def watching(handle: Handle, around: Around | None) -> Iterator[None]:
    """Put a function around every call of a handler: the bus has one door for them all."""
    bus = handle.bus
    if around is None or bus is None:
        yield
        return
    call, wrapper = bus.call, around

    def watched(item: BoundSubscription, event: Event) -> Any:
        return wrapper(item, event, lambda: call(item, event))

    bus.call = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del bus.call


def record(methods: Methods, tiny: TinyModel, inputs: Mapping[str, Any], **options: Any) -> tuple[Outcome, list[Call]]:
    """Generate and return every call of a handler as well."""
    calls: list[Call] = []

    def around(item: BoundSubscription, event: Event, call: Callable[[], Any]) -> Any:
        before = {name: tensor.detach().clone() for name, tensor in tensors_of(event).items()}
        value = call()
        calls.append(Call(item, event, before, value))
        return value

    return generate(methods, tiny, inputs, around=around, **options), calls


def tensors_of(event: Event) -> dict[str, Tensor]:
    """Return every tensor an event carries, by name: ``probs``, ``features[1]``, ``layout.valid``."""
    found: dict[str, Tensor] = {}
    request, layout = event.request, event.layout
    sources = {"": vars(event), "layout.": {**vars(layout), "valid": layout.valid, "image_mask": layout.image_mask}}
    sources["request."] = {"ids": request.ids, "finished": request.finished, "end_tokens": request.end_tokens}
    for prefix, values in sources.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, list):
                found |= {f"{prefix}{name}[{i}]": part for i, part in enumerate(value) if isinstance(part, Tensor)}
    return found


def usable(logits: Tensor) -> bool:
    """Whether tokens can be chosen from logits ``[..., V]``: minus infinity excludes a token, but not all of them."""
    wrong = logits.isnan() | logits.isposinf()
    return not bool(wrong.any()) and bool(logits.isfinite().any(-1).all())


def apart(one: Outcome, other: Outcome, tolerance: float = 0.0) -> str:
    """Say where two generations differ first, ``"sample 1, token 2"``; empty if they agree.

    Parameters
    ----------
    tolerance
        By how much logits may differ; 0 compares them bit for bit. Tokens have to be the same.
    """
    for step in range(one.tokens.shape[1]):
        near = torch.isclose(one.logits[:, step], other.logits[:, step], rtol=tolerance, atol=tolerance, equal_nan=True)
        for row in range(one.tokens.shape[0]):
            if not bool(near[row].all()) or one.tokens[row, step] != other.tokens[row, step]:
                ours, theirs = one.logits[row, step].double(), other.logits[row, step].double()
                worst = float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())  # not -inf - -inf
                return f"sample {row}, token {step} (logits differ by up to {worst:.2g})"
    return ""
