"""Weights of fewer bits: the words of ``model.quantization`` and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from mitigate.errors import ConfigError


@dataclass(frozen=True)
class Quantization:
    """A way of storing weights.

    Parameters
    ----------
    package
        What it needs installed.
    bits
        Bits per weight.
    config
        Makes transformers' configuration object for a type of computation.
    """

    package: str
    bits: int
    config: Callable[[torch.dtype], Any]


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bnb_8bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _bnb_4bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


QUANTIZATIONS = {
    "int8": Quantization("torchao", 8, _torchao_int8),
    "bnb-8bit": Quantization("bitsandbytes", 8, _bnb_8bit),
    "bnb-4bit": Quantization("bitsandbytes", 4, _bnb_4bit),
}


def quantization_named(name: str) -> Quantization:
    """Return what a word of ``model.quantization`` stands for.

    Raises
    ------
    ConfigError
        If the word is unknown, or its package is not installed.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(f"model.quantization={name} is unknown; use {', '.join(QUANTIZATIONS)}, or null for none")
    found = QUANTIZATIONS[name]
    if find_spec(found.package) is None:
        raise ConfigError(
            f"model.quantization={name} needs {found.package}, which is not installed:"
            " pip install 'mitigate[quantized]'"
        )
    return found
