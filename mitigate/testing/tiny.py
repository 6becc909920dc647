"""Tiny models for the conformance checks: random weights from a configuration, built in milliseconds."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from mitigate.adapters import BUILTIN
from mitigate.adapters.loading import adapter_for, load_model
from mitigate.errors import PluginError, UnknownName
from mitigate.registry import adapters, suggestion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.base import Adapter
    from mitigate.core.facts import ModelFacts

#: The small trained model packaged with the project, for methods that are made for it alone.
TESTBED = "testbed"
#: Width and height of the pictures before the processor brings them to the model's size.
_SIDE = 40


@dataclass(frozen=True)
class Prompt:
    """A user's question.

    Parameters
    ----------
    text
        The words.
    pictures
        One seed per picture: the same seed is the same picture.
    """

    text: str
    pictures: tuple[int, ...] = ()


#: One picture, none, two, and a question shorter than most windows: a batch of them is padded.
PROMPTS = (
    Prompt("describe this image in detail please", (1,)),
    Prompt("what is in the street and on the table near the tree"),
    Prompt("are there two red cars", (2, 3)),
    Prompt("dog ?", (4,)),
)


@dataclass(frozen=True)
class TinyModel:
    """A small model with its processor.

    Parameters
    ----------
    family
        Its ``model_type``, or ``testbed``.
    model, processor
        As transformers has them; this copy belongs to whoever asked for it and may be damaged.
    """

    family: str
    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def adapter(self) -> Adapter:
        """The adapter of the family."""
        return adapter_for(self.model)

    @property
    def facts(self) -> ModelFacts:
        """The model's geometry."""
        return self.adapter.facts(self.model)

    @property
    def pad_token(self) -> int:
        """Token that fills up shorter prompts."""
        return int(self.processor.tokenizer.pad_token_id)

    def inputs(self, prompts: Sequence[Prompt] = PROMPTS) -> dict[str, Tensor]:
        """Make the model inputs of a left-padded batch of prompts; a family that always needs a picture gets one."""
        asked = self.askable(prompts)
        pictures = [[_picture(seed) for seed in prompt.pictures] for prompt in asked]
        texts = [prompt.text for prompt in asked]
        return dict(self.adapter.inputs(self.model, self.processor, texts, pictures))

    def askable(self, prompts: Sequence[Prompt] = PROMPTS) -> list[Prompt]:
        """Return the prompts as they can be asked: with a picture, where the family takes none without."""
        if self.adapter.text_only:
            return list(prompts)
        return [prompt if prompt.pictures else replace(prompt, pictures=(5,)) for prompt in prompts]

    def padded(self, inputs: Mapping[str, Tensor], columns: int) -> dict[str, Tensor]:
        """Return the inputs with more padding on the left."""
        shape, fills = inputs["input_ids"].shape, {"input_ids": self.pad_token}
        return {
            name: torch.nn.functional.pad(value, (columns, 0), value=fills.get(name, 0))
            if value.shape == shape  # ids, mask, token types
            else value
            for name, value in inputs.items()
        }

    def cast(self, dtype: torch.dtype) -> TinyModel:
        """Return a copy in another dtype."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype))


def tiny_families() -> list[str]:
    """Return the families that have a tiny model: those whose adapter names a builder."""
    known = adapters()
    return [family for family in known.names() if _builder_of(known.get(family))]


def reference_family() -> str:
    """Return the family on which methods are checked unless others are asked for."""
    return next(iter(BUILTIN))


def tiny_model(family: str, seed: int = 0) -> TinyModel:
    """Return a fresh tiny model; ``testbed`` is the one packaged with the project.

    Parameters
    ----------
    family
        One of `tiny_families`, or ``testbed``.
    seed
        Seed of the random weights.

    Raises
    ------
    UnknownName
        If the family has no tiny model.
    """
    pristine = _pristine(family, seed)
    # a deep copy is several times faster than building anew; the original never runs and never carries a hook
    return replace(pristine, model=copy.deepcopy(pristine.model))


@cache
def _pristine(family: str, seed: int) -> TinyModel:
    if family == TESTBED:
        loaded = load_model(TESTBED)
        return TinyModel(TESTBED, loaded.model.requires_grad_(False), loaded.processor)
    if family not in tiny_families():
        raise UnknownName(f"no tiny model of family {family!r}{suggestion(family, tiny_families())}")
    builder = _builder_of(adapters().get(family))
    module, _, function = str(builder).partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"adapter {family!r} names the tiny model {builder}, which cannot be imported: {error}"
        ) from error
    model, processor = build(seed)
    return TinyModel(family, model.eval().requires_grad_(False), processor)


def _builder_of(adapter: Any) -> str | None:
    return getattr(adapter, "tiny", None)


def _picture(seed: int) -> Image.Image:
    """Draw smooth noise: neighbouring patches are alike, pictures are not."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear")[0]
    return Image.fromarray((fine * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
