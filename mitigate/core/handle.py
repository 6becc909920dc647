"""The handle of an attached stack: generation, telemetry, and the question users ask first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from mitigate.core.streams import edit_images
from mitigate.errors import ConfigError, LayoutError, StackConflict, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

    from mitigate.core.bus import HookBus
    from mitigate.core.request import Request
    from mitigate.core.stack import Stack
    from mitigate.core.state import Trace


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
        self._generate: Callable[..., Any] = model.generate

    def generate(
        self,
        *args: Any,
        seed: int = 0,
        sample_ids: Sequence[str] | None = None,
        trace: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate with the stack; takes and returns what ``model.generate`` takes and returns.

        Parameters
        ----------
        seed
            Seed of the methods' own random draws; the caller's ``do_sample`` uses torch's global generator as always.
        sample_ids
            One name per sample: a sample's draws depend on the seed and its name, not on its place in the batch.
            Row numbers by default.
        trace
            Whether the methods shall report what they do; read it with `trace`.
        *args, **kwargs
            Model inputs and arguments of ``model.generate``.

        Raises
        ------
        StackConflict
            If the stack excludes a way of decoding (beams with a token-selecting method, assisted decoding).
        ConfigError
            If the stack is no longer attached, or there is not one sample id per sample.
        """
        if not self.attached:
            raise ConfigError("the stack is no longer attached; generate inside the with block")
        kwargs = self._named(args, kwargs)
        if self.bus is None:
            inputs = kwargs.get("input_ids", kwargs.get("inputs", kwargs.get("inputs_embeds")))
            self._samples = len(inputs) if inputs is not None else 1
            return self._generate(**kwargs)
        if not self.bus.needs_loop:
            config = self._config(kwargs)
            with self._request(kwargs, config, seed, sample_ids, trace) as request:
                return self._generate(**_observed(kwargs, config, request))
        return self._generate_selecting(kwargs, seed, sample_ids, trace)

    def _generate_selecting(
        self, kwargs: dict[str, Any], seed: int, sample_ids: Sequence[str] | None, trace: bool
    ) -> Any:
        """Generate through the project's own loop."""
        from mitigate.decoding.loop import check_decoding, decode, with_stop_strings

        config = self._config(kwargs)
        check_decoding(config, kwargs)
        kwargs = with_stop_strings(kwargs, config, getattr(self.processor, "tokenizer", None))
        escape = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with escape, _frozen(self.model) if self.stack.needs_gradient else nullcontext():
            kwargs = {name: _usable(value) for name, value in kwargs.items()}
            with self._request(kwargs, config, seed, sample_ids, trace):
                streamer = kwargs.pop("streamer", None)
                return self._generate(custom_generate=decode, bus=self.bus, token_streamer=streamer, **kwargs)

    def plain_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Serve ``model.generate`` called directly while the stack is attached."""
        if self.bus is not None and self.bus.needs_loop:
            raise StackConflict(
                "the stack takes part in selecting tokens, which model.generate cannot do; call handle.generate instead"
            )
        return self.generate(*args, **kwargs)

    def telemetry(self) -> list[dict[str, dict[str, float]]]:
        """Return what the methods counted in the last request: per sample, method key -> counter -> value."""
        if self.bus is None or self.bus.last_request is None:
            return [{"bus": {}} for _ in range(self._samples)]
        return self.bus.last_request.telemetry()

    def trace(self) -> list[Trace]:
        """Return what the methods reported in the last request, in order; empty unless it was traced."""
        request = None if self.bus is None else self.bus.last_request
        return [] if request is None or request.traces is None else list(request.traces)

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
        output = self.generate(**inputs, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        fresh = sequences[0, inputs["input_ids"].shape[1] :]
        text: str = self.processor.tokenizer.decode(fresh, skip_special_tokens=True)
        return text.strip()

    # ------------------------------------------------------------------------------------------------------- requests

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give positional arguments of ``generate`` their names."""
        names = list(inspect.signature(type(self.model).generate).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _config(self, kwargs: dict[str, Any]) -> GenerationConfig:
        """Resolve what ``generate`` will do: arguments, over a passed configuration, over the model's own."""
        given = {name: value for name, value in kwargs.items() if name != "generation_config"}
        model = self.model if self.bus is None else self.bus.entry
        config: GenerationConfig = model._prepare_generation_config(kwargs.get("generation_config"), **given)[0]
        return config

    @contextmanager
    def _request(
        self,
        kwargs: dict[str, Any],
        config: GenerationConfig,
        seed: int,
        sample_ids: Sequence[str] | None,
        trace: bool,
    ) -> Iterator[Request]:
        """Open a request for one call of ``generate`` and close it whatever happens."""
        bus = cast("HookBus", self.bus)
        _check_arguments(kwargs, config)
        if bus.entry is not self.model and config.prefill_chunk_size is not None:
            raise UnsupportedModel(
                f"{bus.facts.family} embeds the prompt before it generates, and that cannot be cut into chunks;"
                " leave prefill_chunk_size unset"
            )
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        if ids is None:
            raise LayoutError("generate needs input_ids: token roles cannot be known from embeddings alone")
        if ids.shape[0] > 1 and not self.stack.batch:
            raise StackConflict("a method of the stack serves one sample at a time; generate them one by one")
        if sample_ids is not None and len(sample_ids) != ids.shape[0]:
            raise ConfigError(f"sample_ids has {len(sample_ids)} entries for {ids.shape[0]} samples")
        ends = _listed(config.eos_token_id)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), None)
        mask = kwargs.get("attention_mask")
        if mask is None and pad is not None and pad not in ends:
            mask = (ids != pad).long()  # as generate itself infers it
        # a row that a stop string has ended shows it by the padding it is fed; all other ends are known without that
        unseen_ends = bool(config.stop_strings) and not bus.needs_loop
        request = bus.new_request(
            ids,
            mask,
            kwargs,
            seed=seed,
            sample_ids=sample_ids,
            end_tokens=ends,
            pad_token=pad if unseen_ends else None,
            generating=True,
            trace=trace,
        )
        bus.begin(request)
        try:
            edited = edit_images(bus, request, kwargs)
            request.replace_images(edited)
            kwargs.update(edited)  # what the caller's generate goes on with
            for name in bus.adapter.layout_only:
                kwargs.pop(name, None)
            yield request
            bus.end()
        finally:
            bus.drop()


def _observed(kwargs: dict[str, Any], config: GenerationConfig, request: Request) -> dict[str, Any]:
    """Let the request know which rows the caller's own stopping criteria end."""
    criteria = kwargs.get("stopping_criteria")
    if not criteria or (config.num_beams or 1) > 1:
        return kwargs
    return {**kwargs, "stopping_criteria": StoppingCriteriaList(_Observed(item, request) for item in criteria)}


class _Observed(StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion whose verdicts the request hears."""

    def __init__(self, criterion: Any, request: Request) -> None:
        self._criterion, self._request = criterion, request

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self._criterion(input_ids, scores, **kwargs)
        self._request.finished = self._request.finished | done.to(self._request.finished.device)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)


def _check_arguments(kwargs: dict[str, Any], config: GenerationConfig) -> None:
    """Refuse arguments of ``generate`` under which rows or steps are not what a method thinks they are.

    Raises
    ------
    StackConflict
        For assisted decoding, guidance by a second stream, and collected attentions.
    """
    refused = {
        "assistant_model": kwargs.get("assistant_model") is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "guidance_scale": config.guidance_scale not in (None, 1, 1.0),
        "output_attentions": bool(config.output_attentions),
    }
    for name, wrong in refused.items():
        if wrong:
            raise StackConflict(f"generate argument {name!r} cannot be combined with methods; leave it out")


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
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModel(
            "the model was loaded under torch.inference_mode, which excludes gradients; load it outside"
        )
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
