"""Loading a checkpoint with its processor and finding the adapter of its family."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import torch

from mitigate.adapters.base import Adapter
from mitigate.adapters.explaining import explain
from mitigate.adapters.generic import GenericAdapter
from mitigate.adapters.placing import (
    check_devices,
    check_memory,
    check_parts,
    device_arguments,
    needed_bytes,
    stored_numbers,
)
from mitigate.adapters.quantising import quantization_named
from mitigate.core.facts import ModelFacts
from mitigate.errors import ConfigError, DataError, LayoutError, UnsupportedModel, described
from mitigate.registry import adapters

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

#: What transformers raises on files that are missing, damaged or of another kind.
_REFUSALS = (OSError, ValueError, ImportError, RuntimeError, MemoryError, TypeError, LookupError, AttributeError)
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


def adapter_for(model: PreTrainedModel, processor: ProcessorMixin | None = None) -> Adapter:
    """Return the adapter of a model's family; the generic one if the family has none of its own.

    Parameters
    ----------
    processor
        The model's processor, of which the generic adapter asks how pictures are written.

    Raises
    ------
    UnsupportedModel
        If the family has no adapter and the generic one refuses the model.
    """
    family = str(model.config.model_type)
    known = adapters()
    if family not in known.names():
        return GenericAdapter(model, processor)
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
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | None = None,
    quantization: str | None = None,
    chat_template: str | None = None,
) -> LoadedModel:
    """Load a checkpoint from the hub or a local folder.

    Parameters
    ----------
    path
        Hub id, local folder, or ``testbed`` for the model packaged with the project.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    device
        Device of the whole model; without effect where ``device_map`` is given.
    attn_implementation, revision, trust_remote_code
        As in transformers' ``from_pretrained``. Weights are read from safetensors only.
    device_map, max_memory, offload_folder
        As in transformers' ``from_pretrained``: how the model is divided over devices, and where on disk goes what
        fits nowhere else.
    quantization
        ``int8`` (torchao), ``bnb-8bit`` or ``bnb-4bit`` (bitsandbytes): weights of fewer bits.
    chat_template
        Text of a chat template, or path of a ``.jinja`` file, instead of the processor's own.

    Raises
    ------
    ConfigError
        If a value is unknown, a package it needs is not installed, or memory is too small.
    DataError
        If the folder or hub entry cannot be read, or lacks weights.
    UnsupportedModel
        If it is no vision-language model transformers or an adapter knows.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from mitigate.adapters.processors import load_processor

    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    kind = DTYPES[dtype]
    stored_as = None if quantization is None else quantization_named(quantization)
    arguments = device_arguments(device_map, max_memory, offload_folder)
    check_devices(arguments)
    folder = _testbed() if path == "testbed" else path
    local = _is_local(folder)
    if local and revision is not None:
        raise ConfigError(f"model.revision={revision} has no effect on a local folder ({path}); leave it out")
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not local:
        common["local_files_only"] = not _hub_can_be_reached()
    if device_map is None and not common.get("local_files_only"):
        bits = None if stored_as is None else stored_as.bits
        needed = needed_bytes(stored_numbers(folder, revision, local=local), kind, bits)
        check_memory(path, needed, torch.device(device), kind, quantization)
    arguments = arguments or {"device_map": {"": device}}
    asked = {
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization": quantization,
        "revision": revision,
    }
    try:
        with _quiet():
            _bring_family(folder, **common)
            processor = load_processor(folder, chat_template, **common)
            if stored_as is not None:
                arguments["quantization_config"] = stored_as.config(kind)
            model = _weights(folder, path, dtype=kind, attn_implementation=attn_implementation, **arguments, **common)
    except (*_REFUSALS, StrictDataclassError, SafetensorError) as error:
        raise explain(error, path, local=local, asked=asked) from error
    check_parts(model, arguments["device_map"])
    model = model.eval()
    adapter = adapter_for(model, processor)
    loaded = LoadedModel(model, processor, adapter, adapter.facts(model))
    _check_processor(loaded, path, template=chat_template is not None)
    return loaded


def _check_processor(loaded: LoadedModel, path: str, *, template: bool) -> None:
    """Ask about a picture, in the words of the template that was given if there is one (``template``).

    Raises
    ------
    DataError
        If the processor cannot answer, or writes pictures otherwise than the model wants them.
    """
    from PIL import Image

    try:
        inputs = loaded.inputs(["ABC"], [[Image.new("RGB", (64, 64))]])
        if template or not isinstance(loaded.adapter, GenericAdapter):
            loaded.adapter.layout(loaded.model, inputs["input_ids"], inputs["attention_mask"], inputs, loaded.processor)
    except ConfigError:
        pass  # no chat template: said when a question is asked, prompts of one's own need none
    except (*_REFUSALS, LayoutError) as error:
        if template:
            raise DataError(
                f"model.chat_template does not write a picture as the processor of {loaded.facts.family} wants it:"
                f" {error}"
            ) from error
        raise DataError(
            f"the processor of {path!r} cannot be used with its model; asked about one picture, it ends with"
            f" {described(error)}\n"
            "its files are incomplete, of another model or of an old transformers: complete them beside the weights"
        ) from error


def _weights(folder: str, path: str, **arguments: Any) -> PreTrainedModel:
    """Read the weights of a checkpoint.

    Raises
    ------
    DataError
        If some of them are missing.
    """
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **arguments
    )
    if missing := sorted(found["missing_keys"]):
        raise DataError(
            f"cannot load model {path!r}: its weights lack {missing[0]} and {len(missing) - 1} more; "
            f"check that config.json belongs to the weights"
        )
    return cast("PreTrainedModel", model)


def _bring_family(folder: str, **common: Any) -> None:
    """Import the adapter of a checkpoint's family: a package that brings one may register its classes there."""
    from transformers import PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(folder, **common)
    if values.get("model_type") in adapters().names():
        adapters().get(str(values["model_type"]))


def _is_local(path: str) -> bool:
    """Say whether a path names a folder rather than a hub id, and check that the folder holds a checkpoint.

    Raises
    ------
    DataError
        If the folder does not exist or lacks its configuration or weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or path.endswith("/"):
            raise DataError(f"model.path={path}: there is no such folder (and it is no hub id such as owner/name)")
        return False
    if not (folder / "config.json").is_file():
        raise DataError(f"{path} is no checkpoint: it has no config.json; set model.path to a folder that has one")
    if not any(folder.glob("model*.safetensors")):
        raise DataError(
            f"{path} has no safetensors, the only weights that are read; "
            f"convert others with model.save_pretrained(..., safe_serialization=True)"
        )
    return True


def _hub_can_be_reached() -> bool:
    """Say whether the hub has an address here: without one, every file would be tried again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(name.lower() in ("https_proxy", "all_proxy") and value for name, value in os.environ.items()):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading bar, reports and the hub's retries: what matters ends in an exception."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _testbed() -> str:
    from mitigate.testbed.model import checkpoint_path

    folder = Path(checkpoint_path())
    if not (folder / "config.json").is_file():
        raise DataError("the testbed's checkpoint is missing from this installation; run: mitigate testbed train")
    return str(folder)
