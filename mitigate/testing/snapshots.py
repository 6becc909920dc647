"""What a stack must leave as it was: the model with everything on it, the process, and a method's own memory."""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from mitigate.core.attention import ATTENTION_NAME, SERVED_BY
from mitigate.core.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, bytes, type(None), Enum, torch.dtype, torch.device)
#: Tables of a module; hooks are looked at by their keys, the rest by the objects in it.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
_MEMBERS = ("_parameters", "_buffers", "_modules")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks")
_DEPTH = 6

Snapshot = dict[str, Any]


class Same:
    """An object that equals itself only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__}>"


def _mark(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else Same(value)


def _marks(values: Mapping[str, Any]) -> Snapshot:
    return {str(key): _mark(value) for key, value in values.items()}


# ------------------------------------------------------------------------------------------------------------ the model


def of_model(model: PreTrainedModel) -> Snapshot:
    """Return what can be left behind on a model, on its classes and in the process: label -> comparable value."""
    found: Snapshot = {}
    for name, module in model.named_modules():
        label = name or "the model"
        found[f"hooks of {label}"] = {table: tuple(getattr(module, table)) for table in _HOOKS}
        found[f"parts of {label}"] = {table: _marks(getattr(module, table)) for table in _MEMBERS}
        own = {key: value for key, value in vars(module).items() if key not in (*_HOOKS, *_MEMBERS)}
        # a tensor that is no buffer is what the model notes of its last run: the content counts
        noted = {key: _frozen(value) for key, value in own.items() if isinstance(value, torch.Tensor)}
        found[f"attributes of {label}"] = {**_marks(own), **noted}
        if module in SERVED_BY:
            found[f"bus of {label}"] = True
    for name, parameter in model.named_parameters():
        found[f"flags of {name}"] = {"requires_grad": parameter.requires_grad, "grad": parameter.grad is not None}
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in (*configs.values(), model.generation_config):
        found[f"configuration {type(config).__name__}"] = {key: repr(value) for key, value in vars(config).items()}
    return {**found, **_of_classes(model), **of_process()}


def _of_classes(model: PreTrainedModel) -> Snapshot:
    """Return the attributes of the model's classes and of the modules they come from: patches show there."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if base is not object}
    sources = {sys.modules[base.__module__] for base in classes}
    found = {f"class {base.__qualname__}": _marks(vars(base)) for base in classes}
    names = ("__builtins__", "__warningregistry__")
    for source in sources:
        own = {key: value for key, value in vars(source).items() if key not in names}
        found[f"module {source.__name__}"] = _marks(own)
    functions = torch.nn.functional
    found["module torch.nn.functional"] = _marks({key: getattr(functions, key) for key in dir(functions)})
    return found


def of_process() -> Snapshot:
    """Return modes, tables and random states of the process."""
    modules = torch.nn.modules.module
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    return {
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "environment": dict(os.environ),
        "global attention functions": [
            {key: Same(value) for key, value in table.items() if key != ATTENTION_NAME} for table in tables
        ],
        "global module hooks": [tuple(getattr(modules, table)) for table in _GLOBAL_HOOKS],
        **random_states(),
    }


def random_states() -> Snapshot:
    """Return the states of the process's random generators."""
    legacy: Any = np.random.get_state()
    return {
        "torch's global random state": torch.get_rng_state().numpy().tobytes(),
        "random's global random state": random.getstate(),
        "numpy's global random state": (legacy[1].tobytes(), *legacy[2:]),
    }


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return copies of the weights and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed_weight(model: PreTrainedModel, before: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a weight or buffer that is no longer what it was."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in before or not torch.equal(tensor, before[name]):
            return str(name)
    return None


# ----------------------------------------------------------------------------------------------------------- the method


def of_method(method: Method) -> Snapshot:
    """Return what a method can remember outside of requests: itself, its classes and the globals of their modules."""
    found: Snapshot = {"the instance": _frozen(vars(method))}
    for base in type(method).__mro__:
        if not issubclass(base, Method):
            continue
        found[f"class {base.__name__}"] = _frozen(_own(vars(base)))
        source = sys.modules.get(base.__module__)
        if base is not Method and source is not None:
            found[f"module {base.__module__}"] = _frozen(_own(vars(source)))
    return found


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not (key.startswith("__") and key.endswith("__"))}


def _frozen(value: Any, depth: int = _DEPTH) -> Any:
    """Return something comparable that changes whenever the content of a value does."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().cpu().tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if depth == 0 or isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return Same(value)
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or () if _filled(cell))
        memory = (value.__defaults__, value.__kwdefaults__, vars(value), cells)
        return [Same(value), *(_frozen(part, depth - 1) for part in memory)]
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): _frozen(item, depth - 1) for key, item in value.items()}
    if isinstance(value, Iterable) and hasattr(value, "__len__"):
        parts = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [Same(value) if not isinstance(value, frozenset | tuple) else None] + [
            _frozen(item, depth - 1) for item in parts
        ]
    if hasattr(value, "__dict__") and type(value).__module__ != "typing":
        return (Same(value), _frozen(vars(value), depth - 1))
    return Same(value)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


# -------------------------------------------------------------------------------------------------------- what is new


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Name what differs between two snapshots, in a few words each."""
    found = []
    for label in dict.fromkeys((*before, *after)):
        old, new = before.get(label), after.get(label)
        if old != new:
            found.append(f"{label}{_detail(old, new)}")
    return found


def _detail(old: Any, new: Any) -> str:
    """Say which entries of a table came, went or changed."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return ""
    parts = []
    for key in dict.fromkeys((*old, *new)):
        if key not in old:
            parts.append(f"{key} is new")
        elif key not in new:
            parts.append(f"{key} is gone")
        elif old[key] != new[key]:
            parts.append(f"{key} changed{_detail(old[key], new[key])}")
    return f" ({', '.join(parts[:3])})"
