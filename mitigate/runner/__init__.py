"""Run stacks of methods over a benchmark, record every sample, compare the stacks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.runner.comparison import Comparison as Comparison
    from mitigate.runner.comparison import compare as compare
    from mitigate.runner.standalone import run as run

_PUBLIC = {
    "Comparison": "mitigate.runner.comparison",
    "compare": "mitigate.runner.comparison",
    "run": "mitigate.runner.standalone",
}
__all__ = ["Comparison", "compare", "run"]


def __getattr__(name: str) -> Any:
    """Import public names on first use: the CLI's cheap commands load no Lightning."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mitigate.runner' has no attribute {name!r}")
