"""Token-by-token decoding in which a method may choose the token; entered by ``generate(custom_generate=...)``.

transformers prepares inputs, cache, logits processors and stopping criteria as for its own loop; this loop differs in
two things: the stack may select the token, and where a method needs gradients every predicting forward is a one-token
graph over a detached cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from mitigate.core.choosing import select_token, tell_chosen
from mitigate.errors import ConfigError, StackConflict, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from mitigate.core.bus import HookBus

#: Inputs of a forward that have one entry per token.
_PER_TOKEN = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")
#: Inputs of a forward that belong to the pictures and were consumed with the first tokens; transformers names others.
_PICTURES = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "image_grid_thw", "video_grid_thw", "batch_num_images"}


def check_decoding(config: GenerationConfig, kwargs: Mapping[str, Any]) -> None:
    """Refuse ways of decoding that a token-selecting stack cannot honour.

    Raises
    ------
    StackConflict
        For beams, static caches, chunked prefill, collected hidden states, or another custom loop.
    """
    if (config.num_beams or 1) > 1:
        raise StackConflict("beam search keeps several hypotheses, but the stack selects one token; use num_beams=1")
    if config.use_cache is False:
        raise StackConflict("the stack decodes token by token over a cache; leave use_cache on")
    if config.cache_implementation not in (None, "dynamic"):
        raise StackConflict("the stack needs the dynamic cache; leave cache_implementation unset")
    if config.prefill_chunk_size:
        raise StackConflict("a token-selecting stack cannot chunk the prefill; leave prefill_chunk_size unset")
    if config.output_hidden_states:
        raise StackConflict("output_hidden_states is not collected for a token-selecting stack; leave it out")
    if kwargs.get("custom_generate") is not None:
        raise StackConflict("custom_generate owns the decoding loop, and so does the stack; use one of them")


def with_stop_strings(kwargs: dict[str, Any], config: GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """Turn ``stop_strings`` into a stopping criterion: ``generate`` keeps the tokenizer from a custom loop.

    Raises
    ------
    ConfigError
        If there are stop strings but no tokenizer.
    """
    tokenizer = kwargs.pop("tokenizer", tokenizer)
    if not config.stop_strings:
        return kwargs
    if tokenizer is None:
        raise ConfigError("stop_strings need a tokenizer: pass tokenizer=..., or attach with the processor")
    if "stop_strings" not in kwargs:
        raise StackConflict("give stop_strings to generate itself, not inside a generation_config")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=kwargs.pop("stop_strings"), tokenizer=tokenizer))
    return {**kwargs, "stopping_criteria": criteria}


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    bus: HookBus,
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generate ``[B, P + T]`` token ids; the signature is transformers' for a custom loop.

    Where the stack leaves the choice to plain decoding, tokens are those of transformers' own greedy search or
    sampling.
    """
    request = bus.request
    if request is None:
        raise UnsupportedModel("the custom loop runs inside handle.generate only")
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    gradient = bool(bus.gradient_layers)
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    kept_scores: list[Tensor] = []
    kept_logits: list[Tensor] = []
    outputs = _prefill(model, bus, input_ids, gradient, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].detach().to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = logits_processor(input_ids, logits.clone())
        if generation_config.output_scores:
            kept_scores.append(scores)
        if generation_config.output_logits:
            kept_logits.append(logits)
        tokens = _choose(bus, logits, scores, bool(generation_config.do_sample))
        if ends:
            tokens = torch.where(unfinished, tokens, pad.to(tokens.device))
        tell_chosen(bus, logits, scores, tokens)
        _forget_graph(outputs, bus)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if token_streamer is not None:
            token_streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(kept_scores) or None)
        request.finished = ~unfinished
        if not bool(unfinished.any()):
            break
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        with torch.enable_grad() if gradient else nullcontext():
            outputs = model(**inputs, return_dict=True)
    if token_streamer is not None:
        token_streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(kept_scores) or None,
        logits=tuple(kept_logits) or None,
        past_key_values=model_kwargs.get("past_key_values"),
    )


def _prefill(model: PreTrainedModel, bus: HookBus, ids: Tensor, gradient: bool, model_kwargs: dict[str, Any]) -> Any:
    """Run the prompt; with gradients its last token runs alone, so that the graph spans one token."""
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **model_kwargs)
    if not gradient:
        return model(**inputs, return_dict=True)
    cache = inputs.get("past_key_values")
    if not isinstance(cache, DynamicCache) or cache.get_seq_length():
        raise StackConflict("attention gradients need a fresh dynamic cache; leave past_key_values unset")
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            inputs[name] = _usable(inputs[name])
    request = bus.request
    last_is_image = request is not None and bool(request.layout.image_mask[:, -1].any())
    if last_is_image or ids.shape[1] < 2 or not bus.facts.causal_prompt:
        # the last token is a picture's, or others see it: one graph over the whole prompt, exact and larger
        with torch.enable_grad():
            outputs = model(**inputs, return_dict=True)
    else:
        first, last = _split(inputs)
        model(**first, return_dict=True)
        last["past_key_values"] = cache
        with torch.enable_grad():
            outputs = model(**last, return_dict=True)
    return outputs


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a prompt's inputs into those of all tokens but the last and those of the last."""
    first, last = dict(inputs), {name: value for name, value in inputs.items() if name not in _PICTURES}
    for name in _PER_TOKEN:
        if inputs.get(name) is not None:
            first[name], last[name] = inputs[name][..., :-1], inputs[name][..., -1:]
    if inputs.get("inputs_embeds") is not None:
        first["inputs_embeds"], last["inputs_embeds"] = inputs["inputs_embeds"][:, :-1], inputs["inputs_embeds"][:, -1:]
    if inputs.get("attention_mask") is not None:
        first["attention_mask"] = inputs["attention_mask"][:, :-1]
    return first, last


def _usable(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value


def _choose(bus: HookBus, logits: Tensor, scores: Tensor, do_sample: bool) -> Tensor:
    """Let the stack select; fall back to the caller's way of decoding, ``[B]``."""
    selection = select_token(bus, logits, scores)
    if selection is not None and bool(selection.chosen.all()):
        return selection.token.to(scores.device)
    plain = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1) if do_sample else scores.argmax(-1)
    if selection is None:
        return plain
    return torch.where(selection.chosen.to(plain.device), selection.token.to(plain.device), plain)


def _forget_graph(outputs: Any, bus: HookBus) -> None:
    """Detach what the step leaves behind: keys and values of layers above the lowest differentiated one."""
    request = bus.request
    if request is None or request.graph_logits is None:
        return
    request.graph_logits = None
    if request.frame is not None:
        request.frame.tape.clear()
    for layer in outputs.past_key_values.layers:
        keys = getattr(layer, "keys", None)  # a layer without attention has none, and no graph comes through it
        if keys is not None and keys.requires_grad:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
