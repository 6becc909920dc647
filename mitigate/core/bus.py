"""The hook bus: calls the methods of a stack, in stack order, at the points they subscribed to."""

from __future__ import annotations

import dataclasses
import inspect
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mitigate.core import attention
from mitigate.core.attachment import Attachment
from mitigate.core.attention_points import AttentionPoints
from mitigate.core.direct import DirectPath
from mitigate.core.events import Event, NextTokenLogits
from mitigate.core.frame import Frame
from mitigate.core.layer_points import LayerPoints, same_shape
from mitigate.core.method import Method
from mitigate.core.plan import BoundSubscription, bind, plan_streams
from mitigate.core.points import ATTENTION_POINTS, PICTURE_POINTS, Access, Phase, Point
from mitigate.core.request import Request
from mitigate.core.state import MethodState
from mitigate.core.streams import edit_images
from mitigate.errors import HookError, LayoutError, MitigateError, StackConflict, UnsupportedModel, described

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.base import Adapter


class _Enough(Exception):
    """Ends a diagnostic forward after the last layer that is read."""


def _restore_attention(config: Any, name: str | None) -> None:
    """Give the configuration its attention back, unless the caller has meanwhile chosen another one."""
    if config._attn_implementation_internal == attention.ATTENTION_NAME:
        config._attn_implementation_internal = name


def _enough(module: nn.Module, args: Any, output: Any) -> None:
    raise _Enough


class HookBus:
    """Serves one stack on one model, between `install` and the close of the exit stack it was given.

    Parameters
    ----------
    model
        The whole vision-language model.
    adapter
        Knows the model's parts and derives token layouts.
    methods
        Key -> method, in stack order.
    processor
        The model's processor, for methods that need to know words.

    Attributes
    ----------
    direct
        The model's direct path, if a method differentiates along it.
    streams
        The extra streams the stack needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Adapter,
        methods: Mapping[str, Method],
        processor: ProcessorMixin | None = None,
    ) -> None:
        self.model = model
        self.attachment = Attachment(model, adapter, processor)
        self.adapter = adapter
        self.entry = adapter.entry(model)
        self.methods = dict(methods)
        self.facts = adapter.facts(model)
        self.bound = bind(self.methods, self.facts)
        self.streams = plan_streams(self.methods, self.facts)
        self.request: Request | None = None
        self.last_request: Request | None = None
        self._layers = list(adapter.decoder_layers(model))
        asked = [item.subscription for item in self.bound if item.subscription.access is Access.DIRECT]
        direct = {layer for subscription in asked for layer in subscription.layers}
        self.direct = DirectPath(model, adapter, direct) if asked else None
        self._points: AttentionPoints | None = None
        self._forward_names = list(inspect.signature(type(self.entry).forward).parameters)[1:]
        self._diagnosing = False
        self._model_error: Exception | None = None
        self._prefill_inputs: dict[str, Any] = {}

    def subscriptions(self, point: Point, layer: int | None = None) -> list[BoundSubscription]:
        """Return the subscriptions of a point (and layer), in stack order."""
        return [
            item
            for item in self.bound
            if item.subscription.point is point and (layer is None or layer in item.subscription.layers)
        ]

    @property
    def needs_loop(self) -> bool:
        """Whether a method chooses tokens or watches the choice, which transformers' own loops do not let it."""
        return bool(self.subscriptions(Point.SELECT_TOKEN) or self.subscriptions(Point.TOKEN_CHOSEN))

    @property
    def last_logits_only(self) -> dict[str, int]:
        """Argument of a forward that needs no logits but the last, for the families that know it."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self._forward_names else {}

    @property
    def gradient_layers(self) -> tuple[int, ...]:
        """Layers whose attention rows need a graph, ascending."""
        wanted = {
            layer
            for item in self.bound
            if item.subscription.access is Access.GRADIENT
            for layer in item.subscription.layers
        }
        return tuple(sorted(wanted))

    # ---------------------------------------------------------------------------------------------------- installing

    def install(self, undo: ExitStack) -> None:
        """Put hooks where the stack needs them; every change pushes its own undo."""
        undo.callback(self.entry.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        undo.callback(self.entry.register_forward_hook(self._after_forward).remove)
        LayerPoints(self).install(undo)
        if self.direct is not None:
            self.direct.install(undo)
        if any(item.subscription.point in ATTENTION_POINTS for item in self.bound):
            self._install_attention(undo)

    def _install_attention(self, undo: ExitStack) -> None:
        attention.register()
        config = self.adapter.decoder_config(self.model)
        layers = self.facts.attention_layers
        served = range(len(self._layers)) if layers is None else layers
        modules = {index: self.adapter.attention(self._layers[index]) for index in served}
        strangers = [module for module in modules.values() if getattr(module, "config", None) is not config]
        if strangers:
            raise UnsupportedModel(f"{type(strangers[0]).__name__} does not share the decoder's configuration")
        name = config._attn_implementation_internal
        if name == attention.ATTENTION_NAME:
            raise StackConflict("another model that shares this configuration object carries a stack; copy the config")
        if name not in ("sdpa", "eager", None):
            warnings.warn(f"attention {name!r} is replaced by 'sdpa' while the stack is attached", stacklevel=5)
        self._points = AttentionPoints(self, modules, eager=name == "eager")
        # the setter would walk into sub-configurations; only the text decoder's own entry is ours to change
        undo.callback(_restore_attention, config, name)
        config._attn_implementation_internal = attention.ATTENTION_NAME
        for module in modules.values():
            undo.callback(attention.SERVED_BY.pop, module, None)
            attention.SERVED_BY[module] = self._points

    # ------------------------------------------------------------------------------------------------------ requests

    def begin(self, request: Request) -> None:
        """Start serving a request.

        Raises
        ------
        StackConflict
            If another ``generate`` of the same model is running.
        """
        if self.request is not None and self.request.generating:
            raise StackConflict("generate was called while another generate of the same model runs under this stack")
        self.request = self.last_request = request

    def end(self) -> None:
        """Stop serving the request; the next forward starts a new one."""
        if self.request is not None and self.request.began:
            self._lifecycle(Point.SAMPLE_END)
        self.drop()

    def drop(self) -> None:
        """Forget the request without telling the methods."""
        if self.request is not None:
            self.request.release()
        self.request = None

    def _lifecycle(self, point: Point) -> None:
        request = self.running()
        frame = request.frame
        for item in self.subscriptions(point):
            if frame is not None and self.serves(item, frame):
                self.call(item, Event(**frame.event(request)))

    def running(self) -> Request:
        """Return the request being served."""
        if self.request is None:
            raise HookError("the model ran outside a request; this is a bug of the hook bus")
        return self.request

    def call(self, item: BoundSubscription, event: Event) -> Any:
        """Call a handler, count its time, and name the culprit if it fails."""
        state = event.request.state(item.key)
        started = time.perf_counter()
        try:
            value = item.handler(event, state)
        except (MitigateError, _Enough):
            raise
        except Exception as error:
            if error is self._model_error:  # raised by the model in a pass the method asked for
                raise
            layer = getattr(event, "layer", None)
            where = f"{f'layer {layer}, ' if layer is not None else ''}phase {event.phase}, step {event.step}"
            source = getattr(getattr(item.handler, "__code__", None), "co_filename", "")
            reason = described(error, source)
            raise HookError(f"{item.key}.on_{item.subscription.point.value} failed at {where}: {reason}") from error
        finally:
            state.spend(time.perf_counter() - started)
        if value is not None and item.subscription.access is not Access.WRITE:
            raise HookError(f"{item.key} returned a value at {item.subscription.point} but subscribed to read only")
        return value

    def returned(self, item: BoundSubscription, event: Event, value: Tensor) -> Tensor | None:
        """Call a handler that may return a tensor like the one it sees."""
        new = self.call(item, event)
        return None if new is None else same_shape(item, event, value, new)

    # ------------------------------------------------------------------------------------------------------ forwards

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._diagnosing:  # its frame is already set
            return None
        inputs = {**dict(zip(self._forward_names, args, strict=False)), **kwargs}
        self._refuse_inputs(inputs)
        cache = inputs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        ids = self._ids_of(inputs, past)
        known = self.request
        request = self._continued(ids, cache, past, inputs)
        edited = None
        if request is not known and self.subscriptions(Point.IMAGE_INPUT):  # a forward made by hand: its own images
            inputs = edit_images(self, request, inputs)
            request.replace_images(inputs)
            edited = ((), inputs)
        if ids.shape[0] != request.layout.rows:
            request.expand(ids.shape[0])
        request.lineage.follow(ids, past, cache)
        frame = request.advance(past, past + ids.shape[1], ids[:, -1])
        if past < request.layout.prompt_length:
            request.note_positions(inputs.get("position_ids"), past)
        frame.gradient = torch.is_grad_enabled() and bool(self.gradient_layers)
        if not request.began:
            request.began = True
            if self.streams:
                request.open_streams()
            self._prefill_inputs = inputs
            try:
                self._lifecycle(Point.SAMPLE_BEGIN)
            finally:
                self._prefill_inputs = {}
                request.forget_inputs()
        if request.streams is not None:
            request.streams.follow(ids, past)
        self._lifecycle(Point.STEP_BEGIN)
        return edited

    def _ids_of(self, inputs: Mapping[str, Any], past: int) -> Tensor:
        """Return the token ids of a forward; a delegated ``generate`` gives embeddings in place of the prompt's."""
        ids, embeds, request = inputs.get("input_ids"), inputs.get("inputs_embeds"), self.request
        if ids is not None:
            return cast(Tensor, ids)
        if self.entry is self.model or request is None or not request.generating or embeds is None:
            raise LayoutError(
                "inputs_embeds without input_ids: token roles cannot be known; pass input_ids to generate"
            )
        copies = embeds.shape[0] // request.ids.shape[0]
        return request.ids[:, past : past + embeds.shape[1]].repeat_interleave(copies, 0)

    def _refuse_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse forwards in which methods would silently not act, or the caller not get what is asked for."""
        name = self.adapter.decoder_config(self.model)._attn_implementation_internal
        if self._points is not None and name != attention.ATTENTION_NAME:
            raise StackConflict(
                f"the attention implementation was set to {name!r} while a stack was attached; set it before attaching"
            )
        if self._points is not None and inputs.get("output_attentions"):
            raise StackConflict("output_attentions cannot be collected while a stack acts on attention; leave it out")
        if inputs.get("return_dict") is False:
            raise StackConflict("return_dict=False is not served while a stack is attached; leave it out")

    def _continued(self, ids: Tensor, cache: Any, past: int, inputs: Mapping[str, Any]) -> Request:
        """Return the request a forward belongs to; a fresh prompt outside ``generate`` opens one."""
        request = self.request
        if request is not None and request.generating:
            if request.began and cache is not request.cache:
                raise StackConflict(
                    "the model was called in the middle of its own generate (by a logits processor, or another thread);"
                    " that cannot be combined with methods"
                )
        elif past == 0:
            self.end()
            request = self.new_request(ids, inputs.get("attention_mask"), inputs)
            self.begin(request)
        elif request is None or past != request.layout.length:
            raise LayoutError(
                "a cached forward that does not continue a prompt run under this stack; run the prompt first"
            )
        request.cache = cache
        return request

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._diagnosing:
            return None
        request = self.running()
        frame = cast(Frame, request.frame)
        active = ~request.finished
        predictors = max(frame.stop - max(frame.start, request.layout.prompt_length - 1), 0)
        for state in request.states.values():
            state.count_changes()
        if predictors:
            request.totals.count("forwards", 1.0, active)
            request.totals.count("attention_rows", float(predictors * len(self._layers)), active)
            for item in self.subscriptions(Point.NEXT_TOKEN_LOGITS):
                if self.serves(item, frame):
                    self._edit_logits(item, request, frame, output)
            request.graph_logits = output.logits[:, -1] if frame.gradient else None
            if frame.phase is Phase.PREFILL:
                self._lifecycle(Point.PREFILL_END)
        self._lifecycle(Point.STEP_END)
        return output

    def _edit_logits(self, item: BoundSubscription, request: Request, frame: Frame, output: Any) -> None:
        last, active = output.logits[:, -1], ~request.finished
        event = NextTokenLogits(**frame.event(request), asker=item.key, logits=last)
        edited = self.returned(item, event, last)
        if edited is not None:
            edited = torch.where(active[:, None].to(last.device), edited, last)
            request.state(item.key).count("steps_edited", (edited != last).any(1))
            output.logits = torch.cat([output.logits[:, :-1], edited[:, None]], 1)

    def new_request(self, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any], **options: Any) -> Request:
        """Derive the layout of a batch of prompts and make the request that carries it."""
        layout = self.adapter.layout(self.model, ids, mask, inputs, self.attachment.processor)
        encodes = any(self.subscriptions(point) for point in PICTURE_POINTS)
        self.adapter.check_pictures(inputs, layout, encodes=encodes)
        layout = dataclasses.replace(layout, question=self.attachment.question(ids, layout))
        return Request(self, layout, ids, inputs=inputs, **options)

    def diagnose(self, request: Request, state: MethodState, last_layer: int | None, where: Tensor | None) -> None:
        """See `Request.diagnose`."""
        inputs = self.adapter.whole_prompt(self._prefill_inputs, request)
        frame = Frame(phase=Phase.DIAGNOSTIC, step=0, start=0, stop=request.layout.prompt_length, owner=state.key)
        stop = nullcontext() if last_layer is None else self._layers[last_layer].register_forward_hook(_enough)
        with stop, suppress(_Enough), torch.no_grad():
            self.extra_forward(request, frame, inputs)
        state.count("extra_forwards", 1.0, where)

    def extra_forward(self, request: Request, frame: Frame, inputs: Mapping[str, Any]) -> Any:
        """Run the model once more, as the frame says, in the running request or in a branch of it."""
        with self.passing(request, frame):
            return self.entry(**inputs)

    @contextmanager
    def passing(self, request: Request, frame: Frame) -> Iterator[None]:
        """Serve what runs of the model meanwhile as an extra pass of the request, or of a branch of it."""
        outer, request.frame, self._diagnosing = request.frame, frame, True
        running, self.request = self.request, request
        try:
            yield
        except _Enough:
            raise
        except Exception as error:
            self._model_error = error  # so that the method is not blamed for it
            raise
        finally:
            self._diagnosing, request.frame, self.request = False, outer, running

    @staticmethod
    def serves(item: BoundSubscription, frame: Frame) -> bool:
        """Whether a subscription is called in this forward."""
        subscription = item.subscription
        return (
            frame.phase in subscription.phases
            and frame.branch in subscription.branches
            and frame.owner in (None, item.key)
        )
