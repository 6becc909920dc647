"""What went wrong while a checkpoint was loaded, in one or two lines with culprit and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from mitigate.errors import ConfigError, DataError, MitigateError, UnsupportedModel, described
from mitigate.hubcache import cached_instead, download_command

#: Packages some processors and some quantised checkpoints need, as their errors spell them.
_PACKAGES = ("torchvision", "bitsandbytes", "torchao", "num2words", "sentencepiece", "compressed-tensors", "gptqmodel")


def explain(error: Exception, path: str, *, local: bool, asked: Mapping[str, Any]) -> MitigateError:
    """Turn what transformers raised while loading a checkpoint into the project's own error.

    Parameters
    ----------
    error
        What was raised.
    path
        The configured path.
    local
        Whether it is a folder.
    asked
        What was asked for by configuration: ``attn_implementation``, ``device_map``, ``quantization``,
        ``revision``.
    """
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if "scaled_dot_product_attention" in reason:
        return ConfigError(f"{path!r}: its family has no attention of kind sdpa; use model.attn_implementation=eager")
    if "attn_implementation" in reason or "FlashAttention" in reason:
        return ConfigError(
            f"model.attn_implementation={asked['attn_implementation']} cannot be used: it is unknown to transformers"
            " or its package is not installed; use sdpa or eager"
        )
    if "trust_remote_code" in text:
        return UnsupportedModel(
            f"{path!r} brings code of its own, which runs only if you ask for it\n"
            "read that code, then set model.trust_remote_code=true; an adapter must know its family, too"
        )
    hub = None if local else _hub(error, path, asked["revision"])
    if found := _out_of_memory(error, path) or hub or _package(error, path, text):
        return found
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError) or "not a valid JSON" in reason:
        return DataError(
            f"cannot load model {path!r}: one of its JSON files is not valid JSON ({reason}); copy it again"
        )
    if "nrecognized configuration class" in reason:
        return UnsupportedModel(
            f"{path!r} holds no vision-language model transformers can load (a text model?); "
            f"set model.path to an image-text-to-text checkpoint with its processor"
        )
    if "ignore_mismatched_sizes" in reason:  # transformers' argument; the report it speaks of was never printed
        reason = "some have other shapes than its config.json says"
    return _placed_or_quantised(error, path, reason, asked) or _files(error, path, reason)


def _placed_or_quantised(error: Exception, path: str, reason: str, asked: Mapping[str, Any]) -> MitigateError | None:
    """Explain what comes of a device map or of quantised weights."""
    if asked["device_map"] is not None and any(word in reason for word in ("device", "offload")):
        return ConfigError(
            f"model.device_map={asked['device_map']} does not work for {path!r}: {reason}\n"
            "use model.device_map=auto, and give model.offload_folder=FOLDER where parts go to disk"
        )
    if "quantiz" in reason or "quantis" in reason:
        return ConfigError(
            f"{path!r} cannot be loaded with model.quantization={asked['quantization']}: {reason}\n"
            "leave model.quantization out for a checkpoint that is quantised already, or use another checkpoint"
        )
    if asked["quantization"] is not None and isinstance(error, RuntimeError):
        return DataError(
            f"the weights of {path!r} cannot be quantised with model.quantization={asked['quantization']}: {reason}\n"
            "copy the weights again; if they load without model.quantization, use another of its words"
        )
    return None


def _files(error: Exception, path: str, reason: str) -> MitigateError:
    """Explain a checkpoint whose files are missing, damaged or of another kind."""
    if "tokenizer" in reason.lower() or "processor" in reason.lower():
        return DataError(
            f"cannot load the processor of {path!r}: tokenizer or image processor files are missing or damaged; "
            f"copy them beside the weights (processor.save_pretrained)"
        )
    if isinstance(error, ValueError):
        return UnsupportedModel(f"{path!r} is no vision-language model transformers can load: {reason}")
    if isinstance(error, OSError):
        return DataError(f"cannot load model {path!r}: {reason}\ncopy the folder again, with all its files")
    if isinstance(error, TypeError | LookupError | AttributeError | StrictDataclassError):
        return DataError(
            f"cannot load model {path!r}: {described(error)}\n"
            "a value in config.json or in the processor's files is missing or of the wrong kind: copy them again"
        )
    return DataError(
        f"cannot load the weights of {path!r}: {reason}; the safetensors are damaged, incomplete or not those of its "
        f"config.json: copy them again"
    )


def _out_of_memory(error: Exception, path: str) -> MitigateError | None:
    full = any(isinstance(cause, torch.OutOfMemoryError | MemoryError) for cause in _causes(error))
    if not full and "can't allocate memory" not in str(error):
        return None
    return ConfigError(
        f"out of memory while loading model {path!r}\n"
        "use model.dtype=bfloat16, model.quantization=bnb-4bit, or model.device_map=auto with model.offload_folder"
    )


def _hub(error: Exception, path: str, revision: str | None) -> MitigateError | None:
    """Explain a hub that says no, or says nothing."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return DataError(f"model.path={path}: there is no such folder, and it is no hub id such as owner/name")
    status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated" in str(error) or 403 in status:
        return DataError(
            f"cannot load model {path!r}: it is gated\n"
            f"accept its licence at {constants.ENDPOINT}/{path}, then log in with: hf auth login"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return DataError(
            f"cannot load model {path!r}: the hub has no such revision; correct model.revision, or take the "
            "newest with model.revision=null"
        )
    if status & {401, 404}:
        return DataError(
            f"cannot load model {path!r}: the hub has no such model, or it is private\n"
            "check model.path, or log in with: hf auth login"
        )
    if not any(isinstance(cause, OSError) for cause in causes):
        return None
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached or has no such model"
    if other := cached_instead(path, revision):
        return DataError(
            f"cannot load model {path!r}: {why}, and the local cache has another revision than {revision or 'main'}\n"
            f"take that one with model.revision={other}, or get it: {download_command(path, revision)}"
        )
    return DataError(
        f"cannot load model {path!r}: {why}, and it is not in the local cache\n"
        f"check model.path (and model.revision), or set model.path to a local folder"
    )


def _package(error: Exception, path: str, text: str) -> MitigateError | None:
    if not isinstance(error, ImportError) or not text:
        return None
    missing = next((package for package in _PACKAGES if package in text.lower()), None)
    if missing is None:
        return DataError(f"cannot load model {path!r}: {text.splitlines()[0]}; install what is missing")
    return DataError(f"cannot load model {path!r}: it needs {missing}, which is not installed: pip install {missing}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it stems from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
