"""The direct path from attention to the logits: gradients of attention rows without a graph.

Everything between a head's output and the logits is held fixed except the residual stream: the output projection, the
final norm with its scale frozen, and the unembedding. What later blocks make of the head's output is left out, so this
approximates the exact gradient; it costs two matrix-vector products per step and layer, and no backward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mitigate.errors import HookError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mitigate.adapters.base import Adapter


class DirectPath:
    """Linear maps above attention, read off a model once.

    Parameters
    ----------
    model
        The whole vision-language model.
    adapter
        Knows its parts.
    wanted
        The layers whose attention is asked about; all by default.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, wanted: Collection[int] | None = None) -> None:
        blocks = enumerate(adapter.decoder_layers(model))
        layers = {index: layer for index, layer in blocks if wanted is None or index in wanted}
        self._projections = {index: adapter.output_projection(layer) for index, layer in layers.items()}
        self._unembedding: nn.Module = adapter.unembedding(model)
        #: Norms on the path by layer; the last one, under -1, is the norm before the unembedding.
        self._norms = {-1: adapter.final_norm(model)}
        self._norms |= {index: norm for index, layer in layers.items() if (norm := adapter.output_norm(layer))}
        self._finish = partial(adapter.logits, model)
        self._dense: dict[int, Tensor] = {}
        self._normed: dict[int, tuple[Tensor, Tensor]] = {}

    def install(self, undo: ExitStack) -> None:
        """Watch the norms, whose scales are frozen at their values in the running step."""
        for place, norm in self._norms.items():
            undo.callback(norm.register_forward_hook(partial(self._after_norm, place)).remove)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the frozen scale of the running step through a pass of another stream."""
        normed = dict(self._normed)
        try:
            yield
        finally:
            self._normed = normed

    def _after_norm(self, place: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._normed[place] = (args[0][:, -1].detach().to(output.device), output[:, -1].detach())

    def _diagonal(self, place: int, device: torch.device) -> Tensor:
        """Return the frozen scale of a norm without shift, ``x * (weight / scale)``: output over input, ``[B, D]``."""
        before, after = (part.float().to(device) for part in self._normed[place])
        return torch.where(before == 0, 0.0, after / torch.where(before == 0, torch.ones_like(before), before))

    def gradients(self, rows: Mapping[int, tuple[Tensor, Tensor]], cotangent: Tensor) -> dict[int, Tensor]:
        """Approximate d(cotangent . logits) / d(attention weights) of one row.

        Parameters
        ----------
        rows
            Layer -> weights ``[B, H, K]`` and values ``[B, H_kv, K, d]``.
        cotangent
            ``[B, V]``.

        Returns
        -------
        dict
            Layer -> ``[B, H, K]``: ``g[h, j] = (J_norm^T U^T c) . W_O[h] v_j``, with ``J_norm`` the diagonal of the
            norm at a frozen scale (and likewise of a norm on what attention adds, where a block has one).
        """
        if -1 not in self._normed:
            raise HookError("the final norm did not run in this step; the direct path has no scale to freeze")
        unembedding = self._weight(-1, self._unembedding).float()
        after = self._normed[-1][1].float().to(unembedding.device)
        cotangent = self._through_head(after, cotangent.float().to(unembedding.device), unembedding)
        direction = (cotangent @ unembedding) * self._diagonal(-1, unembedding.device)
        found: dict[int, Tensor] = {}
        for layer, (weights, values) in rows.items():
            batch, heads, keys = weights.shape
            groups = values.shape[1]
            projection = self._weight(layer, self._projections[layer]).float().to(values.device)
            added = direction.to(values.device)
            if layer in self._norms:
                added = added * self._diagonal(layer, values.device)
            per_head = (added @ projection).view(batch, groups, -1, 1)
            width = values.shape[-1]
            per_head = per_head.view(batch, groups, heads // groups, width)
            found[layer] = (per_head @ values.float().transpose(-1, -2)).reshape(batch, heads, keys)
        return found

    def _through_head(self, normed: Tensor, cotangent: Tensor, unembedding: Tensor) -> Tensor:
        """Bring a cotangent of the logits ``[B, V]`` back to the unembedding's output: through a soft cap or a mask."""
        raw = normed @ unembedding.t()
        if self._finish(raw) is raw:
            return cotangent
        # a logit depends on its own raw value alone: two values tell its slope, without a graph and its backward
        exact, step = raw.double(), 1e-4
        slope = (self._finish(exact + step) - self._finish(exact - step)) / (2 * step)
        return cotangent * slope.to(cotangent.dtype)

    def _weight(self, place: int, module: nn.Module) -> Tensor:
        """Return a linear map's matrix ``[out, in]``; one that is quantised or offloaded is applied to the identity."""
        weight: Any = getattr(module, "weight", None)
        plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta"
        if plain and weight.is_floating_point() and weight.dim() == 2:
            return cast(Tensor, weight)
        if place not in self._dense:
            width = getattr(module, "in_features", None)
            if width is None:
                raise UnsupportedModel(f"{type(module).__name__} is no linear map; access 'direct' cannot follow it")
            device, dtype = _works_in(module)
            basis = torch.eye(width, device=device, dtype=dtype)
            with torch.no_grad():
                shift = module(torch.zeros_like(basis[:1]))
                self._dense[place] = (module(basis) - shift).t().contiguous()
        return self._dense[place]


def _works_in(module: nn.Module) -> tuple[Any, torch.dtype]:
    """Return the device and the type of numbers a linear map takes; an offloaded one is brought to a device to run."""
    parts = (*module.parameters(), *module.buffers())
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next((part.device for part in parts if part.device.type != "meta"), None)
    dtype = next((part.dtype for part in parts if part.is_floating_point()), torch.get_default_dtype())
    return device, dtype
