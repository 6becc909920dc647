"""Loading a checkpoint with its processor and finding the adapter of its family."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from mitigate.adapters.base import Adapter
from mitigate.core.facts import ModelFacts
from mitigate.errors import ConfigError, DataError, MitigateError, UnsupportedModel
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
    ConfigError
        If the attention implementation is unknown or not installed.
    DataError
        If the folder or hub entry cannot be read, or lacks weights.
    UnsupportedModel
        If it is no vision-language model transformers or an adapter knows.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    folder = _testbed() if path == "testbed" else path
    local = _is_local(folder)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not local:
        common["local_files_only"] = not _hub_can_be_reached()
    try:
        with _quiet():
            processor = AutoProcessor.from_pretrained(folder, **common)
            model, found = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                attn_implementation=attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
                **common,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _explain(error, path, local=local, attn_implementation=attn_implementation) from error
    if missing := sorted(found["missing_keys"]):
        raise DataError(
            f"cannot load model {path!r}: its weights lack {missing[0]} and {len(missing) - 1} more; "
            f"check that config.json belongs to the weights"
        )
    model = model.to(device).eval()
    adapter = adapter_for(model)
    return LoadedModel(model, processor, adapter, adapter.facts(model))


def _explain(error: Exception, path: str, *, local: bool, attn_implementation: str) -> MitigateError:
    """Turn what transformers raised while loading a checkpoint into one line with culprit and remedy."""
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if "attn_implementation" in reason or "FlashAttention" in reason:
        return ConfigError(
            f"model.attn_implementation={attn_implementation} cannot be used: it is unknown to transformers or its "
            f"package is not installed; use sdpa or eager"
        )
    if not local and isinstance(error, OSError):
        return DataError(
            f"cannot load model {path!r}: the hub cannot be reached or has no such model, and it is not in the local "
            f"cache\ncheck model.path (and model.revision), or set model.path to a local folder"
        )
    if isinstance(error, ImportError):
        return DataError(f"cannot load model {path!r}: {reason}; install what is missing")
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
        return DataError(
            f"cannot load model {path!r}: one of its JSON files is not valid JSON ({reason}); copy it again"
        )
    if "nrecognized configuration class" in reason:
        return UnsupportedModel(
            f"{path!r} holds no vision-language model transformers can load (a text model?); "
            f"set model.path to an image-text-to-text checkpoint with its processor"
        )
    if "tokenizer" in reason.lower() or "processor" in reason.lower():
        return DataError(
            f"cannot load the processor of {path!r}: tokenizer or image processor files are missing or damaged; "
            f"copy them beside the weights (processor.save_pretrained)"
        )
    if isinstance(error, ValueError):
        return UnsupportedModel(f"{path!r} is no vision-language model transformers can load: {reason}")
    if isinstance(error, OSError):
        return DataError(f"cannot load model {path!r}: {reason}")
    return DataError(
        f"cannot load the weights of {path!r}: {reason}; the safetensors are damaged, incomplete or not those of its "
        f"config.json: copy them again"
    )


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
    """Silence transformers' loading bar and reports and the hub's retries: what matters ends in an exception."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
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
