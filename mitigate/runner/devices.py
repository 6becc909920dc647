"""The model on its device, or on several: moving it, waiting for it, and its memory."""

from __future__ import annotations

from typing import Any

import torch

from mitigate.processes import local_rank


def is_divided(model: Any) -> bool:
    """Say whether the parts of a model lie on several devices, in memory or on disk (``device_map``)."""
    devices = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    return len(devices) > 1 or "disk" in devices


def target(accelerator: str) -> str:
    """Return this process's device of a kind (``trainer.accelerator``): the GPU of its number on the machine."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return "mps" if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available() else "cpu"


def place(model: Any, device: torch.device) -> None:
    """Move a model to a device; a divided one stays where its parts are, and a quantised one where it was made."""
    if not is_divided(model) and not getattr(model, "is_quantized", False):
        with torch.inference_mode(False):  # what is moved inside it could never enter a graph
            model.to(device)


def synchronize(model: Any) -> None:
    """Wait for every GPU the model lies on."""
    for device in _gpus(model):
        torch.cuda.synchronize(device)


def release(model: Any) -> None:
    """Give memory that nobody holds any more back to the GPUs."""
    if _gpus(model):
        torch.cuda.empty_cache()


def _gpus(model: Any) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or what it stems from, is that a device or the machine has no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
