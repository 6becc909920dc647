"""Running the extra streams of a request: their prompts, caches and logits, on demand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mitigate.core.branches import StreamPlan, find_stream
from mitigate.core.events import ImageInput, TextInput
from mitigate.core.frame import Frame
from mitigate.core.layer_points import count_images
from mitigate.core.points import Phase, Point
from mitigate.core.request import Request, continued
from mitigate.errors import HookError

if TYPE_CHECKING:
    from mitigate.core.bus import HookBus


class Streams:
    """The branches of one request.

    Parameters
    ----------
    bus
        Serves the request.
    main
        The request whose tokens the branches follow.
    inputs
        The request's model inputs, for its images.
    """

    def __init__(self, bus: HookBus, main: Request, inputs: Mapping[str, Any]) -> None:
        self._bus, self._main, self._inputs = bus, main, inputs
        self._running: dict[int, Stream] = {}
        #: ``[B, T]`` tokens the main stream was fed after its prompt.
        self.generated = main.ids[:, :0]

    def follow(self, ids: Tensor, past: int) -> None:
        """Note the tokens of a main forward over columns ``past ...``."""
        fresh = ids[:, max(self._main.layout.prompt_length - past, 0) :]
        if past == 0 or self.generated.shape[0] != ids.shape[0]:
            self.generated = fresh
        else:
            self.generated = torch.cat([self.generated, fresh], 1)

    def reorder(self, beams: Tensor) -> None:
        """Follow a permutation of the rows."""
        self.generated = self.generated[beams]
        for stream in self._running.values():
            stream.reorder(beams)

    def logits(self, key: str, name: str) -> Tensor:
        """See `Request.branch_logits`."""
        method = self._bus.methods[key]
        index = find_stream(self._bus.streams, method, key, name)
        if index is None:
            known = ", ".join(branch.name for branch in method.branches()) or "none"
            raise HookError(f"{key} asks for branch {name!r}, which it does not declare; its branches: {known}")
        stream = self._running.get(index)
        if stream is None or not stream.follows(self.generated):  # another prefix: a search without a cache
            stream = self._running[index] = Stream(self._bus, self._main, self._bus.streams[index], self._inputs)
        passes = stream.catch_up(self.generated)
        if passes:
            self._main.state(key).count("extra_forwards", float(passes), ~self._main.finished)
        return stream.last


class Stream:
    """One extra stream: a request of its own whose methods' memory is the main one's."""

    def __init__(self, bus: HookBus, main: Request, plan: StreamPlan, inputs: Mapping[str, Any]) -> None:
        self._bus, self._main, self._plan = bus, main, plan
        self._names: dict[str, Any] = {"branch": plan.branch.name, "owner": plan.owner}
        ids, mask, images = self._prompt(inputs)
        layout = bus.adapter.layout(bus.model, ids, mask, images, bus.attachment.processor)
        self._request = Request(bus, layout, ids, seed=main.seed, sample_ids=main.sample_ids)
        self._request.adopt(main)
        self._images: dict[str, Any] = images
        self._cache = DynamicCache(config=bus.adapter.decoder_config(bus.model))
        self._fed: Tensor | None = None
        self._positions = torch.empty(0)
        self.last = torch.empty(0)

    def follows(self, generated: Tensor) -> bool:
        """Whether what the stream was fed begins what the main stream was fed."""
        fed = self._fed
        return fed is None or (fed.shape[1] <= generated.shape[1] and torch.equal(fed, generated[:, : fed.shape[1]]))

    def reorder(self, beams: Tensor) -> None:
        """Follow a permutation of the rows."""
        self._cache.reorder_cache(beams)
        if self._fed is not None:
            self._fed = self._fed[beams]

    def catch_up(self, generated: Tensor) -> int:
        """Run the stream up to the main one's step; returns the number of forwards."""
        passes = 0
        if self._fed is None:
            self._forward(self._request.ids, 0, self._images)
            self._images, self._fed, passes = {}, generated[:, :0], 1
        fresh = generated[:, self._fed.shape[1] :]
        if fresh.shape[1]:
            self._forward(fresh, self._request.layout.prompt_length + self._fed.shape[1], {})
            self._fed, passes = generated, passes + 1
        return passes

    def _forward(self, ids: Tensor, start: int, images: Mapping[str, Any]) -> None:
        request, bus = self._request, self._bus
        stop = start + ids.shape[1]
        request.layout = request.layout.grown(stop)
        request.finished = self._main.finished
        prompt = request.layout.prompt_length
        phase = Phase.PREFILL if stop <= prompt else Phase.DECODE
        frame = Frame(phase=phase, step=max(stop - prompt, 0), start=start, stop=stop, **self._names)
        mask = request.layout.valid.long()
        inputs = {
            **images,
            "input_ids": ids,
            "attention_mask": mask,
            "past_key_values": self._cache,
            "use_cache": True,
            **bus.last_logits_only,
            "return_dict": True,
        }
        if start == 0:
            with torch.no_grad(), bus.passing(request, frame):  # it may encode the pictures
                own = bus.adapter.prompt_inputs(bus.model, ids, mask, images)
            if "inputs_embeds" in own:  # in place of tokens and pictures
                inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", *images)}
            inputs, self._positions = {**inputs, **own}, own["position_ids"]
        self._positions = continued(self._positions, stop)
        inputs["position_ids"] = self._positions[..., start:]
        with torch.no_grad(), bus.direct.kept() if bus.direct is not None else nullcontext():
            self.last = bus.extra_forward(request, frame, inputs).logits[:, -1]
        for state in request.states.values():
            state.count_changes()

    # ----------------------------------------------------------------------------------------------------- the prompt

    def _prompt(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return ids ``[B, P']``, mask and image inputs of the branch, as its method and its kind want them."""
        layout, adapter = self._main.layout, self._bus.adapter
        valid = layout.valid[:, : layout.prompt_length]
        rows = [row[seen] for row, seen in zip(self._main.ids, valid, strict=True)]
        frame = Frame(phase=Phase.PREFILL, step=0, start=0, stop=0, **self._names)
        for item in self._bus.subscriptions(Point.TEXT_INPUT):
            if self._bus.serves(item, frame):
                new = self._bus.call(item, TextInput(**frame.event(self._main), ids=list(rows)))
                rows = rows if new is None else [ids.to(rows[0]) for ids in new]
        images: dict[str, Any] = {}
        if self._plan.branch.images:
            images = self._pictures(inputs, frame)
        else:
            rows = [adapter.without_images(self._bus.model, row, self._bus.attachment.processor) for row in rows]
        width = max(len(row) for row in rows)
        marks = {*adapter.image_tokens(self._bus.model.config)}
        filler = next(token for token in range(len(marks) + 1) if token not in marks)  # masked, and no picture
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=filler) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(width, device=ids.device) >= width - lengths[:, None]
        return ids, mask.long(), images

    def _pictures(self, inputs: Mapping[str, Any], frame: Frame) -> dict[str, Any]:
        """Return the image inputs, edited, one copy for each of a sample's rows."""
        edited = edit_images(self._bus, self._main, inputs, frame)
        spans_of_rows = self._main.layout.images
        wanted = [index for spans in spans_of_rows for index in dict.fromkeys(span.image for span in spans)]
        return self._bus.adapter.chosen_images(edited, wanted, self._main.layout)


def edit_images(
    bus: HookBus, request: Request, inputs: Mapping[str, Any], frame: Frame | None = None
) -> dict[str, Any]:
    """Let the methods edit the images of a stream before they are encoded; returns its inputs.

    Parameters
    ----------
    inputs
        The request's model inputs.
    frame
        The pass of a branch the images are for; that of the main stream by default.
    """
    frame = frame or Frame(phase=Phase.PREFILL, step=0, start=0, stop=0)
    items = [item for item in bus.subscriptions(Point.IMAGE_INPUT) if bus.serves(item, frame)]
    if not items:
        return dict(inputs)
    images = bus.adapter.images(inputs, request.layout)
    rows: dict[int, int] = {}
    for row, spans in enumerate(request.layout.images):
        for span in spans:
            rows.setdefault(span.image, row)
    owners = [rows[index] for index in range(len(images))]
    for item in items:
        new = bus.call(item, ImageInput(**frame.event(request), images=images, rows=owners))
        if new is not None:
            count_images(request, item.key, images, new)
            images = list(new)
    return bus.adapter.with_images(inputs, images, request.layout)
