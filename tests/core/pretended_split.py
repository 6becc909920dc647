"""Two pretended devices on the CPU: what a model over two GPUs would refuse is refused here; moves are followed.

Tensors remember where they would lie, say so (``.device``), and follow ``.to()`` and ``device=``. An operation on
tensors of two devices raises, whether it stands in transformers, in the bus, in ``mitigate/ops`` or in a method.
Modules take their inputs to their own device first, and the whole model brings its output to that of its inputs, as
accelerate's hooks do inside ``forward``: hooks of the bus run before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
_FACTORIES = frozenset(
    [
        *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
        *("tensor", "tril_indices", "triu_indices", "zeros", "full_like", "zeros_like", "ones_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "rand_like", "randn_like"),
    ]
)
#: Functions in which tensors of two devices may meet, or that only look.
_MEETING = frozenset({"copy_", "to", "cpu", "__get__", "__set__", "set_", "grad", "backward", "is_inference"})


class Mixed(Exception):
    """An operation met tensors of two devices."""


class TwoDevices(TorchFunctionMode):
    """While it is active, tensors lie where they were put; what was never put anywhere lies on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, name = dict(kwargs or {}), str(getattr(func, "__name__", ""))
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return where(args[0]) or torch.device("cpu")
        if name in ("to", "cpu"):
            return _moved(func, args, given, name)
        tensors = tensors_in((args, given))
        if name in _FACTORIES:
            like = where(args[0]) if args and isinstance(args[0], Tensor) else None
            device = given.get("device")
            return put(func(*args, **given), like if device is None else _named(device))
        places = {where(tensor) for tensor in tensors if tensor.dim() and where(tensor) is not None}
        strays = [tensor for tensor in tensors if tensor.dim() and where(tensor) is None]
        if name in ("__getitem__", "__setitem__", "index_put_"):
            strays = []  # an index may come from the CPU, and a value for one place
        if name not in _MEETING and (len(places) > 1 or (places and strays)):
            raise Mixed(f"{name}: {sorted(map(str, places))}{' and the CPU' if strays else ''}")
        result = func(*args, **given)
        if name == "grad":
            for gradient, source in zip(result, tensors_in((args[1:2], given.get("inputs"))), strict=False):
                put(gradient, where(source))
            return result
        if name in _MEETING:
            return result
        return put(result, next(iter(places), None) or next((where(tensor) for tensor in tensors), None))


def where(tensor: Tensor) -> torch.device | None:
    """Return where a tensor would lie."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor, "_pretended", None)


def put(value: Any, device: torch.device | None) -> Any:
    """Note where new tensors lie; those that have a place keep it (operations in place return their argument)."""
    for tensor in tensors_in(value):
        if device is not None and where(tensor) is None:
            with torch._C.DisableTorchFunction():
                tensor._pretended = device  # type: ignore[attr-defined]
    return value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def _named(device: Any) -> torch.device | None:
    device = torch.device(device)
    return device if device in (FIRST, SECOND) else None


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    others = [*args[1:], *kwargs.values()]
    devices = [torch.device(other) for other in others if isinstance(other, str | torch.device)]
    like = next((where(other) for other in others if isinstance(other, Tensor)), where(args[0]))
    target = torch.device("cpu") if name == "cpu" else (devices or [like])[0]
    with torch._C.DisableTorchFunction():
        plain = [torch.device("cpu") if isinstance(other, str | torch.device) else other for other in args[1:]]
        named = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
        result = func(args[0], *plain, **named)
        result = result.view_as(result)  # another object: the one that stays behind keeps its place
    return put(result, None if target is None else _named(target))


def divide(model: nn.Module, second: list[nn.Module]) -> None:
    """Put some parts of a model on the second device and all others on the first, with inputs that follow."""
    away = {id(module) for part in second for module in part.modules()}
    for module in model.modules():
        place = SECOND if id(module) in away else FIRST
        for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            put(own, place)
        module.forward = _following(module.forward, place)  # type: ignore[method-assign]
    model.forward = _returning(model.forward)  # type: ignore[method-assign]


def _following(forward: Any, place: torch.device) -> Any:
    @functools.wraps(forward)
    def follow(*args: Any, **kwargs: Any) -> Any:
        return forward(*_taken(args, place), **_taken(kwargs, place))

    return follow


def _returning(forward: Any) -> Any:
    """Bring the whole model's output to the device of its inputs, as accelerate does."""

    @functools.wraps(forward)
    def give(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for name, value in output.items():
            output[name] = value.to(FIRST) if isinstance(value, Tensor) and where(value) == SECOND else value
        return output

    return give


def _taken(value: Any, place: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if where(value) == place else value.to(place)
    if type(value) in (list, tuple):
        return type(value)(_taken(part, place) for part in value)
    if type(value) is dict:
        return {key: _taken(part, place) for key, part in value.items()}
    return value
