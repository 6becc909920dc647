"""Tiny random LLaVA models, inputs and processors, and a decoder forward written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, UNK, IMAGE = range(5)
VOCAB = 100
PATCH = 4
WORDS = """
USER ASSISTANT : . , ? Yes No yes no Is is are there a an the in on of and or image Describe describe this detail Please
please just answer question true false dog cat man woman car table person chair bottle cup tree sky street red blue
""".split()  # noqa: SIM905
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Edit = Callable[[int, torch.Tensor], torch.Tensor]


# --------------------------------------------------------------------------------------------------------- builders


def tiny_llava(
    seed: int = 0, layers: int = 6, heads: int = 4, kv_heads: int = 2, grid: int = 6, gain: float = 1.6
) -> LlavaForConditionalGeneration:
    """Build a seeded fp32 LLaVA: 2-layer CLIP tower, Llama decoder of width 64, vocabulary of 100.

    Every matrix has standard deviation ``gain / sqrt(fan_in)`` (0.2 for the decoder), so that attention is far from
    uniform. The placeholder and the padding token have zero logits and are never preferred.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=grid * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=grid * grid,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlavaForConditionalGeneration(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                continue  # norms stay at one, biases at zero
            std = 1.0 if "embed" in name and "patch" not in name else gain / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        model.lm_head.weight[[PAD, IMAGE]] = 0.0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def make_inputs(
    model: LlavaForConditionalGeneration,
    prompts: Sequence[tuple[int, int, int]],
    seed: int = 0,
    pad_token_id: int = PAD,
    gap: int = 1,
) -> dict[str, torch.Tensor]:
    """Random left-padded batch; each prompt is ``(text tokens before, images, text tokens after)``.

    Images of one prompt are separated by ``gap`` text tokens. ``pixel_values`` is absent when no prompt has an image.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size

    def words(n: int) -> list[int]:
        return torch.randint(UNK + 2, model.config.text_config.vocab_size, (n,), generator=generator).tolist()

    rows: list[list[int]] = []
    for before, n_images, after in prompts:
        row = [BOS, *words(before - 1)] if before else []
        for image in range(n_images):
            row += (words(gap) if image else []) + [IMAGE] * (side * side)
        rows.append(row + words(after))
    width = max(len(row) for row in rows)
    n_images = sum(prompt[1] for prompt in prompts)
    out = {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    if n_images:
        shape = (n_images, 3, vision.image_size, vision.image_size)
        out["pixel_values"] = torch.randn(shape, generator=generator)
    return out


def tiny_processor(model_config: LlavaConfig) -> LlavaProcessor:
    """Word-level tokenizer, PIL image processor and chat template that fit a ``tiny_llava`` configuration."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    vocabulary += [f"w{i}" for i in range(model_config.text_config.vocab_size - len(vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    vision = model_config.vision_config
    size = vision.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_resize=True, do_center_crop=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model_config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


# ---------------------------------------------------------------------------------------------- one sample at a time


def split_rows(inputs: dict[str, torch.Tensor], side: int) -> list[dict[str, torch.Tensor | None]]:
    """Split a padded batch into unpadded single samples; ``side`` is the image grid's side."""
    rows: list[dict[str, torch.Tensor | None]] = []
    first = 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        n_images = int((ids == IMAGE).sum()) // (side * side)
        pixels = inputs["pixel_values"][first : first + n_images] if n_images else None
        first += n_images
        rows.append({"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "pixel_values": pixels})
    return rows


def strip(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return ``[1, T]`` ids without padding."""
    if input_ids.shape[0] != 1:
        raise ValueError("the references handle one sample at a time")
    return input_ids if attention_mask is None else input_ids[attention_mask.bool()][None]


def image_spans(model: LlavaForConditionalGeneration, input_ids: torch.Tensor, n_images: int) -> list[list[int]]:
    """Key positions of every image in raster order, for unpadded ``[1, T]`` ids."""
    where = (input_ids[0] == model.config.image_token_id).nonzero().flatten().tolist()
    if n_images == 0:
        return []
    size = model.config.image_seq_length
    return [where[i * size : (i + 1) * size] for i in range(n_images)]


# ------------------------------------------------------------------------------------------------- the decoder by hand


@dataclass
class Forward:
    """Result of :func:`full_forward`; lists are per layer and empty unless ``collect`` was set."""

    logits: torch.Tensor  # [T, V]
    probs: list[torch.Tensor] = field(default_factory=list)  # [H, T, T], the weights that multiply the values
    hidden: list[torch.Tensor] = field(default_factory=list)  # [T, D], after the block (and its edit)


def merged_embeddings(
    model: LlavaForConditionalGeneration, input_ids: torch.Tensor, pixel_values: torch.Tensor | None
) -> torch.Tensor:
    """Token embeddings ``[T, D]`` with the projected image features at the first placeholders."""
    x: torch.Tensor = model.get_input_embeddings()(input_ids[0]).clone()
    if pixel_values is not None and len(pixel_values):
        features = torch.cat(list(model.model.get_image_features(pixel_values=pixel_values.to(x.dtype)).pooler_output))
        where = (input_ids[0] == model.config.image_token_id).nonzero().flatten()[: len(features)]
        x[where] = features.to(x.dtype)
    return x


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """Root-mean-square normalisation with a learned scale."""
    weight: torch.Tensor = module.weight.to(x.dtype)
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[H, T, d]``."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def full_forward(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    *,
    probs_edit: Edit | None = None,
    scores_edit: Edit | None = None,
    hidden_edit: Edit | None = None,
    collect: bool = False,
    leaves: bool = False,
    dtype: torch.dtype | None = None,
) -> Forward:
    """Run the Llama decoder over a whole unpadded sequence, written out operation by operation.

    ``scores_edit(layer, Z)`` and ``probs_edit(layer, A)`` see the full ``[H, T, T]`` matrices before and after the
    softmax (``Z`` is scaled and already masked with ``-inf``); ``hidden_edit(layer, X)`` sees the block output
    ``[T, D]``. ``collect`` returns the edited matrices. ``leaves`` keeps the graph from the embeddings on, so that the
    loss can be differentiated with respect to the collected matrices. ``dtype`` (for instance float64) recasts the
    decoder's weights on the fly; the vision tower stays in the model's precision.
    """
    with torch.no_grad():
        x = merged_embeddings(model, input_ids, pixel_values)
    x = x.to(dtype or x.dtype)
    if leaves:
        x = x.detach().requires_grad_(True)

    def linear(module: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(value, module.weight.to(value.dtype))

    text = model.config.text_config
    decoder = model.model.language_model
    heads, groups = text.num_attention_heads, text.num_attention_heads // text.num_key_value_heads
    length = x.shape[0]
    cos, sin = (t[0].to(x.dtype) for t in decoder.rotary_emb(x, torch.arange(length)[None]))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = Forward(logits=x)
    with torch.set_grad_enabled(leaves):
        for layer, block in enumerate(decoder.layers):
            attention, normed = block.self_attn, _norm(x, block.input_layernorm)
            q = linear(attention.q_proj, normed).view(length, heads, -1).transpose(0, 1)
            k = linear(attention.k_proj, normed).view(length, heads // groups, -1).transpose(0, 1)
            v = linear(attention.v_proj, normed).view(length, heads // groups, -1).transpose(0, 1)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
            scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
            if scores_edit is not None:
                scores = scores_edit(layer, scores)
            probs = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1).to(x.dtype)
            if probs_edit is not None:
                probs = probs_edit(layer, probs)
            x = x + linear(attention.o_proj, (probs @ v).transpose(0, 1).reshape(length, -1))
            normed, mlp = _norm(x, block.post_attention_layernorm), block.mlp
            gate = torch.nn.functional.silu(linear(mlp.gate_proj, normed))
            x = x + linear(mlp.down_proj, gate * linear(mlp.up_proj, normed))
            if hidden_edit is not None:
                x = hidden_edit(layer, x)
            if collect:
                out.probs.append(probs)
                out.hidden.append(x)
        out.logits = linear(model.lm_head, _norm(x, decoder.norm))
    return out
