"""CLVA: pull deep layers' attention to image tokens that middle layers found, away from where early layers looked."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    AttentionScores,
    Event,
    Fidelity,
    HiddenStates,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Phase,
    Point,
    Role,
    Rows,
    Subscription,
    Tags,
)
from mitigate.core.points import MAIN_PHASES
from mitigate.errors import UnsupportedModel
from mitigate.lazy import torch
from mitigate.ops.anchors import Maps, Reading, anchor_maps, column_groups, mean_over_images
from mitigate.ops.depth import Windows, layer_windows
from mitigate.ops.pull import Pull
from mitigate.ops.random import hashed_uniform
from mitigate.ops.rows import own_rows
from mitigate.ops.similarity import POOLS, masked_mean, restricted

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout

    _Rows = AttentionScores | AttentionProbs

_WHERE = "image tokens"
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "mode": ("contrast", "dynamics", "product"),
    "anchor_unit": ("tokens", "heads"),
    "shared_tokens": ("keep", "suppress"),
    "pool": POOLS,
    "noise_source": ("early", "embedding", "image_mean", "random"),
    "operator": ("logit", "prob_mix", "log_ratio"),
    "scale": ("absmean", "mad", "none"),
    "mass": ("auto", "grow", "preserve"),
    "gate": ("none", "bhattacharyya"),
    "gate_input": ("raw", "edited"),
    "heads": ("all", "visual"),
    "rows": ("last", "all_text"),
    "refresh": ("step", "prefill"),
    "multi_image": ("pooled", "per_image", "per_tile"),
    "no_grid": ("apply", "refuse"),
}
_IMAGE = frozenset({Role.IMAGE})


@dataclass(frozen=True, kw_only=True)
class CLVA(Method):
    """Cross-Layer Visual Anchors, re-implemented from the abstract; status: experimental.

    Deep layers are said to fall back to the noisy places that early layers looked at. Image tokens whose attention
    rises from the early to the middle layers are anchors; in deep layers the row that predicts the next token is moved
    towards them and away from the early noise, within the same forward.

    Paper: arXiv 2603.25088 and Pattern Recognition 2026, 114380; only the abstract could be read. Every equation, layer
    range and number here is this project's reading, not the authors'.

    Parameters
    ----------
    early, mid, deep
        Layer windows E, M and D, in this order and apart. ``auto``: [0, .08 L), [.40 L, .65 L) and [.70 L, L), rounded,
        at least one layer each; ``final``: for ``deep`` the last 8 %, for ``mid`` the quarter right below ``deep``;
        or layers as ``9-14``, ``0.25-0.5``.
    mode, gamma
        Anchor score s: ``contrast`` relu(m - gamma n); ``dynamics`` the mean rise from layer to layer; ``product``.
    rho, min_anchors
        Share of the image tokens that can be anchors, and at least how many.
    anchor_unit
        ``tokens``; ``heads``: after the early window a map is the mean of the ``rho`` heads least like the noise
        (at least one), and every token with a positive score is an anchor.
    shared_tokens
        A noise token that is an anchor too: ``keep`` (no penalty) or ``suppress`` (penalty as well).
    normalise
        Whether maps are normalised over the image tokens before layers are compared.
    pool, top_heads
        How heads form one map: ``mean``, ``mass`` (weighted by attention to the image) or ``top`` (the share
        ``top_heads`` of heads with most of it).
    noise_source
        n: ``early`` attention of the same row; ``embedding`` (cosine with the row after block 0); ``image_mean``
        (early maps averaged over the sample's images); ``random`` (control, one map per sample).
    operator
        ``logit`` adds gate * scale * (alpha s - beta nu) to the scores; ``log_ratio`` adds log ratios of m and n to
        uniform, cut at +-2; ``prob_mix`` mixes s into the weights and keeps the mass on the image.
    scale
        Unit of ``logit`` per head: ``absmean`` or ``mad`` of the scores on the image, or ``none``.
    alpha, beta, mix, damp
        Strength of the anchor and of the noise term: of ``logit`` and ``log_ratio``; of ``prob_mix`` (r, b; 0 to 1).
    mass
        ``grow``, ``preserve`` (attention to the image keeps its sum) or ``auto``: preserve in ``prob_mix``, else grow.
    gate, gate_input
        ``none``, or ``bhattacharyya``: from 0 where the deep map equals m to 1 where it equals n; the deep map is the
        ``raw`` one of the layer or the one ``edited`` at full strength.
    heads
        Heads that are edited: ``all``, or ``visual`` (attention to the image at least the mean over heads).
    rows
        ``last`` (each row when it predicts a token) or ``all_text`` (also the prompt's text after the first image).
    refresh
        Anchors of every ``step``, or those of the last prompt row (``prefill``) for all generated tokens.
    multi_image
        Image tokens of a sample form one set (``pooled``), or one ``per_image`` or ``per_tile``.
    no_grid
        Models whose image tokens form no grid (Q-Former): ``apply`` with a warning, or ``refuse``.

    Examples
    --------
    >>> CLVA(alpha=1.0, gate="bhattacharyya").mode
    'contrast'
    """

    name: ClassVar[str] = "clva"
    summary: ClassVar[str] = "moves deep layers' attention to image tokens that middle layers found (from the abstract)"
    fidelity: ClassVar[Fidelity] = Fidelity.FROM_ABSTRACT
    paper: ClassVar[Paper | None] = Paper(
        title="Visual Attention Drifts, but Anchors Hold: Mitigating Hallucination in Multimodal Large Language Models "
        "via Cross-Layer Visual Anchors",
        arxiv="2603.25088",
        where="abstract",
    )
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.SAMPLE_BEGIN, Point.ATTENTION_PROBS, Point.HIDDEN_STATES}),
        writes=frozenset({Point.ATTENTION_SCORES, Point.ATTENTION_PROBS}),
        stochastic=True,
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "abstract": {},
        "anchors_only": {"beta": 0.0, "damp": 0.0},
        "suppression_only": {"alpha": 0.0, "mix": 0.0},
        "final_layers": {"mid": "final", "deep": "final"},
        "mid_layers_late_edit": {"deep": "final"},
    }

    early: str = "auto"
    mid: str = "auto"
    deep: str = "auto"
    mode: str = "contrast"
    gamma: float = 1.0
    rho: float = 0.10
    min_anchors: int = 8
    anchor_unit: str = "tokens"
    shared_tokens: str = "keep"
    normalise: bool = True
    pool: str = "mean"
    top_heads: float = 0.25
    noise_source: str = "early"
    operator: str = "logit"
    scale: str = "absmean"
    alpha: float = 0.5
    beta: float = 0.25
    mix: float = 0.2
    damp: float = 0.5
    mass: str = "auto"
    gate: str = "none"
    gate_input: str = "raw"
    heads: str = "all"
    rows: str = "last"
    refresh: str = "step"
    multi_image: str = "pooled"
    no_grid: str = "apply"

    def __post_init__(self) -> None:
        for parameter in ("gamma", "alpha", "beta"):
            self.require_finite(parameter)
            self.require(getattr(self, parameter) >= 0.0, parameter, "be at least 0")
        for parameter in ("rho", "top_heads", "mix", "damp"):
            self.require(0.0 <= getattr(self, parameter) <= 1.0, parameter, "be between 0 and 1")
        self.require(self.min_anchors >= 1, "min_anchors", "be at least 1")
        for parameter, options in _OPTIONS.items():
            self.require_option(parameter, options)
        attention = self.noise_source in ("early", "image_mean")
        self.require(self.normalise or attention, "normalise", f"be True with noise_source={self.noise_source}")
        self.require(self.operator != "prob_mix" or self.mass != "grow", "mass", "be auto or preserve with prob_mix")

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Read the lower windows and edit the deep one, in the same forward."""
        if not model.spatial_grid:
            if self.no_grid == "refuse":
                raise UnsupportedModel(f"{self.name}: {model.family} has no image grid, and no_grid=refuse")
            warnings.warn(f"{self.name}: {model.family} mixes places in its image tokens; expect little", stacklevel=2)
        layers = self.windows(model.layers)
        rows = Rows.PREDICTORS if self.rows == "last" else _text_rows
        phases = frozenset({Phase.PREFILL}) if (self.refresh, self.rows) == ("prefill", "last") else MAIN_PHASES
        between = range(layers.early[-1], layers.mid[-1]) if self.mode != "contrast" else ()
        read = tuple(sorted({*layers.early, *layers.mid, *between}))
        edited = Point.ATTENTION_PROBS if self.operator == "prob_mix" else Point.ATTENTION_SCORES
        wanted = [
            Subscription(point=Point.ATTENTION_PROBS, layers=read, rows=rows, phases=phases, where=_WHERE),
            Subscription(point=edited, access=Access.WRITE, layers=layers.deep, rows=rows, where=_WHERE, roles=_IMAGE),
        ]
        if self.noise_source == "embedding":
            wanted.append(Subscription(point=Point.HIDDEN_STATES, layers=(0,), where="similarity to image tokens"))
        if self.noise_source == "random":
            wanted.append(Subscription(point=Point.SAMPLE_BEGIN, where="draws one seed per sample"))
        return wanted

    def windows(self, depth: int) -> Windows:
        """Return the layers E, M and D of a decoder; raises `ConfigError` if they overlap or are out of order."""
        return layer_windows(depth, self.early, self.mid, self.deep, owner=f"methods.{self.name}")

    # ------------------------------------------------------------------------------------------- what lower layers see

    def on_sample_begin(self, event: Event, state: MethodState) -> None:
        """Draw one seed per sample, shared by its copies (beams)."""
        copies = event.layout.rows // event.request.samples
        firsts = event.request.generators[::copies]
        seeds = torch.stack([torch.randint(2**62, (), generator=generator) for generator in firsts])
        state.seed = seeds.repeat_interleave(copies).to(event.layout.roles.device)

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> None:
        """Keep block 0's output of the prompt and of this forward, as unit vectors."""
        hidden = event.hidden.to(torch.promote_types(event.hidden.dtype, torch.float32))
        state.current, state.start = torch.nn.functional.normalize(hidden, dim=-1), event.start
        prompt = event.layout.prompt_length
        if event.start < prompt:
            before = [state.vectors[:, : event.start]] if event.start else []
            state.vectors = torch.cat([*before, state.current], 1)[:, :prompt]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """Collect maps below, mix anchors into the weights of deep layers (``prob_mix``)."""
        if self.is_idle:
            return None
        windows = state.once("windows", event.request, lambda: self.windows(event.request.facts.layers))
        if event.layer in windows.deep:
            return self._mix(event, state)
        self._read(event, state, windows)
        return None

    @property
    def pull(self) -> Pull:
        """The edit of deep layers."""
        return Pull(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Pull)})

    @property
    def is_idle(self) -> bool:
        """Whether the parameters change nothing."""
        return not any((self.mix, self.damp) if self.operator == "prob_mix" else (self.alpha, self.beta))

    def _read(self, event: AttentionProbs, state: MethodState, windows: Windows) -> None:
        """Add one layer's map to n, d or m."""
        if event.layer == windows.early[0]:
            state.reading = self._begin(event, state, windows)
        reading: Reading | None = state.reading
        if reading is None:
            return
        reading.add(event.layer, own_rows(event, state).of(event.probs).detach())
        if event.layer == windows.mid[-1]:
            self._finish(event, state, reading)

    def _begin(self, event: AttentionProbs, state: MethodState, windows: Windows) -> Reading | None:
        """Start a forward; nothing to do where no sample has an image."""
        rows = own_rows(event, state).rows
        images, width = event.layout.images, event.layout.prompt_length
        groups = state.once("groups", images, lambda: column_groups(images, width, self.multi_image, event.probs))
        if groups is None:
            return None
        groups = groups[:, :, None, : event.probs.shape[-1]]
        return Reading(
            columns=groups & (torch.arange(groups.shape[-1], device=groups.device) <= rows[:, None]),
            dtype=event.probs.dtype,
            windows=windows,
            pool=self.pool,
            top_heads=self.top_heads,
            normalise=self.normalise,
            head_share=self.rho if self.anchor_unit == "heads" else None,
            noise_from=lambda reading: self._noise(event, state, reading, rows),
        )

    def _noise(self, event: AttentionProbs, state: MethodState, reading: Reading, rows: Tensor) -> Tensor:
        """Make n, ``[B, G, R, W]``, when the early window has passed."""
        if self.noise_source == "early":
            return reading.early
        columns, width = reading.columns, reading.columns.shape[-1]
        if self.noise_source == "image_mean":
            return mean_over_images(reading.early, columns, event.layout.images)
        if self.noise_source == "embedding":
            here = (rows - state.start).to(state.current.device)
            likeness = state.current[:, here] @ state.vectors[:, :width].transpose(1, 2)
        else:  # image tokens are counted, so that padding does not change the draw
            likeness = hashed_uniform(state.seed[:, None, None], columns.any(1).cumsum(-1))
        return restricted(likeness.relu().to(reading.early).unsqueeze(1), columns)[0]

    def maps(self, noise: Tensor, middle: Tensor, rise: Tensor, columns: Tensor) -> Maps:
        """Turn n, m and d (all ``[B, G, R, W]``) into anchors and noise scores."""
        share = self.rho if self.anchor_unit == "tokens" else None
        scoring: dict[str, Any] = {"mode": self.mode, "gamma": self.gamma, "shared": self.shared_tokens}
        return anchor_maps(noise, middle, rise, columns, share=share, least=self.min_anchors, **scoring)

    def _finish(self, event: AttentionProbs, state: MethodState, reading: Reading) -> None:
        """End of M: fix the anchors of this forward's rows."""
        maps = self.maps(reading.noise, reading.middle, reading.rise, reading.known).to(event.probs.device)
        own, last = own_rows(event, state), event.layout.prompt_length - 1
        if self.refresh == "prefill":
            here = (own.rows == last).nonzero().flatten()
            state.frozen = maps.each(lambda field: field[:, :, here]) if len(here) else state.get("frozen")
            if state.frozen is not None:
                generated = (own.rows > last)[:, None]
                maps = maps.each(lambda mine, first: torch.where(generated, first, mine), state.frozen)
        state.maps = maps
        asked = own.asked & maps.columns.any(3).any(1)
        state.count("anchors", ((maps.anchors > 0).sum((1, 3)) * asked).sum(1))
        state.count("anchor_rows", asked.sum(1))
        if state.tracing:
            pad = (0, event.probs.shape[-1] - maps.columns.shape[-1])
            score, noise = (torch.nn.functional.pad(field.sum(1)[:, -1], pad) for field in (maps.anchors, maps.penalty))
            state.trace(event, anchors=score > 0, anchor_score=score, noise_score=noise)

    # --------------------------------------------------------------------------------------------- what deep layers do

    def on_attention_scores(self, event: AttentionScores, state: MethodState) -> Tensor | None:
        """Z[q*, j] <- Z[q*, j] + g c (alpha s_j - beta nu_j), or the log ratio."""
        if (known := state.get("maps")) is None:
            return None
        own = own_rows(event, state)
        maps: Maps = known.within(own, event.unseen)
        scores = own.of(event.scores)
        bias, gate = self.pull.score_bias(scores.detach(), maps)
        new = scores + torch.nn.functional.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))
        self._report(event, state, maps, gate, bias, [values.detach().softmax(-1) for values in (scores, new)])
        return own.put(event.scores, new)

    def _mix(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """A[q*, V] <- visual mass times the mixture with the anchors."""
        if (known := state.get("maps")) is None:
            return None
        own = own_rows(event, state)
        maps: Maps = known.within(own, event.unseen)
        probs, width = own.of(event.probs), maps.columns.shape[-1]
        image, gate = self.pull.mixed(probs[..., :width], maps)
        new = torch.cat([image, probs[..., width:]], -1)
        self._report(event, state, maps, gate, (new - probs).detach()[..., :width], [probs.detach(), new.detach()])
        return own.put(event.probs, new)

    def _report(
        self, event: _Rows, state: MethodState, maps: Maps, gate: Tensor, change: Tensor, weights: list[Tensor]
    ) -> None:
        """Count the rows edited in this layer and the attention on the image before and after."""
        wanted = maps.columns if self.operator == "log_ratio" else (maps.anchors > 0) | (maps.penalty > 0)
        rows = own_rows(event, state).asked & wanted.any(3).any(1)  # [B, R]
        image = maps.columns.any(1).unsqueeze(1)
        for counter, values in zip(("image_mass_before", "image_mass_after"), weights, strict=True):
            mass = torch.where(image, values[..., : image.shape[-1]], 0.0).sum(-1).mean(1)
            state.count(counter, (mass * rows).sum(1))
        drift = masked_mean(gate.movedim(1, -1), maps.columns.any(3).movedim(1, -1))
        state.count("gate", (drift * rows).sum(1))
        state.count("layers_edited", rows.sum(1))
        if state.tracing:
            bias = torch.nn.functional.pad(change.mean(1)[:, -1], (0, weights[0].shape[-1] - change.shape[-1]))
            state.trace(event, gate=drift[:, -1], bias=bias)

    @classmethod
    def identity(cls) -> Self:
        """No strength, whatever the operator."""
        return cls(alpha=0.0, beta=0.0, mix=0.0, damp=0.0)

    def ablations(self, telemetry: Mapping[str, float]) -> dict[str, Method]:
        """Return one term at a time, anchors from final layers (and mid ones at the same edit), and random noise."""
        names = ("anchors_only", "suppression_only", "final_layers", "mid_layers_late_edit")
        changes = {name: self.presets[name] for name in names}
        changes["random_noise"] = {"noise_source": "random", "normalise": True}
        return {name: dataclasses.replace(self, **change) for name, change in changes.items()}

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return every operator once, with the costlier options."""
        return [
            {"alpha": 2.0, "beta": 1.0, "min_anchors": 2, "gamma": 0.5, "normalise": False, "rho": 0.3},
            {"operator": "prob_mix", "mode": "dynamics", "mix": 0.6, "damp": 0.8, "pool": "top", "top_heads": 0.5},
            {"operator": "log_ratio", "alpha": 2.0, "noise_source": "embedding", "pool": "mass", "rows": "all_text"},
            {"scale": "mad", "mass": "preserve", "noise_source": "random", "refresh": "prefill", "no_grid": "refuse"},
            {"gate": "bhattacharyya", "gate_input": "edited", "anchor_unit": "heads", "shared_tokens": "suppress"}
            | {"early": "0", "mid": "1", "deep": "2-3", "heads": "visual", "multi_image": "per_image"},
        ]


def _text_rows(layout: TokenLayout) -> Tensor:
    """Text rows from the first image on, and the last prompt row whatever it is, ``[B, L]``."""
    last = torch.arange(layout.length, device=layout.roles.device) == layout.prompt_length - 1
    rows: Tensor = (layout.roles >= Role.PROMPT) | last
    return rows
