"""Serving the points outside attention: towers, projector, blocks and their parts, through hooks on modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mitigate.core.events import Event, HeadOutput, HiddenStates, LogitLens, MlpOutput, Vision, VisualEmbeddings
from mitigate.core.frame import Frame
from mitigate.core.plan import BoundSubscription
from mitigate.core.points import MAIN, Phase, Point
from mitigate.errors import HookError

if TYPE_CHECKING:
    from mitigate.core.bus import HookBus
    from mitigate.core.request import Request

Hook = Callable[[nn.Module, Any, Any], Any]


class LayerPoints:
    """Puts hooks on the modules a stack asks for, and calls the methods in stack order."""

    def __init__(self, bus: HookBus) -> None:
        self._bus = bus

    def install(self, undo: ExitStack) -> None:
        """Put hooks where the stack needs them; every change pushes its own undo."""
        bus, model = self._bus, self._bus.model
        if bus.subscriptions(Point.VISUAL_EMBEDDINGS):
            projector = bus.adapter.projector(model)
            undo.callback(projector.register_forward_hook(self._after_projector).remove)
        if bus.subscriptions(Point.VISION):
            for index, block in enumerate(bus.adapter.vision_layers(model)):
                # before transformers' own hooks, through which the features leave the tower
                undo.callback(block.register_forward_hook(self._after_vision(index), prepend=True).remove)
        for index, layer in enumerate(bus.adapter.decoder_layers(model)):
            if bus.subscriptions(Point.HEAD_OUTPUT, index):
                projection = bus.adapter.output_projection(layer)
                undo.callback(projection.register_forward_pre_hook(self._before_projection(index)).remove)
            if bus.subscriptions(Point.MLP_OUTPUT, index):
                undo.callback(bus.adapter.mlp(layer).register_forward_hook(self._after_mlp(index)).remove)
            if bus.subscriptions(Point.HIDDEN_STATES, index) or bus.subscriptions(Point.LOGIT_LENS, index):
                # first in line: whoever records hidden states sees the edited ones
                undo.callback(layer.register_forward_hook(self._after_layer(index), prepend=True).remove)

    # ------------------------------------------------------------------------------------------------------- decoder

    def _after_layer(self, layer: int) -> Hook:
        edits = self._bus.subscriptions(Point.HIDDEN_STATES, layer)
        lenses = self._bus.subscriptions(Point.LOGIT_LENS, layer)

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            frame = self._frame()
            if frame is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            for item in edits:
                if self._bus.serves(item, frame):
                    event = HiddenStates(**self._about(frame), layer=layer, hidden=hidden, start=frame.start)
                    hidden = self._edited(item, event, hidden)
            self._look(lenses, layer, frame, hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _look(self, lenses: list[BoundSubscription], layer: int, frame: Frame, hidden: Tensor) -> None:
        """Show what the row that predicts would say after this block."""
        asked = [item for item in lenses if self._bus.serves(item, frame)]
        if not asked or frame.stop < self._bus.running().layout.prompt_length:
            return
        with torch.no_grad():  # forward itself: whoever hooks these modules counts on the model's own calls
            normed = self._bus.adapter.final_norm(self._bus.model).forward(hidden[:, -1:].detach())
            raw = self._bus.adapter.unembedding(self._bus.model).forward(normed)[:, -1]
            logits = self._bus.adapter.logits(self._bus.model, raw)
        for item in asked:
            self._bus.call(item, LogitLens(**self._about(frame), layer=layer, logits=logits))

    def _after_mlp(self, layer: int) -> Hook:
        items = self._bus.subscriptions(Point.MLP_OUTPUT, layer)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            frame = self._frame()
            if frame is None:
                return None
            value = output
            for item in items:
                if self._bus.serves(item, frame):
                    about = self._about(frame)
                    event = MlpOutput(**about, layer=layer, mlp=value, inputs=args[0], start=frame.start)
                    value = self._edited(item, event, value)
            return value

        return hook

    def _before_projection(self, layer: int) -> Callable[[nn.Module, Any], Any]:
        items = self._bus.subscriptions(Point.HEAD_OUTPUT, layer)
        count = self._bus.facts.heads

        def hook(module: nn.Module, args: Any) -> Any:
            frame = self._frame()
            if frame is None:
                return None
            value = args[0]
            for item in items:
                if self._bus.serves(item, frame):
                    heads = value.unflatten(-1, (count, -1)).transpose(1, 2)
                    event = HeadOutput(**self._about(frame), layer=layer, heads=heads, start=frame.start)
                    new = self._bus.returned(item, event, heads)
                    if new is not None:
                        value = self._kept(item, value, new.transpose(1, 2).flatten(2))
            return (value, *args[1:])

        return hook

    def _edited(self, item: BoundSubscription, event: Event, value: Tensor) -> Tensor:
        """Call a handler on ``[B, Q, D]`` and count the tokens it changed; samples that have finished stay."""
        new = self._bus.returned(item, event, value)
        return value if new is None else self._kept(item, value, new)

    def _kept(self, item: BoundSubscription, value: Tensor, new: Tensor) -> Tensor:
        request, frame = self._bus.running(), self._frame()
        kept = torch.where(request.finished.to(value.device)[:, None, None], value, new)
        changed = (kept != value).any(-1)
        if frame is not None:  # padding is computed too, and is nobody's token
            changed = changed & request.layout.valid[:, frame.start : frame.stop].to(changed.device)
        request.state(item.key).count("tokens_edited", changed.sum(1))
        return kept

    # ------------------------------------------------------------------------------------------------------- pictures

    def _after_projector(self, module: nn.Module, args: Any, output: Any) -> Any:
        frame = self._picture_frame()
        if frame is None:
            return None
        adapter, changed = self._bus.adapter, False
        features = adapter.features(output, self._bus.running().layout)
        for item in self._bus.subscriptions(Point.VISUAL_EMBEDDINGS):
            if self._bus.serves(item, frame):
                edited = self._bus.call(item, VisualEmbeddings(**self._about(frame), features=features))
                if edited is not None:
                    count_images(self._bus.running(), item.key, features, edited)
                    features, changed = list(edited), True
        return adapter.joined(features, output) if changed else None

    def _after_vision(self, block: int) -> Hook:
        items = [
            item
            for item in self._bus.subscriptions(Point.VISION)
            if block in item.subscription.layers or not item.subscription.layers
        ]

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            frame = self._picture_frame()
            if frame is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            for item in items:
                if self._bus.serves(item, frame):
                    new = self._bus.returned(item, Vision(**self._about(frame), layer=block, hidden=hidden), hidden)
                    if new is not None:
                        request, changed = self._bus.running(), float(bool((new != hidden).any()))
                        with_images = torch.tensor([float(len(spans)) for spans in request.layout.images])
                        request.state(item.key).count("images_edited", with_images * changed)
                        hidden = new
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    # --------------------------------------------------------------------------------------------------------- common

    def _frame(self) -> Frame | None:
        return self._bus.request.frame if self._bus.request else None

    def _picture_frame(self) -> Frame | None:
        """Return the pass images are encoded for; ``generate`` encodes them before the first forward has a frame."""
        request = self._bus.request
        if request is None:
            return None
        frame = request.frame
        if frame is None:
            return Frame(phase=Phase.PREFILL, step=0, start=0, stop=request.layout.prompt_length, branch=MAIN)
        return None if frame.phase is Phase.DIAGNOSTIC else frame

    def _about(self, frame: Frame) -> dict[str, Any]:
        return frame.event(self._bus.running())


def count_images(request: Request, key: str, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Count the images of each request row that a method changed."""
    changed = [one.shape != other.shape or not torch.equal(one, other) for one, other in zip(old, new, strict=True)]
    images = ([span.image for span in spans] for spans in request.layout.images)
    rows = [float(sum(changed[image] for image in set(row) if image < len(changed))) for row in images]
    request.state(key).count("images_edited", torch.tensor(rows))


def same_shape(item: BoundSubscription, event: Event, value: Tensor, new: Any) -> Tensor:
    """Return a handler's tensor in the dtype of what it replaces.

    Raises
    ------
    HookError
        If it is no tensor of that shape.
    """
    if not isinstance(new, Tensor) or new.shape != value.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        layer = getattr(event, "layer", None)
        raise HookError(
            f"{item.key}.on_{item.subscription.point.value} returned {got} for {tuple(value.shape)}"
            f"{'' if layer is None else f' at layer {layer}'}"
        )
    return new.to(value.dtype)
