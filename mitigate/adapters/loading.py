"""Loading a checkpoint with its processor and finding the adapter of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mitigate.adapters.base import Adapter
from mitigate.core.facts import ModelFacts
from mitigate.errors import DataError, UnsupportedModel
from mitigate.registry import adapters

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a stack.

    Parameters
    ----------
    model, processor
        As transformers made them.
    adapter
        The adapter of the model's family.
    facts
        The model's geometry.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    adapter: Adapter
    facts: ModelFacts

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image]]) -> BatchFeature:
        """Make the model inputs of a batch; see `Adapter.inputs`."""
        return self.adapter.inputs(self.model, self.processor, prompts, images)


def adapter_for(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a model's family.

    Raises
    ------
    UnsupportedModel
        If no adapter is registered for its ``model_type``.
    """
    family = str(model.config.model_type)
    known = adapters()
    if family not in known.names():
        raise UnsupportedModel(
            f"no adapter for model type {family!r}; known: {', '.join(known.names())}."
            " An outside package can bring one through the entry-point group 'mitigate.models'"
        )
    adapter: Adapter = known.get(family)()
    return adapter


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a checkpoint from the hub or a local folder.

    Parameters
    ----------
    path
        Hub id, local folder, or ``testbed`` for the model packaged with the project.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    device
        Device to move the model to.
    attn_implementation, revision, trust_remote_code
        As in transformers' ``from_pretrained``. Weights are read from safetensors only.

    Raises
    ------
    DataError
        If the folder or hub entry cannot be read.
    UnsupportedModel
        If it is no vision-language model transformers or an adapter knows.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    folder = _testbed() if path == "testbed" else path
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attn_implementation, use_safetensors=True, **common
        )
        processor = AutoProcessor.from_pretrained(folder, **common)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load model {path!r}: {first} (a local folder needs config.json and safetensors)"
        ) from error
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModel(f"{path!r} is no vision-language model transformers can load: {first}") from error
    model = model.to(device).eval()
    adapter = adapter_for(model)
    return LoadedModel(model, processor, adapter, adapter.facts(model))


def _testbed() -> str:
    from mitigate.testbed.model import checkpoint_path

    folder = Path(checkpoint_path())
    if not (folder / "config.json").is_file():
        raise DataError("the testbed's checkpoint is missing from this installation; run: mitigate testbed train")
    return str(folder)
