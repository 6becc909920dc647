"""How much a token's evidence lies on the text before it (gradient saliency), and whether that tells hallucinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Point,
    Rows,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.core.layout import Role
from mitigate.diagnostics.base import Diagnostic, Findings, Measures, SampleRows, TokenRow
from mitigate.lazy import torch
from mitigate.ops.saliency import cotangent, normalised, saliency_row

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from mitigate.benchmarks.base import Sample
    from mitigate.compose import ResolvedRun
    from mitigate.core import TokenChosen
    from mitigate.runner.single import ModelCache

#: Groups of key columns, in the order of the records.
GROUPS = {"system": Role.SYSTEM, "image": Role.IMAGE, "prompt": Role.PROMPT, "output": Role.GENERATED}


@dataclass(frozen=True, kw_only=True)
class SaliencyObserver(Method):
    """Measures, per step, the saliency row of the token that was chosen (arXiv 2601.20279, Eq. 2-6).

    Parameters
    ----------
    layers
        Layers the score is averaged over.
    everywhere
        Whether all layers are differentiated, for the flow by layer; otherwise the score's layers only.
    candidates
        Most probable tokens that are scored besides, both exactly and along the direct path; 0 for none.
    """

    name: ClassVar[str] = "observer"
    summary: ClassVar[str] = "reads attention and saliency of the row that predicted each token"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS, Point.TOKEN_CHOSEN}), gradient=True)

    layers: tuple[int, ...] = (0,)
    everywhere: bool = True
    candidates: int = 5

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Differentiate the predicting row, exactly and along the direct path."""
        exact = tuple(range(model.layers)) if self.everywhere else self.layers
        wanted = [(Access.GRADIENT, exact), (Access.DIRECT, self.layers if self.candidates else ())]
        reads = [
            Subscription(
                point=Point.ATTENTION_PROBS, access=access, layers=layers, rows=Rows.LAST, where="predicting row"
            )
            for access, layers in wanted
            if layers
        ]
        return [*reads, Subscription(point=Point.TOKEN_CHOSEN, where="saliency of the chosen token")]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Only the gradients are needed; they are asked for when the token is chosen."""

    def on_token_chosen(self, event: TokenChosen, state: MethodState) -> None:
        """Keep what is known of every row's step."""
        asked = dict.fromkeys(range(event.request.facts.layers) if self.everywhere else self.layers, Access.GRADIENT)
        roles = event.layout.roles.to(event.logits.device)
        keys = torch.arange(event.layout.length, device=roles.device)
        text = (keys >= event.layout.after_image.to(roles.device)[:, None]) & (roles != Role.PAD)
        masks = torch.stack([roles == role for role in GROUPS.values()], 1)
        found = self._parts(event, asked, event.tokens)
        logp = event.logits.log_softmax(-1)
        kept = {
            "score": {layer: _mean(row, text) for layer, (row, _) in found.items()},
            "attention": {layer: _mean(row, text) for layer, (_, row) in found.items()},
            "image": {layer: _mean(row, masks[:, 1]) for layer, (row, _) in found.items()},
            "diagonal": {layer: row[:, -1] for layer, (row, _) in found.items()},
            "saliency_groups": {layer: (row[:, None] * masks).sum(-1) for layer, (row, _) in found.items()},
            "attention_groups": {layer: (row[:, None] * masks).sum(-1) for layer, (_, row) in found.items()},
        }
        step: dict[str, Any] = {
            name: torch.stack([values[layer] for layer in sorted(values)], 1).cpu() for name, values in kept.items()
        }
        step["p"] = logp.gather(1, event.tokens[:, None])[:, 0].exp().cpu()
        step["entropy"] = -(logp.exp() * logp.clamp_min(-1e9)).sum(-1).cpu()
        step["columns"] = text.sum(-1).cpu()
        step["places"] = [sorted(found).index(layer) for layer in self.layers]
        if self.candidates:
            step |= self._compared(event, text)
        state.steps = [*state.get("steps", [])[: event.step], step]

    def _parts(self, event: TokenChosen, asked: dict[int, Access], token: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Return per layer the normalised saliency row and the head-mean attention row, ``[B, K]`` each."""
        direction = cotangent(event.logits, token)
        parts = event.request.attention_gradients(asked, direction)
        device = event.logits.device
        return {
            layer: (normalised(saliency_row(a, g), "row_l2").to(device).float(), a.to(device).float().mean(1))
            for layer, (a, g) in parts.items()
        }

    def _compared(self, event: TokenChosen, text: Tensor) -> dict[str, Tensor]:
        """Score the chosen token and the most probable candidates exactly and along the direct path, ``[B, 1 + k]``."""
        top = event.logits.topk(min(self.candidates, event.logits.shape[-1]), -1).indices
        found: dict[str, list[Tensor]] = {"exact": [], "direct": []}
        for token in (event.tokens, *top.unbind(1)):
            for name, access in (("exact", Access.GRADIENT), ("direct", Access.DIRECT)):
                parts = self._parts(event, dict.fromkeys(self.layers, access), token)
                found[name].append(torch.stack([_mean(row, text) for row, _ in parts.values()]).mean(0))
        return {name: torch.stack(values, 1).cpu() for name, values in found.items()}


def _mean(row: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``[B, K]`` over a mask; 0 where it is empty."""
    mean: Tensor = (row * mask).sum(-1) / mask.sum(-1).clamp_min(1)
    return mean


@dataclass(frozen=True, kw_only=True)
class Saliency(Diagnostic):
    """Gradient saliency of every generated token on the text before it.

    Parameters
    ----------
    layers
        Layers the score is averaged over: numbers or shares of the depth. The default is layers 6-8 of 32.
    everywhere
        Whether to differentiate all layers, for the flow by layer and group; false is cheaper.
    candidates
        Most probable tokens per step that are scored exactly and along the direct path, to compare the two; 0: none.
    bins
        Bins of the saliency on 0..1.
    examples
        Words of each kind (grounded, hallucinated) whose full maps are drawn.
    sample
        Id of a sample whose map is drawn instead, with ``token``.
    token
        Place of the token in the sample's reply, from 0.
    maps
        ``paper`` (Eq. 4-5) or ``legacy_demo`` (the demo scripts' mixture, for comparing pictures only).
    interventions
        Also run the benchmark with attention to earlier text scaled at every step; multiplies the cost.
    gains
        Factors of the interventions.
    gain_window
        How many of the latest text tokens the factor applies to; 0: all.
    gain_above
        Apply the factor only to generated tokens whose own saliency was above this when they were chosen; 0: to all
        text. The paper names 0.45 for its models.
    """

    name: ClassVar[str] = "saliency"
    summary: ClassVar[str] = "gradient saliency of each token on the text before it; maps, risk by bin, interventions"
    analysis: ClassVar[frozenset[str]] = Diagnostic.analysis | {
        "bins",
        "examples",
        "sample",
        "token",
        "maps",
        "interventions",
        "gains",
        "gain_window",
        "gain_above",
    }

    layers: str = "0.1875-0.25"
    everywhere: bool = True
    candidates: int = 5
    bins: int = 10
    examples: int = 3
    sample: str = ""
    token: int = -1
    maps: str = "paper"
    interventions: bool = False
    gains: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2, 1.2, 1.5)
    gain_window: int = 0
    gain_above: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in ("candidates", "examples", "gain_window", "gain_above"):
            self.require(getattr(self, parameter) >= 0, parameter, "not be negative")
        self.require(self.candidates != 1, "candidates", "be 0 or at least 2: one candidate has no rank")
        self.require(self.bins >= 1, "bins", "be at least 1")
        self.require(self.maps in ("paper", "legacy_demo"), "maps", "be paper or legacy_demo")
        self.require(all(gain >= 0 for gain in self.gains), "gains", "not be negative")
        self.require((self.token >= 0) == bool(self.sample), "token", "be given together with diagnostic.sample")

    def choose(self, samples: Sequence[Sample]) -> list[Sample]:
        """Refuse a sample to draw that is not among those generated, before anything is."""
        chosen = super().choose(samples)
        known = not self.sample or any(sample.id == self.sample for sample in chosen)
        self.require(known, "sample", "be the id of a sample of this run, such as " + chosen[0].id)
        return chosen

    def check_model(self, facts: ModelFacts) -> None:
        """Refuse layers the model does not have."""
        parse_layers(self.layers, facts.layers, name="diagnostic.layers")

    def observer(self, facts: ModelFacts) -> Method:
        """Watch the predicting row."""
        layers = parse_layers(self.layers, facts.layers, name="diagnostic.layers")
        return SaliencyObserver(layers=layers, everywhere=self.everywhere, candidates=self.candidates)

    def measure(self, state: MethodState, row: int) -> list[Measures]:
        """Return scores, group sums, probability and entropy of every step."""
        found = []
        for step in state.steps:
            measures: Measures = {
                name: value[row].tolist() for name, value in step.items() if isinstance(value, torch.Tensor)
            }
            for name in ("score", "attention", "image", "diagonal"):
                layers = measures.pop(name)
                measures[name] = sum(layers[place] for place in step["places"]) / len(step["places"])
                measures[f"{name}_layers"] = layers
            found.append(measures)
        return found

    def analyse(self, rows: Sequence[TokenRow]) -> Findings:
        """See `mitigate.diagnostics.saliency_analysis`."""
        from mitigate.diagnostics.saliency_analysis import analyse

        return analyse(rows, bins=self.bins, resamples=self.resamples)

    def follow_up(
        self,
        resolved: ResolvedRun,
        samples: Sequence[SampleRows],
        folder: Path,
        *,
        console: Console,
        models: ModelCache,
    ) -> tuple[Findings, list[Path]]:
        """Draw maps of example tokens, and run the interventions if asked for."""
        from mitigate.diagnostics.saliency_interventions import intervene
        from mitigate.diagnostics.saliency_maps import draw_examples

        figures, notes = draw_examples(self, resolved, samples, folder, models=models)
        found = intervene(self, resolved, folder, console=console, models=models) if self.interventions else Findings()
        return Findings(tables=found.tables, data=found.data, notes=[*notes, *found.notes]), figures

    def draw(self, findings: Findings, folder: Path) -> list[Path]:
        """See `mitigate.diagnostics.saliency_figures`."""
        from mitigate.diagnostics.saliency_figures import draw

        return draw(findings, folder)
