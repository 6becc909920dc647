"""Serving the points inside attention: which rows are asked for, the exact rows, the edits and their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mitigate.core import attention
from mitigate.core.events import AttentionMask, AttentionProbs, AttentionScores, ValueScale
from mitigate.core.frame import Frame, RowSelection
from mitigate.core.plan import BoundSubscription
from mitigate.core.points import FINAL, MAIN, ROW_POINTS, Access, Phase, Point, Rows, Subscription
from mitigate.core.request import Request
from mitigate.errors import HookError

if TYPE_CHECKING:
    from mitigate.core.bus import HookBus


class AttentionPoints:
    """Runs the attention of one decoder for a bus.

    Layers, phases and rows nobody asked for go through fused attention untouched. Rows that are asked for are
    recomputed exactly, handed to the methods in stack order (scores before weights), and put back if changed.

    A layer with a sliding window keeps only the latest keys, and a static cache has room for later ones. Methods see
    every column so far and no other, lost keys with no weight: a key's place is its column in every layer. What a
    method writes on a key that its row cannot see, there or anywhere else, reaches nothing: otherwise the outcome would
    depend on what the cache happens to keep.

    Parameters
    ----------
    bus
        Serves the requests.
    modules
        Layer -> its attention.
    eager
        Whether the model was loaded with eager attention; otherwise rows nobody asks for are SDPA's.
    """

    def __init__(self, bus: HookBus, modules: Mapping[int, nn.Module], *, eager: bool = False) -> None:
        self._bus, self._eager = bus, eager
        self._index = {id(module): index for index, module in modules.items()}
        self._replays = any(
            item.subscription.access is Access.GRADIENT and Phase.DIAGNOSTIC in item.subscription.phases
            for item in bus.bound
        )
        self._plan = {
            (phase, index): [
                item
                for served in (_on_mask, _on_scores, _on_probs, _on_final_probs, _on_values)
                for item in bus.bound
                if served(item.subscription) and index in item.subscription.layers
                if phase in item.subscription.phases
            ]
            for phase in Phase
            for index in modules
        }

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Compute the attention of one layer, ``[B, Q, H, d]``; arguments as in `attention.mitigate_attention`."""
        layer = self._index[id(module)]
        request = self._bus.request
        frame = request.frame if request else None
        if request is None or frame is None:
            return self._base(module, query, key, value, mask, kwargs, key.shape[2] - query.shape[2])
        hidden = max(frame.stop - key.shape[2], 0)  # keys that a sliding window has let go
        room = (hidden, frame.stop - hidden - key.shape[2])  # what padding makes one key a column
        start = frame.start - hidden
        items = [item for item in self._plan[frame.phase, layer] if self._bus.serves(item, frame)]
        mask = self._masked(items, layer, request, frame, query, key, mask, room)
        value = self._scaled(items, layer, request, frame, value, room)
        asked: list[tuple[BoundSubscription, RowSelection]] = []
        for item in items:
            if item.subscription.point not in ROW_POINTS:
                continue
            selection = self._selection(item.subscription.rows, request, frame, query.device)
            if selection is not None:
                asked.append((item, selection))
        begins = frame.phase is Phase.PREFILL and frame.branch == MAIN and frame.start == 0
        if self._replays and begins and request.cache.layers[layer].is_sliding:
            request.prompt_keys[layer] = (key, value)
        if not asked:
            return self._base(module, query, key, value, mask, kwargs, start)
        attention.refuse_unserved(layer, kwargs)
        base = self._base(module, query, key, value, mask, kwargs, start)
        local = _union([selection.local for _, selection in asked])
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        # autocast would take the exact rows down to half precision
        with torch.autocast(query.device.type, enabled=False) if _autocast(query) else nullcontext():
            softcap = kwargs.get("softcap")
            scores = attention.row_scores(query, key, mask, scaling, local, local + start, softcap)
            if any(room):
                scores = nn.functional.pad(scores, room, value=torch.finfo(scores.dtype).min)
                value = nn.functional.pad(value, (0, 0, *room))
            open_row = mask is None and query.shape[2] == 1 and not hidden  # a cached step that sees every key
            unseen = None if open_row else scores[:, :1] <= torch.finfo(scores.dtype).min / 2
            probs, edited = self._edit(asked, layer, request, frame, local, scores, value, unseen)
            if edited is None and not probs.requires_grad:
                return base
            return attention.splice(base, attention.mix_values(probs, value).to(base.dtype), local, edited)

    def _base(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        start: int,
    ) -> Tensor:
        """Compute attention as the model was loaded with it; ``start`` is the first row's place among the keys."""
        if self._eager:
            return attention.eager(module, query, key, value, mask, kwargs, start)
        return attention.fused(module, query, key, value, mask, kwargs)

    def _masked(
        self,
        items: Sequence[BoundSubscription],
        layer: int,
        request: Request,
        frame: Frame,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        room: tuple[int, int],
    ) -> Tensor | None:
        """Let the methods edit which keys are seen; without them the mask stays what transformers made it."""
        for item in items:
            if item.subscription.point is not Point.ATTENTION_MASK:
                continue
            lost, unfilled = room[0], -room[1]
            known = attention.additive(mask, query, key, frame.start - lost)
            lowest = torch.finfo(known.dtype).min
            known = nn.functional.pad(known, room, value=lowest)
            event = AttentionMask(**frame.event(request), layer=layer, mask=known, start=frame.start)
            new = self._bus.returned(item, event, known)
            if new is not None and not torch.equal(new, known):  # the kernel for no mask is not that for an equal one
                new = torch.where(request.finished.to(new.device)[:, None, None, None], known, new)
                changed = (new[:, 0, -1, lost:] != known[:, 0, -1, lost:]).sum(1)
                request.state(item.key).count("keys_masked", changed)
                mask = nn.functional.pad(new, (-lost, unfilled), value=lowest)
        return mask

    def _scaled(
        self,
        items: Sequence[BoundSubscription],
        layer: int,
        request: Request,
        frame: Frame,
        value: Tensor,
        room: tuple[int, int],
    ) -> Tensor:
        """Multiply the values by the methods' gains; the cache keeps them as they are."""
        for item in items:
            if item.subscription.point is not Point.VALUE_SCALE:
                continue
            seen = nn.functional.pad(value, (0, 0, *room)) if any(room) else value
            gain = self._bus.call(item, ValueScale(**frame.event(request), layer=layer, values=seen))
            if gain is None:
                continue
            batch, groups, keys, _ = seen.shape
            if gain.shape not in ((batch, 1, keys), (batch, groups, keys)):
                raise HookError(
                    f"{item.key} returned a gain of shape {tuple(gain.shape)} at layer {layer}; "
                    f"expected {(batch, 1, keys)} or {(batch, groups, keys)}"
                )
            gain = torch.where(request.finished.to(gain.device)[:, None, None], torch.ones_like(gain), gain)
            gain = nn.functional.pad(gain, (-room[0], -room[1]), value=1.0)
            request.state(item.key).count("keys_scaled", (gain != 1).any(1).sum(1))
            value = value * gain[..., None].to(value.dtype)
        return value

    def _edit(
        self,
        asked: Sequence[tuple[BoundSubscription, RowSelection]],
        layer: int,
        request: Request,
        frame: Frame,
        local: Tensor,
        matrix: Tensor,
        value: Tensor,
        unseen: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the handlers over the rows; return the final weights ``[B, H, R, K]`` and the edited rows ``[B, R]``."""
        common = {**frame.event(request), "layer": layer, "rows": frame.positions(local), "unseen": unseen}
        edited: Tensor | None = None
        softmaxed = False
        for item, selection in asked:
            if item.subscription.point is Point.ATTENTION_PROBS and not softmaxed:
                matrix, softmaxed = matrix.softmax(-1), True
            row_mask = _spread(selection, local)
            access = item.subscription.access
            if access is Access.GRADIENT and frame.gradient:
                # the lowest layer's rows become the graph's leaf; above it they already depend on it
                matrix = matrix if matrix.requires_grad else matrix.detach().requires_grad_()
                frame.tape[layer] = matrix
            if access is Access.DIRECT:
                frame.direct[layer] = (matrix.detach()[:, :, -1], value.detach())
            if softmaxed:
                seen = matrix.detach() if access in FINAL else matrix
                new = self._bus.call(item, AttentionProbs(probs=seen, row_mask=row_mask, **common))
            else:
                new = self._bus.call(item, AttentionScores(scores=matrix, row_mask=row_mask, **common))
            if new is None:
                continue
            if new.shape != matrix.shape:
                raise HookError(
                    f"{item.key} returned shape {tuple(new.shape)} for {tuple(matrix.shape)} at layer {layer}"
                )
            if unseen is not None:
                if softmaxed:
                    stray = new.detach() * (unseen & row_mask[:, None, :, None])
                    request.totals.count("weight_on_unseen_keys", stray.sum((1, 2, 3)) / new.shape[1])
                new = new.masked_fill(unseen, 0.0 if softmaxed else torch.finfo(new.dtype).min)
            if not (selection.full and selection.local is local):
                new = torch.where(row_mask[:, None, :, None], new, matrix)
            change = _change(matrix, new, softmaxed)
            request.state(item.key).note_change(change)
            changed = change > 0
            edited = changed if edited is None else edited | changed
            matrix = new
        return (matrix if softmaxed else matrix.softmax(-1)), edited

    @staticmethod
    def _selection(rows: Any, request: Request, frame: Frame, device: torch.device) -> RowSelection | None:
        """Rows of this forward a subscription asks for: indices ``[R]`` and mask ``[B, R]``; once per device."""
        if (rows, device) not in frame.selections:
            frame.selections[rows, device] = _select(rows, request, frame, device)
        return frame.selections[rows, device]


def _on_mask(subscription: Subscription) -> bool:
    return subscription.point is Point.ATTENTION_MASK


def _on_values(subscription: Subscription) -> bool:
    return subscription.point is Point.VALUE_SCALE


def _on_scores(subscription: Subscription) -> bool:
    return subscription.point is Point.ATTENTION_SCORES


def _on_probs(subscription: Subscription) -> bool:
    return subscription.point is Point.ATTENTION_PROBS and subscription.access not in FINAL


def _on_final_probs(subscription: Subscription) -> bool:
    return subscription.access in FINAL


def _autocast(query: Tensor) -> bool:
    return torch.is_autocast_enabled(query.device.type)


def _select(rows: Any, request: Request, frame: Frame, device: torch.device) -> RowSelection | None:
    layout, width = request.layout, frame.stop - frame.start
    if frame.every_row:
        rows = Rows.ALL
    if rows is Rows.LAST or rows is Rows.PREDICTORS:
        first_predictor = layout.prompt_length - 1
        if frame.stop <= first_predictor:
            return None  # a chunk of the prompt that predicts nothing
        first = max(frame.start, first_predictor) if rows is Rows.PREDICTORS else frame.stop - 1
        local = torch.arange(first - frame.start, width, device=device)
        mask = (~request.finished).to(device)[:, None].expand(-1, len(local))
    elif rows is Rows.ALL:
        local = torch.arange(width, device=device)
        mask = (layout.valid[:, frame.start : frame.stop] & ~request.finished[:, None]).to(device)
    else:
        wanted = (rows(layout)[:, frame.start : frame.stop] & ~request.finished[:, None]).to(device)
        local = wanted.any(0).nonzero().flatten()
        mask = wanted[:, local]
        if not len(local):
            return None
    return RowSelection(local, mask, full=bool(mask.all()))


def _union(locals_: Sequence[Tensor]) -> Tensor:
    """Join local row indices, ascending."""
    first = locals_[0]
    if all(local is first for local in locals_):
        return first
    joined: Tensor = torch.unique(torch.cat(list(locals_)))
    return joined


def _spread(selection: RowSelection, local: Tensor) -> Tensor:
    """Express a selection's row mask over the union of rows, ``[B, R]``."""
    if selection.local is local:
        return selection.mask
    spread = torch.zeros(selection.mask.shape[0], len(local), dtype=torch.bool, device=local.device)
    spread[:, torch.searchsorted(local, selection.local)] = selection.mask
    return spread


def _change(old: Tensor, new: Tensor, softmaxed: bool) -> Tensor:
    """By how much an edit changed rows: L1 of the weights, mean over heads, ``[B, R]``."""
    old, new = old.detach(), new.detach()
    if not softmaxed:
        old, new = old.softmax(-1), new.softmax(-1)
    change: Tensor = torch.linalg.vector_norm(new - old, ord=1, dim=(1, 3)) / old.shape[1]
    return change
