"""Where a model's weights go: device maps, what they need before they are read, and where inputs belong."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Words of ``model.device_map``; a mapping from a part of the model to a device serves, too.
DEVICE_MAPS = ("auto", "balanced", "sequential")
#: Bytes per number, by safetensors' name of its type.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
_GB = 1e9


def device_arguments(
    device_map: Any, max_memory: Mapping[Any, Any] | None, offload_folder: str | None
) -> dict[str, Any]:
    """Turn the configuration's device map into arguments of ``from_pretrained``.

    Raises
    ------
    ConfigError
        If the map is unknown or names what is no device, an amount of memory is none, the folder cannot be made, or
        what only a map uses is given without one.
    """
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value:
                raise ConfigError(f"model.{name}={value} has no effect without model.device_map; add one, such as auto")
        return {}
    if not isinstance(device_map, Mapping) and device_map not in DEVICE_MAPS:
        raise ConfigError(
            f"model.device_map={device_map} is unknown; use {', '.join(DEVICE_MAPS)} or a mapping {{PART: DEVICE}}"
        )
    arguments: dict[str, Any] = {"device_map": device_map}
    if isinstance(device_map, Mapping):
        if not device_map:
            raise ConfigError("model.device_map={} names no part; use null for one device, or a mapping {PART: DEVICE}")
        arguments["device_map"] = {str(part): _device(device, "device_map") for part, device in device_map.items()}
    if max_memory:
        arguments["max_memory"] = {_device(device, "max_memory"): _size(limit) for device, limit in max_memory.items()}
    if offload_folder:
        folder = Path(offload_folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"model.offload_folder={offload_folder} cannot be made: {error.strerror}; name another"
            ) from error
        arguments["offload_folder"] = str(folder)
    return arguments


def _device(name: Any, key: str) -> Any:
    """Return a device as accelerate knows it: a GPU is its number."""
    if str(name).isdecimal():
        return int(name)
    if name in ("cpu", "disk", "mps") or re.fullmatch(r"cuda(:\d+)?", str(name)):
        return name
    raise ConfigError(f"model.{key}: {name} is no device; use the number of a GPU, cpu, mps or disk")


def _size(limit: Any) -> int | str:
    """Check an amount of memory as accelerate reads it."""
    from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]

    with suppress(ValueError):
        if isinstance(limit, int | str) and convert_file_size_to_int(limit) >= 0:
            return limit
    raise ConfigError(f"model.max_memory: {limit} is no amount of memory; use bytes, or text such as 20GB")


def check_devices(arguments: Mapping[str, Any]) -> None:
    """Refuse GPUs that are not there.

    Parameters
    ----------
    arguments
        What `device_arguments` has made.

    Raises
    ------
    ConfigError
        Naming the first one.
    """
    chosen = arguments.get("device_map")
    named = {
        "device_map": chosen.values() if isinstance(chosen, Mapping) else (),
        "max_memory": arguments.get("max_memory", {}),
    }
    found = torch.accelerator.device_count()
    for key, devices in named.items():
        for device in devices:
            number = "0" if device == "cuda" else str(device).removeprefix("cuda:")
            if number.isdecimal() and int(number) >= found:
                raise ConfigError(f"model.{key}: torch sees {found} GPUs on this machine, and none is number {number}")


def check_parts(model: PreTrainedModel, device_map: Any) -> None:
    """Refuse a device map with parts that a model does not have: nothing would come of them.

    Raises
    ------
    ConfigError
        Naming the first one, and what there is.
    """
    if not isinstance(device_map, Mapping):
        return
    modules = dict(model.named_modules())
    for part in device_map:
        if part not in modules and part not in {**dict(model.named_parameters()), **dict(model.named_buffers())}:
            parts = ", ".join(name for name in modules if name and name.count(".") <= 1)
            raise ConfigError(f"model.device_map: the model has no part {part}; it has {parts} and what is in these")


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model takes its inputs; parts that are offloaded have none of their own."""
    device = next((part.device for part in model.parameters() if part.device.type != "meta"), None)
    hook = getattr(model, "_hf_hook", None)
    wanted = getattr(hook, "execution_device", None)
    return torch.device(wanted) if wanted is not None else device or torch.device("cpu")


# --------------------------------------------------------------------------------------------------------------- memory


def stored_numbers(path: str, revision: str | None, *, local: bool) -> dict[str, int]:
    """Count the numbers of a checkpoint by their type, without reading them; empty where that cannot be told.

    Parameters
    ----------
    path
        Local folder or hub id.
    revision
        Revision of a hub id.
    local
        Whether it is a folder.
    """
    try:
        if not local:
            from huggingface_hub import HfApi

            found = HfApi().model_info(path, revision=revision, expand=["safetensors"], timeout=10).safetensors
            return {} if found is None else dict(found.parameters)
        return _in_folder(Path(path))
    except Exception:  # whatever is wrong with the checkpoint or the hub shows when it is loaded
        return {}


def _in_folder(folder: Path) -> dict[str, int]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    counts: Counter[str] = Counter()
    for file in files:
        with file.open("rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    return dict(counts)


def needed_bytes(numbers: Mapping[str, int], dtype: torch.dtype, bits: int | None) -> float:
    """Return the least memory the weights take once they are loaded.

    Parameters
    ----------
    numbers
        Counts by type.
    dtype
        Type that floating-point numbers are converted to.
    bits
        Bits per number where they are quantised while they are loaded.
    """
    size = dtype.itemsize if bits is None else bits / 8
    return sum(count * (size if kind in _FLOATS else _SIZES.get(kind, 0)) for kind, count in numbers.items())


def free_bytes(device: torch.device) -> float | None:
    """Return the memory a device has left; ``None`` where that cannot be told."""
    if device.type == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        import psutil

        return float(psutil.virtual_memory().available + psutil.swap_memory().free)
    return None


def check_memory(path: str, needed: float, device: torch.device, dtype: torch.dtype, quantization: str | None) -> None:
    """Refuse weights that cannot fit into a device's memory, before they are read.

    What else a run needs (the cache, activations) is not known here, so that weights that barely fit are let through.

    Raises
    ------
    ConfigError
        With what is needed, what is free, and the remedies.
    """
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    kind = str(dtype).removeprefix("torch.")
    remedies = [f"model.dtype={name}" for name in ("bfloat16",) if dtype.itemsize > 2]
    remedies += [f"model.quantization={name}" for name in ("bnb-4bit",) if quantization is None]
    remedies += ["model.device_map=auto with model.offload_folder=FOLDER (what does not fit waits on disk; slow)"]
    raise ConfigError(
        f"model {path!r} needs at least {needed / _GB:.1f} GB in {quantization or kind}, and {device} has"
        f" {free / _GB:.1f} GB free\nuse a smaller model, or {', or '.join(remedies)}"
    )
