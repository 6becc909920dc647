"""One request: a batch of prompts on its way through the model, with everything methods may remember or ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mitigate.core.frame import Frame
from mitigate.core.layout import TokenLayout
from mitigate.core.lineage import Lineage
from mitigate.core.points import Access, Phase
from mitigate.core.replay import Replay, replay
from mitigate.core.state import MethodState, Trace
from mitigate.errors import HookError

if TYPE_CHECKING:
    from mitigate.core.bus import HookBus
    from mitigate.core.streams import Streams
    from mitigate.core.vocabulary import Vocabulary


class Request:
    """A running generation of B samples.

    Attributes
    ----------
    layout
        `TokenLayout` of the request rows, current up to the running forward.
    sample_ids
        One id per sample; random draws depend on it and the seed only, never on the place in the batch.
    finished
        ``[B]`` rows that have produced an end token.
    facts
        Geometry of the model.
    generating
        Whether ``generate`` drives the request; otherwise single forwards of the user do.
    traces
        What the methods reported, if tracing was asked for.
    """

    def __init__(
        self,
        bus: HookBus,
        layout: TokenLayout,
        ids: Tensor,
        *,
        seed: int = 0,
        sample_ids: Sequence[str] | None = None,
        end_tokens: Iterable[int] = (),
        pad_token: int | None = None,
        generating: bool = False,
        inputs: Mapping[str, Any] | None = None,
        trace: bool = False,
    ) -> None:
        self.bus = bus
        self.layout = layout
        self.ids = ids
        self.seed = seed
        self.sample_ids = [str(index) for index in range(layout.rows)] if sample_ids is None else list(sample_ids)
        self.samples = layout.rows
        self.facts = bus.adapter.facts(bus.model)
        self.end_tokens = torch.tensor(sorted(set(end_tokens)), device=ids.device, dtype=ids.dtype)
        # given only where a row may end unseen: being fed padding then tells that it has
        fed_when_finished = sorted({*end_tokens, *([] if pad_token is None else [pad_token])})
        self._closing = torch.tensor(fed_when_finished, device=ids.device, dtype=ids.dtype)
        self.finished = torch.zeros(layout.rows, dtype=torch.bool, device=ids.device)
        self.generating = generating
        self.began = False
        self.cache: Any = None
        self.traces: list[Trace] | None = [] if trace else None
        self.states = {key: MethodState(key, layout.rows, traces=self.traces) for key in bus.methods}
        self.totals = MethodState("bus", layout.rows)
        self.frame: Frame | None = None
        self.graph_logits: Tensor | None = None
        self.streams: Streams | None = None
        self.lineage = Lineage(self.samples, self.reorder)
        #: Layer -> keys and values of the prompt where the cache keeps the latest ones only, for `replay`.
        self.prompt_keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions: Tensor | None = None
        self._generators: list[torch.Generator] | None = None
        self._inputs: Mapping[str, Any] | None = dict(inputs or {})
        self._original: Mapping[str, Any] | None = self._inputs

    def adopt(self, main: Request) -> None:
        """Become a branch of another request: the methods' memory, their reports and random draws are its."""
        self.states, self.traces = main.states, main.traces
        self.generating, self.began = main.generating, True
        self._generators = main.generators

    @property
    def vocabulary(self) -> Vocabulary:
        """Classes of tokens, from the processor the stack was attached with.

        Raises
        ------
        ConfigError
            If it was attached without one.
        """
        return self.bus.attachment.vocabulary(self.ids.device)

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return a value that requests share while the stack stays attached; least recently used ones are dropped."""
        return self.bus.attachment.shared(key, compute)

    def tokenize(self, text: str) -> Tensor:
        """Return the tokens of a text ``[n]``, without special tokens.

        Raises
        ------
        ConfigError
            If the stack was attached without the processor.
        """
        return torch.tensor(self.bus.attachment.tokens(text), device=self.ids.device, dtype=self.ids.dtype)

    def branch_logits(self, key: str, name: str) -> Tensor:
        """Return the logits of a method's branch at this step, ``[B, V]``; see `Prediction.branch_logits`."""
        if self.streams is None:
            raise HookError(f"{key} asks for branch {name!r}, but no method of the stack declares branches")
        return self.streams.logits(key, name)

    def image_key(self, image: int) -> str:
        """Return a hash of an image's pixels as the model gets them (`ImageSpan.image` counts the images).

        Raises
        ------
        HookError
            After ``sample_begin``: pixels are not kept any longer than needed.
        """
        if self._inputs is None:
            raise HookError("image_key is known at sample_begin only; keep it on the state")
        pixels = self.bus.adapter.image_pixels(self._inputs, image, self.layout).detach().cpu().contiguous()
        raw = pixels.view(torch.uint8).numpy().tobytes()  # as bytes: numpy knows no bfloat16
        return hashlib.sha256(f"{pixels.dtype}{tuple(pixels.shape)}".encode() + raw).hexdigest()

    def forget_inputs(self) -> None:
        """Let go of the pixels."""
        self._inputs = self._original = None

    def replace_images(self, inputs: Mapping[str, Any]) -> None:
        """Note that methods edited the images of the main stream; branches start from the original ones."""
        self._inputs = inputs

    def open_streams(self) -> None:
        """Prepare the branches; they run when they are asked for."""
        from mitigate.core.streams import Streams

        self.streams = Streams(self.bus, self, self._original or {})

    @property
    def generators(self) -> list[torch.Generator]:
        """One CPU random generator per request row, seeded from the request's seed and the row's sample id."""
        if self._generators is None:
            self._generators = []
            for row in range(self.layout.rows):
                sample, copy = divmod(row, self.layout.rows // self.samples)
                text = f"{self.seed}:{self.sample_ids[sample]}:{copy}".encode()
                seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
                self._generators.append(torch.Generator().manual_seed(seed))
        return self._generators

    @property
    def has_drawn(self) -> bool:
        """Whether a method has asked for the random generators."""
        return self._generators is not None

    def uniform(self, where: Tensor) -> Tensor:
        """Draw one number in [0, 1) for the rows of a mask; other rows' generators stay where they are.

        Parameters
        ----------
        where
            ``[B]`` bool.

        Returns
        -------
        Tensor
            ``[B]`` float64 on the CPU, zeros where nothing was drawn.
        """
        draws = torch.zeros(self.layout.rows, dtype=torch.float64)
        for row in where.nonzero().flatten().tolist():
            draws[row] = torch.rand((), dtype=torch.float64, generator=self.generators[row])
        return draws

    def state(self, key: str) -> MethodState:
        """Return the memory of a method of the stack."""
        return self.states[key]

    def note_positions(self, positions: Tensor | None, start: int) -> None:
        """Keep the position ids ``[..., B, n]`` of prompt columns ``start ...`` as the model got them."""
        if positions is None:  # a forward made by hand: the model finds them itself, and so does the adapter
            if start or self._positions is not None:
                return
            ids, mask = self.ids, self.layout.valid[:, : self.layout.prompt_length].long()
            positions = self.bus.adapter.prompt_inputs(self.bus.model, ids, mask, self._inputs or {})["position_ids"]
        known = self._positions
        if known is None or not start:
            self._positions = positions
        elif known.shape[-1] == start and known.shape[:-1] == positions.shape[:-1]:
            self._positions = torch.cat([known, positions], -1)

    def positions(self, length: int) -> Tensor:
        """Return the position ids ``[..., B, length]`` of the prompt's first columns.

        Raises
        ------
        HookError
            Before the first forward.
        """
        if self._positions is None:
            raise HookError("positions are known from the first forward on")
        return continued(self._positions, length)

    def expand(self, rows: int) -> None:
        """Follow the model's repetition of rows (beams, several sequences per prompt) after the images were encoded."""
        factor, rest = divmod(rows, self.layout.rows)
        if rest or factor < 1:
            raise HookError(f"the model was called with {rows} rows for a request of {self.layout.rows} samples")
        if factor > 1:
            self.layout = self.layout.repeated(factor)
            self.ids = self.ids.repeat_interleave(factor, 0)
            self.finished = self.finished.repeat_interleave(factor, 0)
            self.totals.repeat(factor)
            for state in self.states.values():
                state.repeat(factor)

    def reorder(self, rows: Tensor) -> None:
        """Follow beam search: every row goes on from another one's past, ``[B]``."""
        for state in self.states.values():
            state.per_row.take(rows)
        if self.streams is not None:
            self.streams.reorder(rows)

    def advance(self, start: int, stop: int, last_ids: Tensor | None) -> Frame:
        """Note the next forward over columns ``start..stop-1`` and return its frame."""
        prompt = self.layout.prompt_length
        self.layout = self.layout.grown(max(stop, prompt))
        phase = Phase.PREFILL if stop <= prompt else Phase.DECODE
        if phase is Phase.DECODE and last_ids is not None and len(self._closing):
            self.finished = self.finished | torch.isin(last_ids, self._closing)
        self.frame = Frame(phase=phase, step=max(stop - prompt, 0), start=start, stop=stop)
        return self.frame

    def diagnose(self, state: MethodState, *, last_layer: int | None = None, where: Tensor | None = None) -> None:
        """Run an extra, unedited forward over the whole prompt and call this method's ``diagnostic`` subscriptions.

        The pass has no cache, leaves the main one alone, and ends after the last layer that is read.

        Parameters
        ----------
        state
            The asking method's state.
        last_layer
            The deepest decoder layer needed; ``None`` runs them all.
        where
            ``[B]`` the samples the pass is for, which pay for it in the counters; all by default.
        """
        self.bus.diagnose(self, state, last_layer, where)

    def replay(self, state: MethodState, *, rows: int) -> Replay:
        """Run the last prompt rows before the predicting one again, unedited and with a graph; see `Replay`.

        Parameters
        ----------
        state
            The asking method's state; it needs subscriptions with ``access="gradient"``.
        rows
            How many rows, at most; fewer if the prompt has fewer.
        """
        return replay(self.bus, self, state, rows)

    def attention_gradients(self, asked: Mapping[int, Access], cotangent: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """See `Step.attention_gradients`; ``asked`` holds the layers and how they are differentiated."""
        frame = self.frame
        exact = sorted(layer for layer, access in asked.items() if access is Access.GRADIENT)
        near = sorted(layer for layer, access in asked.items() if access is Access.DIRECT)
        if frame is None or not asked or (exact and self.graph_logits is None):
            raise HookError("no gradients in this step: subscribe to attention_probs with access='gradient'")
        found = self._exact(frame, exact, cotangent) if exact else {}
        if near and self.bus.direct is not None:
            rows = {layer: frame.direct[layer] for layer in near}
            gradients = self.bus.direct.gradients(rows, cotangent)
            found |= {layer: (rows[layer][0], gradients[layer]) for layer in near}
        return found

    def _exact(self, frame: Frame, layers: Sequence[int], cotangent: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        if self.graph_logits is None:
            raise HookError("the step's graph is gone")
        rows = [frame.tape[layer] for layer in layers]
        with torch.enable_grad():
            scalar = (cotangent.to(self.graph_logits) * self.graph_logits).sum()
        gradients = torch.autograd.grad(scalar, rows, retain_graph=True)
        return {
            layer: (row.detach()[:, :, -1], gradient[:, :, -1])
            for layer, row, gradient in zip(layers, rows, gradients, strict=True)
        }

    def release(self) -> None:
        """Let go of what only a running request needs: caches, graphs, pictures. What methods counted stays."""
        self.lineage.release()
        self.cache = self.graph_logits = self.streams = None
        self.prompt_keys.clear()
        self.forget_inputs()

    def telemetry(self) -> list[dict[str, dict[str, float]]]:
        """Return per sample: method key -> counter -> value, plus the bus's own totals under ``bus``."""
        copies = self.layout.rows // self.samples
        result: list[dict[str, dict[str, float]]] = []
        for sample in range(self.samples):
            rows = range(sample * copies, (sample + 1) * copies)
            entry = {state.key: state.summed(rows) for state in (*self.states.values(), self.totals)}
            result.append(entry)
        return result


def continued(positions: Tensor, length: int) -> Tensor:
    """Cut position ids ``[..., B, n]`` to ``length`` columns, or go on as ``generate`` does: one up from the last."""
    missing = length - positions.shape[-1]
    if missing <= 0:
        return positions[..., :length]
    further = torch.arange(1, missing + 1, device=positions.device, dtype=positions.dtype)
    return torch.cat([positions, positions[..., -1:] + further], -1)
