"""The loop of a diagnostic run: batches through the stack with the observer in it, token rows onto the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mitigate.core.stack import Stack
from mitigate.core.state import MethodState
from mitigate.diagnostics.base import Context, Diagnostic, SampleRows, TokenRow
from mitigate.diagnostics.labels import pieces
from mitigate.diagnostics.records import Writer
from mitigate.errors import DataError
from mitigate.runner.batches import Batch, generate_arguments
from mitigate.runner.module import SEED_STRIDE, cut_at_end

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.adapters import LoadedModel
    from mitigate.compose import ResolvedRun
    from mitigate.core.handle import Handle
    from mitigate.core.state import Trace

OBSERVER = "observer"


def stack_of(resolved: ResolvedRun, diagnostic: Diagnostic, loaded: LoadedModel) -> Stack:
    """Return the run's stack with the observer as its last method."""
    return Stack({**resolved.methods, _key(resolved.methods): diagnostic.observer(loaded.facts)})


def _key(methods: Mapping[str, Any]) -> str:
    key = OBSERVER
    while key in methods:
        key += "_"
    return key


class Generator:
    """Answers batches under the stack and measures every generated token.

    Parameters
    ----------
    resolved
        Model, stack, benchmark and decoding.
    diagnostic
        What to measure.
    loaded
        The model, on its device.
    """

    def __init__(self, resolved: ResolvedRun, diagnostic: Diagnostic, loaded: LoadedModel) -> None:
        self.resolved, self.loaded = resolved, loaded
        self.diagnostic = diagnostic.bind(resolved.benchmark)
        self.stack = stack_of(resolved, self.diagnostic, loaded)
        self.key = _key(resolved.methods)
        self.seed = int(resolved.config["seed"])
        self.arguments = generate_arguments(resolved.config["decoding"])
        ends = loaded.model.generation_config.eos_token_id
        self.ends = frozenset() if ends is None else frozenset(ends if isinstance(ends, list | tuple) else [ends])

    def run(
        self, batches: Sequence[Batch], done: Collection[str], writer: Writer, advance: Callable[[int], None]
    ) -> None:
        """Answer every batch in which a record is missing; repeated batches are the very same ones."""
        compares = self.diagnostic.compares and bool(self.resolved.methods)
        with ExitStack() as outer:
            # one stack at a time can be attached: with a second pass, each batch attaches both in turn
            shared = None if compares else outer.enter_context(self._attached(self.stack))
            for batch in batches:
                missing = {sample.id for sample in batch.missing(done)}
                if missing:
                    rows = self._batch(batch, shared)
                    writer.extend(row for row in rows if row.id in missing)
                    advance(len(missing))

    def _attached(self, stack: Stack) -> Any:
        return stack.attach(self.loaded.model, self.loaded.processor)

    def _batch(self, batch: Batch, shared: Handle | None) -> list[SampleRows]:
        pictures = [self.resolved.benchmark.images(sample) for sample in batch.samples]
        inputs = self.loaded.inputs([sample.prompt for sample in batch.samples], pictures)
        plain = None if shared is not None else self._plain_state(inputs, batch)
        with _given(shared) if shared is not None else self._attached(self.stack) as handle:
            # a batch draws the same whatever ran before it, as in a run of the benchmark
            torch.manual_seed(self.seed * SEED_STRIDE + batch.index)
            started = time.perf_counter()
            sequences = self._generate(handle, inputs, batch, batch.max_new_tokens, self.arguments)
            seconds = (time.perf_counter() - started) / len(batch.samples)
            state, traces, telemetry = self._state(handle), handle.trace(), handle.telemetry()
        generated = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            self._sample(batch, row, tokens, pictures[row], state, plain, traces, telemetry[row], seconds)
            for row, tokens in enumerate(generated)
        ]

    def _plain_state(self, inputs: Mapping[str, Any], batch: Batch) -> MethodState:
        """Run the prompts without the stack, as far as the first token."""
        alone = Stack({self.key: self.diagnostic.observer(self.loaded.facts)})
        with self._attached(alone) as handle:
            self._generate(handle, inputs, batch, 1, {"do_sample": False, "num_beams": 1})
            return self._state(handle)

    def _generate(
        self, handle: Handle, inputs: Mapping[str, Any], batch: Batch, limit: int, arguments: Mapping[str, Any]
    ) -> Any:
        ids = [sample.id for sample in batch.samples]
        output = handle.generate(
            **inputs, **arguments, seed=self.seed, sample_ids=ids, max_new_tokens=limit, trace=self.diagnostic.traces
        )
        return output if isinstance(output, torch.Tensor) else output.sequences

    def _state(self, handle: Handle) -> MethodState:
        request = handle.bus.last_request if handle.bus is not None else None
        if request is None:
            raise DataError("the model answered without a request; this is a bug of the diagnostic run")
        return request.state(self.key)

    def _sample(
        self,
        batch: Batch,
        row: int,
        generated: list[int],
        pictures: Sequence[Image],
        state: MethodState,
        plain: MethodState | None,
        traces: Sequence[Trace],
        telemetry: dict[str, dict[str, float]],
        seconds: float,
    ) -> SampleRows:
        """Label and measure one sample of a batch."""
        sample, benchmark = batch.samples[row], self.resolved.benchmark
        tokens, finished = cut_at_end(generated, self.ends)
        found = pieces(benchmark, sample, tokens, self.loaded.processor)
        measured = self.diagnostic.measure(state, row)
        measured = measured or [{} for _ in tokens]
        if len(measured) < len(tokens):
            raise DataError(
                f"{self.diagnostic.name} measured {len(measured)} of the {len(tokens)} tokens of {sample.id}"
            )
        context = Context(sample, pictures, found, benchmark.boxes(sample), traces, row, plain)
        return SampleRows(
            id=sample.id,
            image_id=sample.image_id,
            task=sample.task,
            prompt=sample.prompt,
            text=str(self.loaded.processor.decode(tokens, skip_special_tokens=True)).strip(),
            finished=finished,
            meta=dict(sample.meta),
            telemetry={key: value for key, value in telemetry.items() if key != self.key},
            seconds=seconds,
            measures=self.diagnostic.measure_sample(state, row, context),
            rows=tuple(
                TokenRow(
                    sample=sample.id,
                    image_id=sample.image_id,
                    task=sample.task,
                    step=place,
                    token=token,
                    text=piece.text,
                    label=piece.label,
                    first=piece.first,
                    position=place,
                    length=len(tokens),
                    measures=values,
                )
                for place, (token, piece, values) in enumerate(zip(tokens, found, measured, strict=False))
            ),
        )


@contextmanager
def _given(handle: Handle) -> Iterator[Handle]:
    yield handle
