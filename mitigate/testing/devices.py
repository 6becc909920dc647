"""Pretending that the model is on another device: what would break on an accelerator breaks on the CPU too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: The device that stands for the model's: the same memory, but another name.
MODEL = torch.device("cpu", 0)
#: Functions that make a tensor out of nothing, on the default device unless told otherwise.
_FACTORIES = frozenset(
    """
    arange as_tensor empty eye full linspace ones rand randint randn randperm tensor tril_indices triu_indices zeros
    """.split()  # noqa: SIM905 - one word after another reads better
)
#: Functions in which tensors of two devices may meet.
_MEETING = frozenset({"copy_", "to", "cpu", "type_as", "equal", "__get__", "__set__", "set_"})
_MARK = "_on_default_device"


class Strayed(Exception):
    """Two tensors met that would lie on two devices."""


class PretendedDevice(TorchFunctionMode):
    """While it is active, tensors made without a device are strangers to those of the model.

    A tensor says that it is on `MODEL`; one made without ``device=`` (or on ``"cpu"``) lies on the CPU until it is
    moved. An operation on both raises `Strayed`, as it would with the model on an accelerator. Tensors of no dimension
    may meet anybody, and an index may come from the CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function and follow where its result would lie."""
        given, name = dict(kwargs or {}), str(getattr(func, "__name__", ""))
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return torch.device("cpu") if hasattr(args[0], _MARK) else MODEL
        if name in _FACTORIES and not any(isinstance(arg, Tensor) for arg in args[:1]):
            return _marked(func(*args, **given), not _is_model(given.get("device")))
        if name in ("to", "cpu"):
            return _moved(func, args, given, name)
        tensors = _tensors((args, given))
        strangers = [tensor for tensor in tensors if hasattr(tensor, _MARK)]
        locals_ = [tensor for tensor in tensors if not hasattr(tensor, _MARK)]
        if name in ("__getitem__", "__setitem__", "index_put_") and not hasattr(args[0], _MARK):
            return func(*args, **given)
        local = any(tensor.dim() for tensor in locals_)
        if local and any(tensor.dim() for tensor in strangers) and name not in _MEETING and _blamed():
            raise Strayed(name)
        return _marked(func(*args, **given), bool(strangers) and not local)


def is_stray(tensor: Tensor) -> bool:
    """Whether a tensor would lie on the CPU while the model is elsewhere."""
    return hasattr(tensor, _MARK)


def _is_model(device: Any) -> bool:
    return isinstance(device, torch.device) and device == MODEL


def _moved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Follow a tensor to another device; the copy that stays behind keeps its mark."""
    result = func(*args, **kwargs)
    others = [*args[1:], *kwargs.values()]
    devices = [torch.device(other) for other in others if isinstance(other, str | torch.device)]
    if name == "cpu" or devices:
        return _marked(_alias(result), name == "cpu" or not _is_model(devices[0]))
    reference = next((other for other in others if isinstance(other, Tensor)), args[0])
    return _marked(_alias(result), hasattr(reference, _MARK))


def _alias(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return tensor.view_as(tensor)


def _marked(value: Any, mark: bool) -> Any:
    if mark:
        for tensor in _tensors(value):
            setattr(tensor, _MARK, True)
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _blamed() -> bool:
    """Whether the operation stands in a method's own code, not in the framework's or a library's."""
    frame: Any = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return not name.startswith(("mitigate.core", "mitigate.adapters", "mitigate.decoding", "transformers"))
