"""Whether samples whose question looks at the picture in a narrow way hallucinate more, and what a stack does to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    HiddenStates,
    Method,
    MethodState,
    ModelFacts,
    Phase,
    Point,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.core.layout import Role, TokenLayout
from mitigate.diagnostics.base import Context, Diagnostic, Findings, Measures, SampleRows, TokenRow
from mitigate.diagnostics.observe import patches
from mitigate.diagnostics.places import whole_raster
from mitigate.lazy import torch
from mitigate.ops.entropy import restricted_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.benchmarks.base import Benchmark

_PREFILL = frozenset({Phase.PREFILL})


def asking_rows(layout: TokenLayout) -> Tensor:
    """Return the prompt's text after the picture, ``[B, L]``: the rows that ask."""
    columns = torch.arange(layout.length, device=layout.roles.device)
    asks: Tensor = (layout.roles == Role.PROMPT) & (columns >= layout.after_image[:, None])
    return asks


@dataclass(frozen=True, kw_only=True)
class CreditObserver(Method):
    """Reads, in the prefill, where the question looks in the picture and how large the picture's hidden states are.

    Parameters
    ----------
    layers
        Layers whose attention is averaged.
    """

    name: ClassVar[str] = "observer"
    summary: ClassVar[str] = "reads where the question looks, and the norms of the visual tokens"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS, Point.HIDDEN_STATES}))

    layers: tuple[int, ...] = (0,)

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Watch the question's rows in the chosen layers, and every block's output."""
        attention = Subscription(
            point=Point.ATTENTION_PROBS,
            access=Access.OBSERVE,
            layers=self.layers,
            phases=_PREFILL,
            rows=asking_rows,
            where="rows of the question",
        )
        every = tuple(range(model.layers))
        hidden = Subscription(point=Point.HIDDEN_STATES, layers=every, phases=_PREFILL, where="visual tokens")
        return [attention, hidden]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Sum the attention to every prompt column over layers, heads and rows, ``[B, P]``."""
        asked = event.probs.detach() * event.row_mask[:, None, :, None]
        total = asked.sum((1, 2))
        total = torch.nn.functional.pad(total, (0, event.layout.prompt_length - total.shape[-1]))
        state.attention = state.get("attention", 0.0) + total
        state.layout = event.layout

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> None:
        """Sum the norms of the visual tokens of this forward, ``[B]`` per layer."""
        stop = event.start + event.hidden.shape[1]
        mask = patches(event.layout, state)[:, event.start : stop].to(event.hidden.device)
        norms = torch.linalg.vector_norm(event.hidden.detach().float(), dim=-1)
        sums = state.get("norms", {})
        sums[event.layer] = sums.get(event.layer, 0.0) + torch.where(mask, norms, 0.0).sum(1)
        state.norms = sums
        state.layout = event.layout


@dataclass(frozen=True, kw_only=True)
class Credit(Diagnostic):
    """Entropy of the question's attention to the picture against hallucination, sample by sample.

    Parameters
    ----------
    tasks
        Which samples of the benchmark are generated: ``caption``, ``yes_no``, ``all``, or ``auto``: captions where
        the benchmark has some, else everything.
    layers
        Layers whose attention is averaged; layers as ``9-14`` or ``0.25-0.5``.
    bins
        Bins of equal count for the binned correlation.
    top
        Share of the image tokens that are drawn as the strongest.
    pictures
        Samples that are drawn.
    """

    name: ClassVar[str] = "credit"
    summary: ClassVar[str] = "entropy of the question's attention to the picture against hallucination, norms, overlays"
    analysis: ClassVar[frozenset[str]] = Diagnostic.analysis | {"bins", "top", "pictures"}
    traces: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    tasks: str = "all"
    layers: str = "0.25-0.5"
    bins: int = 30
    top: float = 0.05
    pictures: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.bins >= 3, "bins", "be at least 3")
        self.require(0.0 < self.top <= 1.0, "top", "be above 0 and at most 1")
        self.require(self.pictures >= 0, "pictures", "not be negative")

    def _chosen(self, depth: int) -> tuple[int, ...]:
        return parse_layers(self.layers, depth, name="diagnostic.layers")

    def check_model(self, facts: ModelFacts) -> None:
        """Refuse layers the decoder does not have."""
        self._chosen(facts.layers)

    def observer(self, facts: ModelFacts) -> Method:
        """Watch the prefill."""
        return CreditObserver(layers=self._chosen(facts.layers))

    def measure(self, state: MethodState, row: int) -> list[Measures]:
        """Measure nothing per token."""
        return []

    def measure_sample(self, state: MethodState, row: int, context: Context) -> Measures:
        """Return entropy (nats), map and norms, those without the stack, and what the stack's methods chose."""
        measures = _seen(state, row)
        if context.plain is not None:
            plain = _seen(context.plain, row)
            measures |= {"plain_entropy": plain["entropy"], "plain_norms": plain["norms"]}
        layout: TokenLayout = state.layout
        span = whole_raster(layout.images[row], context.pictures)
        if span is None or measures["entropy"] is None:
            return measures
        columns = span.positions.tolist()
        weights = state.attention[row].cpu()[span.positions.cpu()].double()
        measures |= {"grid": list(span.grid or ()), "map": (weights / weights.sum().clamp_min(1e-300)).tolist()}
        for trace in context.traces:
            for name in ("sources", "neighbours"):
                if name in trace.values:
                    places = {column: place for place, column in enumerate(columns)}
                    measures[name] = [places[column] for column in trace.values[name][row] if column in places]
        return measures

    def analyse(self, rows: Sequence[TokenRow]) -> Findings:
        """Say that tokens alone are not enough: the findings are about samples."""
        return Findings(notes=["This diagnostic measures samples, not tokens."])

    def study(self, samples: Sequence[SampleRows]) -> Findings:
        """See `mitigate.diagnostics.credit_analysis`."""
        from mitigate.diagnostics.credit_analysis import analyse

        return analyse(samples, bins=self.bins, resamples=self.resamples)

    def draw(self, findings: Findings, folder: Path) -> list[Path]:
        """See `mitigate.diagnostics.credit_figures`."""
        from mitigate.diagnostics.credit_figures import draw

        return draw(findings, folder)

    def illustrate(self, samples: Sequence[SampleRows], benchmark: Benchmark, folder: Path) -> list[Path]:
        """Draw where the question looks, and what the stack's methods chose, over a few pictures."""
        from mitigate.diagnostics.credit_figures import overlays

        return overlays(samples, benchmark, folder, count=self.pictures, top=self.top)


def _seen(state: MethodState, row: int) -> dict[str, Any]:
    """Return entropy, number of image tokens and mean norm per layer of one request row."""
    layout: TokenLayout = state.layout
    keys = patches(layout, state)[row].cpu()
    count = int(keys.sum())
    if count == 0:
        return {"entropy": None, "image_tokens": 0, "norms": []}
    entropy = None
    attention = state.get("attention")
    if attention is not None and bool(attention[row][keys.to(attention.device)].any()):  # else nobody saw the picture
        entropy = float(restricted_entropy(attention[row].cpu().double(), keys))
    norms = [float(state.norms[layer][row]) / count for layer in sorted(state.norms)]
    return {"entropy": entropy, "image_tokens": count, "norms": norms}
