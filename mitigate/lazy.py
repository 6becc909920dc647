"""Heavy libraries that are imported when first used, so that listing plugins stays fast.

A method file writes ``from mitigate.lazy import torch`` and uses ``torch`` as always; importing the file
(to read its parameters and its docstring) does not import torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    """Stands for a module until one of its attributes is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # introspection (inspect, doctest, pickle) must not trigger the import
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")
