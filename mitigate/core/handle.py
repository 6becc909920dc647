"""The handle of an attached stack: generation, telemetry, and the questions users ask first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mitigate.errors import ConfigError, LayoutError, StackConflict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.core.bus import HookBus
    from mitigate.core.stack import Stack

#: Arguments of ``generate`` under which rows or steps are not what a method thinks they are.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "negative_prompt_ids")


class Handle:
    """A stack attached to a model.

    Parameters
    ----------
    stack, model, processor
        As given to ``Stack.attach``.
    """

    def __init__(self, stack: Stack, model: PreTrainedModel, processor: ProcessorMixin | None) -> None:
        self.stack = stack
        self.model = model
        self.processor = processor
        self.bus: HookBus | None = None
        self.attached = True
        self._samples = 0

    def generate(self, *, seed: int = 0, sample_ids: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the stack; takes and returns what ``model.generate`` takes and returns.

        Parameters
        ----------
        seed
            Seed of the methods' own random draws; the caller's ``do_sample`` uses torch's global generator as always.
        sample_ids
            One name per sample: a sample's draws depend on the seed and its name, not on its place in the batch.
            Row numbers by default.
        **kwargs
            Model inputs and arguments of ``model.generate``.

        Raises
        ------
        StackConflict
            If the stack excludes a way of decoding (beams with a token-selecting method, assisted decoding).
        """
        if not self.attached:
            raise ConfigError("the stack is no longer attached; generate inside the with block")
        self._samples = self._ids(kwargs).shape[0]
        if self.bus is None:
            return self.model.generate(**kwargs)
        if not self.stack.selects_token:
            with self._request(kwargs, seed, sample_ids):
                return type(self.model).generate(self.model, **kwargs)
        from mitigate.decoding.loop import check_arguments, decode

        kwargs = check_arguments(self.model, kwargs)
        escape = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with escape, _frozen(self.model) if self.stack.needs_gradient else nullcontext():
            kwargs = {name: _usable(value) for name, value in kwargs.items()}
            with self._request(kwargs, seed, sample_ids):
                streamer = kwargs.pop("streamer", None)
                return type(self.model).generate(
                    self.model, custom_generate=decode, bus=self.bus, token_streamer=streamer, **kwargs
                )

    def plain_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Serve ``model.generate`` called directly while the stack is attached."""
        if self.stack.selects_token:
            raise StackConflict(
                "the stack selects tokens, which model.generate cannot do; call handle.generate instead"
            )
        names = list(inspect.signature(original).parameters)
        kwargs.update(zip(names, args, strict=False))
        with self._request(kwargs, 0, None):
            return original(**kwargs)

    def telemetry(self) -> list[dict[str, dict[str, float]]]:
        """Return what the methods counted in the last request: per sample, method key -> counter -> value."""
        if self.bus is None or self.bus.last_request is None:
            return [{"bus": {}} for _ in range(self._samples)]
        return self.bus.last_request.telemetry()

    def ask(self, image: Image | Sequence[Image], prompt: str, **kwargs: Any) -> str:
        """Answer one question about a picture; needs the processor.

        Parameters
        ----------
        image
            One picture or several.
        prompt
            The user's text.
        **kwargs
            Arguments of `generate`.
        """
        from mitigate.adapters import adapter_for

        if self.processor is None:
            raise ConfigError("ask() needs the processor: stack.attach(model, processor)")
        images = list(image) if isinstance(image, Sequence) else [image]
        inputs = adapter_for(self.model).inputs(self.model, self.processor, [prompt], [images])
        sequences = self.generate(**inputs, **kwargs)
        fresh = sequences[0, inputs["input_ids"].shape[1] :]
        text: str = self.processor.tokenizer.decode(fresh, skip_special_tokens=True)
        return text.strip()

    # ------------------------------------------------------------------------------------------------------- requests

    @staticmethod
    def _ids(kwargs: dict[str, Any]) -> Tensor:
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        if ids is None:
            raise LayoutError("generate needs input_ids: token roles cannot be known from embeddings alone")
        return ids  # type: ignore[no-any-return]

    @contextmanager
    def _request(self, kwargs: dict[str, Any], seed: int, sample_ids: Sequence[str] | None) -> Iterator[None]:
        """Open a request for one call of ``generate`` and close it whatever happens."""
        bus = cast("HookBus", self.bus)
        refused = [name for name in _REFUSED if kwargs.get(name) is not None]
        if refused:
            raise StackConflict(f"generate argument {refused[0]!r} cannot be combined with methods; leave it out")
        ids = self._ids(kwargs)
        mask = kwargs.get("attention_mask")
        config = kwargs.get("generation_config") or self.model.generation_config
        ends = kwargs.get("eos_token_id", config.eos_token_id)
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if mask is None and pad is not None and pad not in _listed(ends):
            mask = (ids != pad).long()  # as generate itself infers it
        request = bus.new_request(
            ids, mask, kwargs, seed=seed, sample_ids=sample_ids, end_tokens=_listed(ends), generating=True
        )
        bus.begin(request)
        try:
            yield
            bus.end()
        finally:
            bus.request = None


def _listed(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    if isinstance(tokens, int):
        return [tokens]
    return [int(token) for token in tokens]


def _usable(value: Any) -> Any:
    """Copy a tensor made under inference mode: such tensors cannot enter a graph."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Keep parameters out of the graphs: only attention rows are differentiated."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
