"""Running the last rows of a prompt again with a graph, to differentiate what the model knows has been said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from mitigate.core.frame import Frame
from mitigate.core.layout import Role
from mitigate.core.points import Phase
from mitigate.errors import HookError, UnsupportedModel

if TYPE_CHECKING:
    from mitigate.core.bus import HookBus
    from mitigate.core.request import Request
    from mitigate.core.state import MethodState


@dataclass(frozen=True)
class Replay:
    """Prompt rows with their graph; each row's next token is known.

    Parameters
    ----------
    columns
        ``[W]`` columns of the rows.
    logits
        ``[B, W, V]`` float32, detached.
    targets
        ``[B, W]`` the tokens that follow them in the prompt.
    valid
        ``[B, W]`` rows that are text after the sample's last image and so are their targets.
    """

    columns: Tensor
    logits: Tensor
    targets: Tensor
    valid: Tensor
    graph: Tensor
    tape: dict[int, Tensor]

    def gradients(self, index: int, cotangent: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Gradient of ``(cotangent * logits[:, index]).sum()`` with respect to that row's own attention weights.

        Parameters
        ----------
        index
            Place in `columns`.
        cotangent
            ``[B, V]``.

        Returns
        -------
        dict
            Layer -> ``(A, dA)``, each ``[B, H, K]`` over the columns up to the last row's.
        """
        layers: Sequence[int] = sorted(self.tape)
        rows = [self.tape[layer] for layer in layers]
        with torch.enable_grad():
            scalar = (cotangent.to(self.graph.dtype) * self.graph[:, index]).sum()
        found = torch.autograd.grad(scalar, rows, retain_graph=True)
        return {
            layer: (row.detach()[:, :, index], gradient[:, :, index])
            for layer, row, gradient in zip(layers, rows, found, strict=True)
        }


def replay(bus: HookBus, request: Request, state: MethodState, rows: int) -> Replay:
    """See `Request.replay`.

    Raises
    ------
    HookError
        If the method asked for no gradients.
    UnsupportedModel
        If the keys of earlier columns are not kept as they are.
    """
    if not isinstance(request.cache, DynamicCache):
        raise UnsupportedModel(f"prompt rows cannot be run again over a {type(request.cache).__name__}")
    prompt = request.layout.prompt_length
    stop = prompt - 1
    start = max(stop - rows, 1)
    cache = DynamicCache()
    for layer, kept in enumerate(request.cache.layers):  # a copy: the main cache must not see this pass
        cache.update(kept.keys[:, :, :start].detach(), kept.values[:, :, :start].detach(), layer)
    valid = request.layout.valid[:, :stop].long()
    inputs = {
        "input_ids": request.ids[:, start:stop],
        "attention_mask": valid,
        "position_ids": (valid.cumsum(1) - 1).clamp_min(0)[:, start:],
        "past_key_values": cache,
        "use_cache": True,
        "return_dict": True,
    }
    frame = Frame(
        phase=Phase.DIAGNOSTIC, step=0, start=start, stop=stop, owner=state.key, gradient=True, every_row=True
    )
    with torch.enable_grad():
        output = bus.extra_forward(request, frame, inputs)
    if not frame.tape:
        raise HookError(f"{state.key} differentiates no attention in the diagnostic phase; subscribe to it there")
    state.count("extra_forwards", 1.0)
    columns = torch.arange(start, stop, device=request.ids.device)
    text = (request.layout.prompt_roles == Role.PROMPT) & (
        torch.arange(prompt, device=request.ids.device) >= request.layout.after_image[:, None]
    )
    return Replay(
        columns=columns,
        logits=output.logits.detach().float(),
        targets=request.ids[:, start + 1 : prompt],
        valid=text[:, start:stop] & text[:, start + 1 : prompt],
        graph=output.logits,
        tape=dict(frame.tape),
    )
