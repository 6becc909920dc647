"""Running the last rows of a prompt again with a graph, to differentiate what the model knows has been said."""

from __future__ import annotations

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
class Pass:
    """One extra forward over the columns ``start ...``.

    Parameters
    ----------
    start
        First column.
    rows
        ``[B]`` request rows this pass is for: those whose text after the image begins here.
    logits
        ``[B, n, V]`` with their graph.
    tape
        Layer -> differentiable weights ``[B, H, n, K]``.
    """

    start: int
    rows: Tensor
    logits: Tensor
    tape: dict[int, Tensor]


@dataclass(frozen=True)
class Replay:
    """Prompt rows with their graph; each row's next token is known.

    Parameters
    ----------
    columns
        ``[W]`` columns of the rows.
    logits
        ``[B, W, V]`` float32, detached; zeros where not valid.
    targets
        ``[B, W]`` the tokens that follow them in the prompt.
    valid
        ``[B, W]`` rows that are text after the sample's last image.
    passes
        The forwards that made them.
    """

    columns: Tensor
    logits: Tensor
    targets: Tensor
    valid: Tensor
    passes: tuple[Pass, ...]

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
            Layer -> ``(A, dA)``, each ``[B, H, K]`` over the columns up to the last row's; zeros where not valid.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for part in self.passes:
            place = int(self.columns[index]) - part.start
            layers = sorted(part.tape)
            weights = [part.tape[layer] for layer in layers]
            if place < 0:  # the text of this pass's samples begins later
                rows = slopes = [torch.zeros_like(weight[:, :, 0]) for weight in weights]
            else:
                with torch.enable_grad():
                    scalar = (cotangent.to(part.logits) * part.logits[:, place]).sum()
                gradients = torch.autograd.grad(scalar, weights, retain_graph=True)
                mine = [part.rows[:, None, None].to(weight.device) for weight in weights]
                rows = [weight.detach()[:, :, place] * own for weight, own in zip(weights, mine, strict=True)]
                slopes = [gradient[:, :, place] * own for gradient, own in zip(gradients, mine, strict=True)]
            for layer, row, slope in zip(layers, rows, slopes, strict=True):
                before = found.get(layer)
                found[layer] = (row, slope) if before is None else (before[0] + row, before[1] + slope)
        return found


def replay(bus: HookBus, request: Request, state: MethodState, rows: int) -> Replay:
    """See `Request.replay`.

    Samples whose text after the image begins at another column get a pass of their own: the image's embeddings are no
    longer there, so no pass may run over its columns.

    Raises
    ------
    HookError
        If the method asked for no gradients in the diagnostic phase.
    UnsupportedModel
        If the keys of earlier columns are not kept as they are.
    """
    if not isinstance(request.cache, DynamicCache):
        raise UnsupportedModel(f"prompt rows cannot be run again over a {type(request.cache).__name__}")
    if not request.facts.causal_prompt:
        raise UnsupportedModel(f"prompt rows of {request.facts.family} see the tokens they would have to predict")
    layout, ids = request.layout, request.ids
    stop = layout.prompt_length - 1
    first = max(stop - rows, 1)
    columns = torch.arange(first, stop, device=ids.device)
    starts = layout.after_image.clamp_min(first)
    text = layout.prompt_roles == Role.PROMPT
    valid = (columns >= starts[:, None]) & text[:, first:stop] & text[:, first + 1 : stop + 1]
    passes = [
        _pass(bus, request, state, start, starts == start)
        for start in sorted(set(starts[valid.any(1)].tolist()))
        if start < stop
    ]
    width = passes[0].logits.shape[-1] if passes else 1
    logits = torch.zeros(*valid.shape, width, device=ids.device)
    for part in passes:
        own, place = part.rows.to(logits.device)[:, None, None], part.start - first
        # chosen, not multiplied by zero: a token the model excludes may be minus infinity in float32
        logits[:, place:] = torch.where(own, part.logits.detach().to(logits), logits[:, place:])
    state.count("extra_forwards", 1.0, valid.any(1))
    return Replay(columns, logits, ids[:, first + 1 : stop + 1], valid, tuple(passes))


def _pass(bus: HookBus, request: Request, state: MethodState, start: int, rows: Tensor) -> Pass:
    stop = request.layout.prompt_length - 1
    cache = DynamicCache()
    for layer, kept in enumerate(request.cache.layers):  # a copy: the main cache must not see this pass
        if not hasattr(kept, "keys"):
            raise UnsupportedModel(f"layer {layer} has no attention: rows of the prompt cannot be run again behind it")
        keys, values = request.prompt_keys.get(layer, (kept.keys, kept.values))
        if keys.shape[2] < stop:
            raise UnsupportedModel(f"layer {layer} no longer keeps the prompt's keys (sliding window)")
        cache.update(keys[:, :, :start].detach(), values[:, :, :start].detach(), layer)
    valid = request.layout.valid[:, :stop].long()
    inputs = {
        "input_ids": request.ids[:, start:stop],
        "attention_mask": valid,
        "position_ids": request.positions(stop)[..., start:],
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
    return Pass(start, rows, output.logits, dict(frame.tape))
