"""Whether deep layers fall back to where early layers looked, and whether hallucinated tokens do so more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from mitigate.core import AttentionProbs, Fidelity, Method, MethodState, ModelFacts, Point, Subscription, Tags
from mitigate.diagnostics.base import Context, Diagnostic, Findings, Measures, SampleRows, TokenRow
from mitigate.diagnostics.labels import Label
from mitigate.diagnostics.observe import note, noted, per_step, predicting_rows, seen_patches
from mitigate.diagnostics.places import coverage, whole_raster
from mitigate.lazy import torch
from mitigate.ops.depth import Windows, layer_windows
from mitigate.ops.similarity import bhattacharyya, hellinger, jensen_shannon, pooled, restricted

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.benchmarks.base import Benchmark

SIMILARITIES = {"bhattacharyya": bhattacharyya, "jensen_shannon": jensen_shannon, "hellinger": hellinger}
_NAMES = tuple(f"{name}_{side}" for name in SIMILARITIES for side in ("noise", "anchors"))


@dataclass(frozen=True, kw_only=True)
class DriftObserver(Method):
    """Compares each layer's attention over the picture with the mean of the early and of the middle layers.

    Parameters
    ----------
    early, middle
        Layers.
    keep_maps
        Whether to keep every layer's attention map, for measures against places in the picture.
    """

    name: ClassVar[str] = "observer"
    summary: ClassVar[str] = "compares attention maps across layers"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS}))

    early: tuple[int, ...] = (0,)
    middle: tuple[int, ...] = (1,)
    keep_maps: bool = False

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Watch the predicting row in every layer."""
        return [predicting_rows(model)]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Collect the layer's map; after the last layer, compare all of them."""
        prompt = event.layout.prompt_length
        weights = event.probs[:, :, -1, :prompt].detach()
        keys = seen_patches(event, state)[:, None]
        maps, mass = restricted(weights, keys)
        maps = torch.where(keys.any(-1, keepdim=True), maps, torch.nan)  # no picture in sight, nothing to compare
        if event.layer == 0:
            state.maps = []
        state.maps.append(pooled(maps, torch.ones_like(mass)))
        if event.layer == event.request.facts.layers - 1:
            self._compare(event, state, torch.stack(state.maps, 1))

    def _compare(self, event: AttentionProbs, state: MethodState, maps: Tensor) -> None:
        """Keep the similarities of maps ``[B, L, P]``; all of them under the last layer's event, ``[B, L]``."""
        # as in the method: layers without the picture in sight do not count; without any, nothing is known
        noise, anchors = (maps[:, list(window)].nanmean(1, keepdim=True) for window in (self.early, self.middle))
        for name, similarity in SIMILARITIES.items():
            note(
                state, event, **{f"{name}_noise": similarity(maps, noise), f"{name}_anchors": similarity(maps, anchors)}
            )
        note(state, event, contrast=(anchors - noise).relu().sum((1, 2)))
        if self.keep_maps:
            note(state, event, maps=maps.half())
            state.spans = event.layout.images


@dataclass(frozen=True, kw_only=True)
class Drift(Diagnostic):
    """Similarity of each layer's visual attention to early noise and to middle anchors, over depth.

    Parameters
    ----------
    early, middle, deep
        Layer windows: ``auto`` (the first 8 %, 40 to 65 % and the last 30 % of the layers) or layers as ``9-14``,
        ``0.25-0.5``; they follow one another without overlap.
    similarity
        Which similarity the test and the table use: ``bhattacharyya``, ``jensen_shannon`` or ``hellinger`` (the last
        two are distances and count negatively). All three are recorded and drawn.
    objects
        Whether attention is held against the objects' places where the benchmark knows them.
    top
        Share of the image tokens that count as a map's strongest.
    """

    name: ClassVar[str] = "drift"
    summary: ClassVar[str] = "similarity of each layer's visual attention to early and to middle layers, over depth"
    analysis: ClassVar[frozenset[str]] = Diagnostic.analysis | {"similarity"}

    early: str = "auto"
    middle: str = "auto"
    deep: str = "auto"
    similarity: str = "bhattacharyya"
    objects: bool = True
    top: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.similarity in SIMILARITIES, "similarity", f"be one of {', '.join(SIMILARITIES)}")
        self.require(0.0 < self.top <= 1.0, "top", "be above 0 and at most 1")

    def windows(self, depth: int) -> Windows:
        """Return the layer windows on a decoder of this depth."""
        return layer_windows(depth, self.early, self.middle, self.deep, owner="diagnostic")

    def check_model(self, facts: ModelFacts) -> None:
        """Refuse windows the decoder does not have."""
        self.windows(facts.layers)

    def bind(self, benchmark: Benchmark) -> Self:
        """Keep no maps where the benchmark knows no places."""
        known = self.objects and benchmark.boxes(benchmark.samples()[0]) is not None
        return dataclasses.replace(self, objects=known)

    def observer(self, facts: ModelFacts) -> Method:
        """Watch every layer."""
        windows = self.windows(facts.layers)
        return DriftObserver(early=windows.early, middle=windows.mid, keep_maps=self.objects)

    def measure(self, state: MethodState, row: int) -> list[Measures]:
        """Return each similarity to noise and to anchors per layer, and how far middle maps are from early ones."""
        steps: list[dict[str, Any]] = per_step(state, row, *_NAMES, "contrast")
        # all layers were kept together, under the last one
        return [{name: value[0] for name, value in step.items()} for step in steps]

    def measure_sample(self, state: MethodState, row: int, context: Context) -> Measures:
        """Hold the maps of grounded object words against the objects' places."""
        if not self.objects or context.boxes is None:
            return {}
        span = whole_raster(state.spans[row], context.pictures)
        if span is None:
            return {}
        maps = noted(state, "maps")[:, row, 0].float().numpy()[:, :, span.positions.cpu().numpy()]
        mentions = []
        for place, piece in enumerate(context.pieces):
            boxes = context.boxes.get(piece.mention, ()) if piece.first and piece.label is Label.GROUNDED else ()
            if boxes and not np.isnan(maps[place]).any():
                measured = self._on_object(maps[place].astype(np.float64), coverage(boxes, span.grid or (1, 1)))
                mentions.append({"position": place, "word": piece.mention, **measured})
        return {"objects": mentions}

    def _on_object(self, maps: Any, covered: Any) -> Measures:
        """Measure maps ``[layers, patches]`` against the share of each patch that the object covers."""
        windows = self.windows(len(maps))
        inside = covered >= 0.5
        noise, middle = (maps[list(window)].mean(0) for window in (windows.early, windows.mid))
        return {
            "area": float(covered.mean()),
            "inside": float(inside.mean()),
            "mass": (maps @ covered).tolist(),
            "hit": [float(inside[_strongest(row, self.top)].mean()) for row in maps],
            "pointing": [float(inside[row.argmax()]) for row in maps],
            "anchor_hit": float(inside[_strongest(np.clip(middle - noise, 0.0, None), self.top)].mean()),
        }

    def analyse(self, rows: Sequence[TokenRow]) -> Findings:
        """See `mitigate.diagnostics.drift_analysis`."""
        from mitigate.diagnostics.drift_analysis import analyse

        none = Windows((), (), ())
        windows = self.windows(len(rows[0].measures["bhattacharyya_noise"])) if rows else none
        return analyse(rows, windows, self.similarity, resamples=self.resamples)

    def study(self, samples: Sequence[SampleRows]) -> Findings:
        """Add what is known about the objects' places."""
        from mitigate.diagnostics.drift_analysis import with_objects

        findings = self.analyse([row for sample in samples for row in sample.rows])
        return with_objects(findings, samples, resamples=self.resamples)

    def draw(self, findings: Findings, folder: Path) -> list[Path]:
        """See `mitigate.diagnostics.drift_figures`."""
        from mitigate.diagnostics.drift_figures import draw

        return draw(findings, folder)


def _strongest(values: Any, share: float) -> Any:
    """Return the indices of the largest values; among equals the first."""
    return np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]
