"""The testbed's model: a small LLaVA, built from the classes of transformers and saved like any other checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mitigate.testbed.draw import PICTURE_SIZE
from mitigate.testbed.language import WORDS
from mitigate.testbed.options import DEFAULT_SIZE
from mitigate.testbed.options import ModelSize as ModelSize

CHECKPOINT_FORMAT: Final = 1
IMAGE_TOKEN: Final = "<image>"
SPECIAL_TOKENS: Final = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
SPACE: Final = "\u2581"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %} ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's way of asking: ``USER: <image>\\nquestion ASSISTANT:``."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level fast tokenizer: every word of the world is one token, and decoding gives back the written text."""
    entries = [*SPECIAL_TOKENS, ".", "?", ":", *(SPACE + word for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<unk>"))
    # The order matters: white space is folded before words get their mark, and punctuation is cut off afterwards.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(entry, special=True, normalized=False) for entry in SPECIAL_TOKENS])
    begin = entries.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def build_processor(size: ModelSize = DEFAULT_SIZE) -> LlavaProcessor:
    """Tokenizer, picture normalisation and chat template in one `LlavaProcessor`."""
    side = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    # The Pillow backend: it needs no torchvision. A picture of 64 x 64 passes through resize and crop unchanged.
    pictures = CLIPImageProcessorPil(size={"shortest_edge": PICTURE_SIZE}, crop_size=side)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=size.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(size: ModelSize = DEFAULT_SIZE, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """Make a freshly initialised model.

    Parameters
    ----------
    size
        Sizes of tower and decoder.
    seed
        Seed of the initial weights; the caller's random state is left as it was.
    """
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=size.vision_mlp,
        projection_dim=size.width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=PICTURE_SIZE,
        patch_size=size.patch_size,
    )
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PICTURE_SIZE // size.patch_size) ** 2,
        tie_word_embeddings=False,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(do_sample=False, **special)
    return model


def checkpoint_path() -> Path:
    """Folder of the checkpoint that ships with the package."""
    return Path(__file__).parent / "checkpoint"


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    size: ModelSize = DEFAULT_SIZE,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write model (16-bit safetensors), processor and recipe into a folder.

    Parameters
    ----------
    model
        Model in any precision; it is left as it is.
    folder
        Where to write; made if missing.
    size
        The model's sizes, for the processor and the recipe.
    recipe
        What the model was trained with; written to ``training.json`` beside the weights' checksum.

    Returns
    -------
    Path
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.to(torch.float16).save_pretrained(folder)
    build_processor(size).save_pretrained(folder)
    record = {
        "format": CHECKPOINT_FORMAT,
        "sha256": checksum(folder / "model.safetensors"),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "size": asdict(size),
        **(recipe or {}),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load(folder: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a saved testbed checkpoint in 32 bit, ready to generate; the one that ships with the package by default.

    Raises
    ------
    FileNotFoundError
        If the folder holds no checkpoint.
    """
    folder = folder or checkpoint_path()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no testbed checkpoint in {folder}; make one with: mitigate testbed train")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(folder)
