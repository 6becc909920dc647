"""Whether the machine has the device that is asked for."""

from __future__ import annotations

from mitigate.errors import ConfigError

_GPUS = ("gpu", "cuda", "mps")


def check_accelerator(name: str, key: str) -> None:
    """Refuse a GPU that is not there; torch is loaded only when one is asked for.

    Parameters
    ----------
    name
        Lightning's name of the accelerator.
    key
        Option to blame.

    Raises
    ------
    ConfigError
        If the machine has no such GPU.
    """
    if name not in _GPUS:
        return
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not (any(found.values()) if name == "gpu" else found[name]):
        raise ConfigError(f"{key}={name}: torch sees no such device on this machine; use {key}=cpu or auto")
