"""One framework for stopping vision-language models from hallucinating: method plugins, stacks, fair comparison."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.adapters import load_model as load_model
    from mitigate.core.method import Method as Method
    from mitigate.core.stack import Stack as Stack
    from mitigate.errors import MitigateError as MitigateError
    from mitigate.registry import register_method as register_method

__version__ = "0.1.0"

_PUBLIC = {
    "Method": "mitigate.core.method",
    "MitigateError": "mitigate.errors",
    "Stack": "mitigate.core.stack",
    "load_model": "mitigate.adapters",
    "register_method": "mitigate.registry",
}
__all__ = ["Method", "MitigateError", "Stack", "__version__", "load_model", "register_method"]


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562): ``import mitigate`` loads neither torch nor transformers."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mitigate' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, also those not imported yet."""
    return sorted(__all__)
