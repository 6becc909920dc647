"""Whether gradients pass through a decoder's layers: those of a quantised model may not let them, or not say so."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mitigate.adapters.base import Adapter


def check_gradients(key: str, model: PreTrainedModel, adapter: Adapter) -> None:
    """Send a gradient through one layer of every quantised kind, as a step of one token does.

    Parameters
    ----------
    key
        The method that needs gradients.
    model, adapter
        The model and its family.

    Raises
    ------
    UnsupportedModel
        If a kind of layer does not pass it on.
    """
    tried = set()
    for block in adapter.decoder_layers(model):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            kind = (type(module), type(weight))
            plain = type(weight) is nn.Parameter and weight.is_floating_point()
            if plain or not hasattr(module, "in_features") or kind in tried:
                continue
            tried.add(kind)
            if not _passes_gradients(module, model.dtype):
                raise UnsupportedModel(
                    f"{key} needs gradients, which the quantised layers of this model ({kind[0].__name__}) do not pass"
                    f" on\ngive {key} the setting that works without gradients (access='direct'), or load the model"
                    " without model.quantization"
                )


def _passes_gradients(module: Any, dtype: torch.dtype) -> bool:
    """Say whether a layer gives its input a gradient."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = torch.ones(1, 1, module.in_features, device=module.weight.device, dtype=dtype, requires_grad=True)
        try:
            (gradient,) = torch.autograd.grad(module(token).float().square().sum(), token)
        except (RuntimeError, NotImplementedError):
            return False
    return bool(gradient.isfinite().all()) and bool(gradient.any())
