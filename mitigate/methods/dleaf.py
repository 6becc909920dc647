"""D-LEAF: in layers whose attention on the picture is diffuse, pull the heads that look away towards the best head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    AttentionScores,
    Event,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Point,
    Role,
    Rows,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.errors import ConfigError
from mitigate.lazy import torch
from mitigate.ops import entropy as ops
from mitigate.ops.entropy import key_mass
from mitigate.ops.heads import LOW, REFERENCES, low_heads, mix_heads, reference_shares, weighted_row
from mitigate.ops.random import hashed_uniform
from mitigate.ops.sweep import Sweep, generated_rows, picture_groups, text_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.points import PositionSet

_OPTIONS = {
    "rows": ("last", "all_generated", "all_text"),
    "prefill": ("edited", "none"),
    "diagnosis_weights": ("post_softmax", "pre_softmax"),
    "pool_heads": ops.POOLS,
    "entropy_scale": ("nats", "normalised"),
    "threshold": ops.THRESHOLDS,
    "bas_scope": ("forward", "sample"),
    "first_layer": ("initialise", "eligible"),
    "state_update": ("pre", "post"),
    "abnormal_heads": LOW,
    "reference": REFERENCES,
    "reference_scope": ("layer", "earlier"),
    "mix_scope": ("row", "image_slice"),
    "mix_stage": ("post", "pre"),
    "multi_image": ("union", "per_image"),
    "exclude_image_sinks": ("none", "outliers"),
    "gate": ("threshold", "always", "random"),
    "heads": ("abnormal", "all"),
}


@dataclass(frozen=True, kw_only=True)
class DLEAF(Method):
    """Dynamic Layer-wise Entropy and Attention Fusion, reconstructed: the paper's equations were not available.

    Each forward goes up through the layers. A layer whose attention on the picture is more spread out (Layer Image
    Attention Entropy) than a threshold learned from the layers below it is flagged; in a flagged layer the heads with
    little attention on the picture (Image Attention Focus) are mixed with the head that has most of it:
    ``A[h] <- (1 - gamma) A[h] + gamma A[best]``, for the row that predicts the next token.

    Paper: arXiv 2509.07864. Known from its abstract, figure captions and public reviews: the two stages, that high
    entropy is bad, a threshold called Best Attention Score, interpolation towards the best head with ``gamma``.
    Formulas, values and every default below are this project's reading; each open question is a parameter.

    Parameters
    ----------
    gamma
        Share of the best head in a mixed head, 0 to 1.
    layers
        Decoder layers, in order; ``all``, ``9-14``, ``0.25-0.5``.
    rows, prefill
        Query rows: ``last`` (each row when it predicts the next token), ``all_generated`` (only rows of generated
        tokens: the first token is not corrected), ``all_text`` (text after the first picture, prompt included). The
        prompt's rows among them are ``edited``, or with ``none`` left alone.
    diagnosis_weights
        What judges the heads: ``post_softmax`` attention mass, or ``pre_softmax`` absolute scores summed over the
        picture. Entropy is always taken of attention weights.
    renormalise_image
        Whether the weights on the picture are made to sum to 1 before the entropy.
    pool_heads
        From heads to one entropy per layer: ``mass_mean``, ``renorm_mean``, ``max`` or ``mean_of_entropies``.
    entropy_scale
        ``nats``, or ``normalised`` by the largest possible value; the unit of `delta` and `fixed_threshold`.
    threshold
        What a layer's entropy must exceed: ``bas_min`` (the lowest so far), ``running_mean``, ``mean_plus_kstd``,
        ``ema`` or ``fixed``.
    delta, k_std, ema_decay, fixed_threshold
        Margin on every threshold; standard deviations of ``mean_plus_kstd``; weight of the past in ``ema``; value of
        ``fixed``.
    bas_scope
        ``forward``: each token starts afresh; ``sample``: it goes on from the token before (not with beams).
    first_layer
        ``initialise``: the first layer is never flagged; ``eligible``: it is, or compared with the ``fixed`` value.
    state_update
        Entropy the threshold learns from: ``pre`` or ``post`` correction.
    abnormal_heads
        ``below_mean`` focus, ``bottom_k`` heads, ``ratio_of_best`` (below a share of the best), ``below_median``.
    bottom_k, best_ratio
        Heads of ``bottom_k``; share of ``ratio_of_best``.
    reference, top_k
        What they are mixed with: ``argmax_iaf`` (best head), ``topk_mean`` (mean of the ``top_k`` best),
        ``iaf_weighted`` (mean of all by focus).
    reference_scope
        ``layer``, or ``earlier``: the reference with most focus in this layer and those below it.
    mix_scope, mix_stage
        ``row``, or ``image_slice``: the picture's keys only, then the row's sum is restored. ``post`` softmax, or
        ``pre`` (scores are mixed).
    multi_image
        ``union`` of all pictures, or ``per_image``: the mean of each picture's own entropy.
    exclude_image_sinks, sink_std
        ``outliers`` leaves patches out of entropy and focus that draw ``sink_std`` standard deviations above the mean.
    gate, gate_rate
        Which layers are corrected: ``threshold``; for ablations ``always``, or at ``random`` with this probability.
    heads
        Which heads of a flagged layer are mixed: ``abnormal``, or for ablations ``all`` but the best.

    Examples
    --------
    >>> DLEAF(threshold="running_mean").gamma
    0.8
    """

    name: ClassVar[str] = "dleaf"
    summary: ClassVar[str] = "in layers of diffuse image attention, mixes heads that look away with the best head"
    fidelity: ClassVar[Fidelity] = Fidelity.RECONSTRUCTED
    paper: ClassVar[Paper | None] = Paper(
        title="Tracing and Mitigating Hallucinations in Multimodal LLMs via Dynamic Attention Localization",
        arxiv="2509.07864",
        where="abstract and public reviews; the equations were not available",
    )
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.ATTENTION_SCORES, Point.SAMPLE_BEGIN}),
        writes=frozenset({Point.ATTENTION_PROBS, Point.ATTENTION_SCORES}),
        stochastic=True,
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "reconstructed": {},
        "selective": {"threshold": "running_mean"},
    }

    gamma: float = 0.8
    layers: str = "all"
    rows: str = "last"
    prefill: str = "edited"
    diagnosis_weights: str = "post_softmax"
    renormalise_image: bool = True
    pool_heads: str = "mass_mean"
    entropy_scale: str = "nats"
    threshold: str = "bas_min"
    delta: float = 0.0
    k_std: float = 1.0
    ema_decay: float = 0.9
    fixed_threshold: float | None = None
    bas_scope: str = "forward"
    first_layer: str = "initialise"
    state_update: str = "pre"
    abnormal_heads: str = "below_mean"
    bottom_k: int = 8
    best_ratio: float = 0.5
    reference: str = "argmax_iaf"
    top_k: int = 3
    reference_scope: str = "layer"
    mix_scope: str = "row"
    mix_stage: str = "post"
    multi_image: str = "union"
    exclude_image_sinks: str = "none"
    sink_std: float = 3.0
    gate: str = "threshold"
    gate_rate: float = 0.5
    heads: str = "abnormal"

    def __post_init__(self) -> None:
        for parameter, options in _OPTIONS.items():
            self.require_option(parameter, options)
        self.require_finite("gamma", "delta", "k_std", "ema_decay", "best_ratio", "sink_std", "gate_rate")
        for parameter in ("gamma", "ema_decay", "best_ratio", "gate_rate"):
            self.require(0.0 <= getattr(self, parameter) <= 1.0, parameter, "be between 0 and 1")
        for parameter in ("bottom_k", "top_k"):
            self.require(getattr(self, parameter) >= 1, parameter, "be at least 1")
        self.require(self.sink_std >= 0.0, "sink_std", "be at least 0")
        if self.threshold == "fixed":
            self.require(self.fixed_threshold is not None, "fixed_threshold", "be a number with threshold=fixed")
        if self.fixed_threshold is not None:
            self.require_finite("fixed_threshold")
        if not self.renormalise_image:
            self.require(self.pool_heads != "renorm_mean", "pool_heads", "be another one with renormalise_image=false")

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Act on attention of the configured layers; on scores too where heads are judged or mixed before softmax."""
        layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
        edited = Point.ATTENTION_SCORES if self.mix_stage == "pre" else Point.ATTENTION_PROBS
        rows = self._rows()
        found = []
        if self.gate == "random":
            found.append(Subscription(point=Point.SAMPLE_BEGIN, where="draws one seed per sample"))
        if self.diagnosis_weights == "pre_softmax" and edited is Point.ATTENTION_PROBS:
            read = "scores of the picture's patches"
            found.append(Subscription(point=Point.ATTENTION_SCORES, layers=layers, rows=rows, where=read))
        write = f"{self.heads} heads of layers flagged by {self.gate}"
        keys = frozenset({Role.IMAGE}) if self.mix_scope == "image_slice" else None
        found.append(Subscription(point=edited, access=Access.WRITE, layers=layers, rows=rows, where=write, roles=keys))
        return found

    def _rows(self) -> Rows | PositionSet:
        if self.rows == "all_text":
            return text_rows if self.prefill == "edited" else generated_rows
        return Rows.PREDICTORS if (self.rows, self.prefill) == ("last", "edited") else generated_rows

    def _level(self) -> ops.Threshold:
        fixed, first_eligible = self.fixed_threshold or 0.0, self.first_layer == "eligible"
        values = {"delta": self.delta, "k_std": self.k_std, "ema_decay": self.ema_decay, "fixed": fixed}
        return ops.Threshold(policy=self.threshold, first_eligible=first_eligible, **values)

    def on_sample_begin(self, event: Event, state: MethodState) -> None:
        """Draw one seed per sample."""
        seeds = [torch.randint(2**62, (), generator=generator) for generator in event.request.generators]
        state.seed = torch.stack(seeds).to(event.layout.roles.device)

    def on_attention_scores(self, event: AttentionScores, state: MethodState) -> Tensor | None:
        """Keep the layer's scores for judging its heads; correct them if mixing comes before softmax."""
        sweep = self._sweep(event, event.scores, state, opens=True)
        sweep.scores = event.scores
        return self._correct(event, event.scores, sweep, state) if self.mix_stage == "pre" else None

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """A[h] <- (1 - gamma) A[h] + gamma A[best] for the heads that look away, in a flagged layer."""
        sweep = self._sweep(event, event.probs, state, opens=self.diagnosis_weights == "post_softmax")
        return self._correct(event, event.probs, sweep, state)

    def _sweep(
        self, event: AttentionScores | AttentionProbs, matrix: Tensor, state: MethodState, *, opens: bool
    ) -> Sweep:
        """Return the memory of this forward; a fresh one in the first layer, at the point that is called first."""
        rows = event.rows.to(matrix.device)
        if opens and event.layer == self._ends(event)[0]:
            groups = state.once("groups", event.layout.images, lambda: picture_groups(event.layout))
            groups = torch.nn.functional.pad(groups, (0, matrix.shape[-1] - groups.shape[1]), value=-1)
            state.sweep = Sweep(rows, groups.to(rows.device), self._start(event, matrix[:, 0, :, 0], state))
        sweep: Sweep = state.sweep
        sweep.follow(rows)
        return sweep

    def _ends(self, event: Event) -> tuple[int, int]:
        layers = parse_layers(self.layers, event.request.facts.layers, name=f"methods.{self.name}.layers")
        return layers[0], layers[-1]

    def _start(self, event: AttentionScores | AttentionProbs, like: Tensor, state: MethodState) -> Tensor:
        """Memory of the threshold before the first layer; a generated token goes on from its predecessor if asked."""
        seen = self._level().start(like)
        if self.bas_scope == "sample":
            if event.layout.rows != event.request.samples:
                raise ConfigError(
                    f"methods.{self.name}.bas_scope='sample' cannot follow beams or several sequences per prompt;"
                    f" use bas_scope=forward"
                )
            state.history = state.get("history", {})
            for index, row in enumerate(event.rows.tolist()):
                if row >= event.layout.prompt_length and row - 1 in state.history:
                    seen[:, :, index] = state.history[row - 1].to(seen.device)
        return seen

    def _finish(self, event: AttentionScores | AttentionProbs, sweep: Sweep, state: MethodState) -> None:
        """Count at the end of the forward; with a threshold per sample, remember what each row has seen."""
        for name, total in sweep.close().items():
            state.count(name, total)
        if self.bas_scope == "sample":
            asked = event.row_mask.to(sweep.seen.device)
            seen = torch.where(asked, sweep.seen, self._level().start(sweep.seen[0]))
            state.history.update((row, seen[:, :, index]) for index, row in enumerate(sweep.rows.tolist()))

    def _correct(
        self, event: AttentionScores | AttentionProbs, matrix: Tensor, sweep: Sweep, state: MethodState
    ) -> Tensor | None:
        """Diagnose a layer and correct it; ``matrix`` holds what is mixed, weights or scores ``[B, H, R, K]``."""
        early, level = self.mix_stage == "pre", self._level()
        weights = matrix.softmax(-1) if early else matrix
        patches = kept = sweep.patches(event.unseen)
        if self.exclude_image_sinks == "outliers":
            kept = patches & ~ops.outlying_keys(weights, patches, self.sink_std)
        entropy, focus = self._entropy(weights, kept, sweep), self._focus(weights, kept, sweep)
        # a row that sees no picture, in this layer, is neither diagnosed nor changed
        diagnosed = patches.any(-1) & event.row_mask.to(matrix.device)
        threshold = level.level(sweep.seen)
        flagged = self._gated(event, level.flagged(sweep.seen, entropy), sweep, state) & diagnosed
        low = self._low(focus) & flagged[:, None]
        corrected = mix_heads(
            matrix,
            self._reference(event.layer, matrix, focus, sweep),
            low,
            self.gamma,
            keys=patches if self.mix_scope == "image_slice" else None,
            scores=early,
        )
        after = corrected.softmax(-1) if early else corrected
        learned = entropy if self.state_update == "pre" else self._entropy(after, kept, sweep)
        sweep.seen = torch.where(diagnosed, level.update(sweep.seen, learned), sweep.seen).detach()
        mass, mass_after = key_mass(weights, patches), key_mass(after, patches)
        sweep.add(
            layers_diagnosed=diagnosed,
            layers_flagged=flagged,
            heads_mixed=low.sum(1),
            image_mass_before=mass.mean(1) * diagnosed,
            image_mass_after=mass_after.mean(1) * diagnosed,
        )
        if state.tracing and sweep.best is not None:
            told = {"entropy": entropy, "threshold": threshold, "flagged": flagged, "low_heads": low, "focus": focus}
            told |= {"reference_layer": sweep.best[2][0], "reference": sweep.best[2][1]}
            told |= {"image_mass": mass, "image_mass_after": mass_after}
            state.trace(event, **{name: value[..., -1] for name, value in told.items()})
        if event.layer == self._ends(event)[1]:
            self._finish(event, sweep, state)
        return corrected if self.gamma else None

    def _entropy(self, weights: Tensor, kept: Tensor, sweep: Sweep) -> Tensor:
        """LIAE: how spread out the layer's attention on the picture is, ``[B, R]``."""
        return ops.image_entropy(
            weights.detach(),
            kept,
            groups=sweep.groups if self.multi_image == "per_image" else None,
            pool=self.pool_heads,
            renormalise=self.renormalise_image,
            normalise=self.entropy_scale == "normalised",
        )

    def _focus(self, weights: Tensor, kept: Tensor, sweep: Sweep) -> Tensor:
        """IAF: how much of each head goes to the picture, ``[B, H, R]``."""
        judged = sweep.scores.abs() if sweep.scores is not None and self.diagnosis_weights == "pre_softmax" else weights
        return key_mass(judged, kept)

    def _gated(
        self, event: AttentionScores | AttentionProbs, above: Tensor, sweep: Sweep, state: MethodState
    ) -> Tensor:
        """Which layers are corrected: those above the threshold, or an ablation's choice, ``[B, R]``."""
        if self.gate == "threshold":
            return above
        if self.gate == "always":
            return torch.ones_like(above)
        # columns are counted from the sample's own start, so that padding does not change its draws
        start = event.layout.valid.int().argmax(1).to(above.device)[:, None]
        return hashed_uniform(state.seed.to(above.device)[:, None], event.layer, sweep.rows - start) < self.gate_rate

    def _low(self, focus: Tensor) -> Tensor:
        """Heads to be mixed, ``[B, H, R]``; never the layer's best one, and none with a gamma of 0."""
        if self.gamma == 0.0:
            return torch.zeros_like(focus, dtype=torch.bool)
        low = torch.ones_like(focus, dtype=torch.bool)
        if self.heads == "abnormal":
            low = low_heads(focus, self.abnormal_heads, count=self.bottom_k, ratio=self.best_ratio)
        return low.scatter(1, focus.argmax(1, keepdim=True), False)

    def _reference(self, layer: int, matrix: Tensor, focus: Tensor, sweep: Sweep) -> Tensor:
        """Row ``[B, 1, R, K]`` that heads are mixed with."""
        shares, head = reference_shares(focus, self.reference, count=self.top_k), focus.argmax(1)
        row = weighted_row(matrix, shares, scores=self.mix_stage == "pre")
        origin = torch.stack([torch.full_like(head, layer), head])
        return sweep.keep_best(row, (shares * focus).sum(1), origin, earlier=self.reference_scope == "earlier")

    def ablations(self, telemetry: Mapping[str, float]) -> dict[str, Method]:
        """Return the variants that take the two stages apart; the random gate fires as often as the threshold did."""
        variants: dict[str, Method] = {
            "gate always": dataclasses.replace(self, gate="always"),
            "all heads": dataclasses.replace(self, heads="all"),
        }
        diagnosed = telemetry.get("layers_diagnosed", 0.0)
        if diagnosed:
            rate = telemetry.get("layers_flagged", 0.0) / diagnosed
            variants["random gate"] = dataclasses.replace(self, gate="random", gate_rate=rate)
        return variants

    @classmethod
    def identity(cls) -> Self:
        """No mixing; layers are still diagnosed and counted."""
        return cls(gamma=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return sets that reach every stage, gate and memory."""
        return [
            {"threshold": "running_mean", "first_layer": "eligible", "bas_scope": "sample", "state_update": "post"}
            | {"exclude_image_sinks": "outliers", "sink_std": 1.0},
            {"threshold": "mean_plus_kstd", "k_std": 0.2, "rows": "all_text", "pool_heads": "mean_of_entropies"}
            | {"renormalise_image": False, "entropy_scale": "normalised", "delta": 0.01},
            {"diagnosis_weights": "pre_softmax", "abnormal_heads": "bottom_k", "bottom_k": 2, "gamma": 0.6}
            | {"threshold": "fixed", "fixed_threshold": 3.0, "mix_scope": "image_slice"},
            {"mix_stage": "pre", "reference": "topk_mean", "top_k": 2, "reference_scope": "earlier", "prefill": "none"}
            | {"threshold": "ema", "ema_decay": 0.5, "abnormal_heads": "ratio_of_best", "best_ratio": 0.9},
            {"gate": "random", "gate_rate": 0.8, "heads": "all", "reference": "iaf_weighted", "layers": "0.25-0.75"}
            | {"multi_image": "per_image"},
        ]
