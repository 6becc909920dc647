"""The project's attention function: transformers' SDPA, plus exact rows where a method reads or writes attention.

Registered once under the project's own name together with its mask function: without the mask function transformers
would silently build no causal mask at all for our name.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from mitigate.core.attention_points import AttentionPoints

ATTENTION_NAME = "mitigate"

#: Attention module -> who serves it; several models can be attached at once.
SERVED_BY: weakref.WeakKeyDictionary[nn.Module, AttentionPoints] = weakref.WeakKeyDictionary()

#: Keyword arguments that change the arithmetic of attention in ways the exact rows do not reproduce.
_UNSERVED = ("s_aux", "position_bias", "cache")


def mitigate_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention with intervention points; transformers' attention-function signature.

    Parameters
    ----------
    query
        ``[B, H, Q, d]``, rotated.
    key, value
        ``[B, H_kv, K, d]`` including the cache.
    attention_mask
        ``None``, bool or additive ``[B, 1, Q, K]``.

    Returns
    -------
    tuple
        Output ``[B, Q, H, d]`` and always ``None`` for the weights: methods see them on the bus.
    """
    points = SERVED_BY.get(module)
    if points is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return points.attend(module, query, key, value, attention_mask, kwargs), None


def register() -> None:
    """Register the attention function and its mask function (idempotent).

    Raises
    ------
    UnsupportedModel
        If transformers did not take the mask function: attention would silently lose its causal mask.
    """
    AttentionInterface.register(ATTENTION_NAME, mitigate_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    if ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        raise UnsupportedModel(
            "this transformers version did not register the mask function; the causal mask would be lost"
        )


def fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Run transformers' SDPA untouched, ``[B, Q, H, d]``."""
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return output


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    start: int,
) -> Tensor:
    """Run the eager attention of the module's own model file, ``[B, Q, H, d]``: what a model loaded as eager runs.

    Raises
    ------
    UnsupportedModel
        If the file has none.
    """
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModel(f"{type(module).__name__} has no eager attention; load the model with attention 'sdpa'")
    seen = mask if mask is None and query.shape[2] == 1 else additive(mask, query, key, start)
    output: Tensor = function(module, query, key, value, seen, **kwargs)[0]
    return output


def refuse_unserved(layer: int, kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedModel` for a layer whose attention has terms the exact rows would miss."""
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"layer {layer} uses attention argument {name!r}, which attention points do not serve"
            )


def additive(mask: Tensor | None, query: Tensor, key: Tensor, start: int) -> Tensor:
    """Write a layer's mask as numbers to add to the scores: ``[B, 1, Q, K]`` in the dtype of the query.

    No mask means causal (and a kernel that is given any mask no longer adds the causal part itself).

    Parameters
    ----------
    mask
        ``None``, bool or additive ``[B, 1, Q, K]``.
    query, key
        As in `mitigate_attention`.
    start
        Position of the first query row.
    """
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        positions = torch.arange(start, start + rows, device=query.device)[:, None]
        mask = (torch.arange(keys, device=query.device) <= positions).expand(batch, 1, rows, keys)
    mask = mask[..., :keys].expand(batch, 1, rows, keys)
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)


def row_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    local: Tensor,
    positions: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Masked, scaled scores of chosen query rows, without repeating grouped keys.

    Parameters
    ----------
    query, key
        As in `mitigate_attention`.
    local
        ``[R]`` row indices into Q.
    positions
        ``[R]`` their columns in the sequence.
    softcap
        Scores are ``softcap * tanh(scores / softcap)`` before the mask.

    Returns
    -------
    Tensor
        ``[B, H, R, K]`` float32, or float64 for a float64 model.
    """
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = (query if len(local) == query.shape[2] else query[:, :, local]).to(exact) * scaling
    scores = rows.reshape(batch, groups, -1, width) @ key.to(exact).transpose(-1, -2)
    scores = scores.view(batch, heads, len(local), keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(exact).min
    if mask is None and query.shape[2] == 1:
        return scores  # a single cached step sees every key
    if mask is None:
        hidden = torch.arange(keys, device=key.device) > positions[:, None]
        return scores.masked_fill(hidden, lowest)
    rows_mask = mask[:, :, local, :keys]
    if rows_mask.dtype == torch.bool:
        return scores.masked_fill(~rows_mask, lowest)
    return (scores + rows_mask.to(exact)).clamp_min(lowest)


def mix_values(probs: Tensor, value: Tensor) -> Tensor:
    """Weighted sum of values for chosen rows: ``[B, H, R, K]`` times ``[B, H_kv, K, d]`` gives ``[B, R, H, d]``."""
    batch, heads, rows, keys = probs.shape
    groups = value.shape[1]
    mixed = probs.to(value.dtype).reshape(batch, groups, -1, keys) @ value
    return mixed.view(batch, heads, rows, -1).transpose(1, 2)


def splice(base: Tensor, rows: Tensor, local: Tensor, edited: Tensor | None) -> Tensor:
    """Put edited rows into the fused output; rows that no method edited keep it bit for bit.

    Parameters
    ----------
    base
        ``[B, Q, H, d]``.
    rows
        ``[B, R, H, d]``; where they carry a graph, unedited rows of the result carry it too, valued as in ``base``.
    local
        ``[R]`` row indices into Q.
    edited
        ``[B, R]`` bool; ``None`` when no row was edited.
    """
    kept = base if base.shape[1] == len(local) else base[:, local]
    if rows.requires_grad:
        kept = kept.detach() + (rows - rows.detach())  # fused value, exact rows' gradient
    chosen = kept if edited is None else torch.where(edited[:, :, None, None], rows, kept)
    if base.shape[1] == len(local):
        return chosen
    return base.index_copy(1, local, chosen)
