"""Import a module in a fresh process and write down what that changed: ``python -m mitigate.testing.import_probe``."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

#: Libraries that take seconds: a method file reaches them through `mitigate.lazy`.
HEAVY = ("torch", "transformers", "pytorch_lightning", "wandb")


def probe(module: str, *, loaded: bool) -> dict[str, Any]:
    """Import a module and return what it changed in this process.

    Parameters
    ----------
    module
        Name of the module.
    loaded
        Load torch and transformers first, to see what the module does to them.

    Returns
    -------
    dict
        ``changed``: names of what is different; ``heavy``: slow libraries it loads; ``network``: addresses it asked
        for; ``error``: why it could not be imported, or ``None``.
    """
    importlib.import_module("mitigate.core")
    importlib.import_module("numpy")  # adds filters of its own, and is no method's fault
    if loaded:
        importlib.import_module("transformers.modeling_utils")
        importlib.import_module("transformers.generation.utils")
    network = _watch_network()
    before, had, error = _state(loaded), set(sys.modules), None
    try:
        importlib.import_module(module)
    except Exception as problem:  # whatever its author did
        error = f"{type(problem).__name__}: {problem}"
    after = _state(loaded)
    return {
        "changed": [name for name, value in before.items() if after[name] != value],
        "heavy": [name for name in HEAVY if name in sys.modules and name not in had],
        "network": network,
        "error": error,
    }


def _watch_network() -> list[str]:
    """Refuse every connection and look-up from here on; returns the list of those that were tried."""
    tried: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(str(arguments[-1] if isinstance(arguments[0], socket.socket) else arguments[0]))
        raise OSError("no network while a method is imported")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        setattr(owner, name, refuse)
    return tried


def _state(loaded: bool) -> dict[str, Any]:
    """Return what an import must not touch, in values that can be compared."""
    root = logging.getLogger()
    state: dict[str, Any] = {
        "warnings.filters": list(warnings.filters),
        "os.environ": dict(os.environ),
        "the random module's state": random.getstate(),
        "the numpy random state": repr(sys.modules["numpy"].random.get_state()),
        "the root logger": (root.level, list(root.handlers)),
        "sys.excepthook": sys.excepthook,
        "running threads": threading.active_count(),
        "the working directory": str(Path.cwd()),
    }
    return {**state, **_of_libraries()} if loaded else state


def _of_libraries() -> dict[str, Any]:
    torch, masks = sys.modules["torch"], importlib.import_module("transformers.masking_utils")
    models = importlib.import_module("transformers.modeling_utils")
    generation = importlib.import_module("transformers.generation.utils")
    caches = importlib.import_module("transformers.cache_utils")
    owners = [
        *(torch.nn.functional, torch.nn.Module, torch.Tensor, torch.nn.Linear, models, models.PreTrainedModel),
        *(masks, generation, generation.GenerationMixin, caches, caches.Cache, caches.DynamicCache),
    ]
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's number of threads": torch.get_num_threads(),
        "torch's random state": torch.get_rng_state().tolist(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "the attention functions of transformers": _table(models.ALL_ATTENTION_FUNCTIONS),
        "the mask functions of transformers": _table(masks.ALL_MASK_ATTENTION_FUNCTIONS),
        **{f"{_name(owner)}": _callables(owner) for owner in owners},
    }


def _table(interface: Any) -> dict[str, int]:
    return {key: id(value) for key, value in interface.items()}


def _callables(owner: Any) -> dict[str, int]:
    return {key: id(value) for key, value in vars(owner).items() if callable(value)}


def _name(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)


def main() -> None:
    """Probe ``argv[1]``, write JSON to the file ``argv[2]``; ``argv[3]`` is ``loaded`` or ``fresh``."""
    module, file, mode = sys.argv[1:4]
    Path(file).write_text(json.dumps(probe(module, loaded=mode == "loaded")), encoding="utf-8")


if __name__ == "__main__":
    main()
