"""LocoRE: strengthen attention from the next token to the tokens just before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    AttentionScores,
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
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SCORE_MODES = ("logit_bias", "logit_scale")


@dataclass(frozen=True, kw_only=True)
class LocoRE(Method):
    """Local Coherence Reinforcement: a gain on the attention to the last few tokens of the text.

    Hallucinations are said to begin where a token stops depending on what was written just before it. LocoRE
    multiplies the attention of the row that predicts the next token by ``1 + beta`` on the ``window`` keys before it
    (Eq. 8-10, Algorithm 2), in every head.

    Paper: arXiv 2601.20279, Eq. 8-10 and Algorithm 2. No code was released; the window size and the layers are given
    nowhere, so no run reproduces the paper's numbers. The paper contradicts itself on the place of the gain (weights in
    the equations, "used in the softmax" in the prose): hence `mode`.

    Parameters
    ----------
    beta
        Gain minus one. Paper: 0.15 (LLaVA-1.5-7B), 0.20 (Qwen2-VL-7B). Negative values weaken.
    window
        Keys before the predicting row that are strengthened. Not in the paper.
    layers
        Decoder layers; ``all``, ``9-14``, ``0.25-0.5``. Algorithm 2 names none.
    mode
        ``post_raw`` scales weights without renormalising (Algorithm 2 to the letter); ``post_renorm`` renormalises;
        ``logit_bias`` adds log(1 + beta) to the scores, which is the same as ``post_renorm``; ``logit_scale``
        multiplies the scores (a negative score moves away).
    history_start
        First key that counts as output: ``after_image`` (Algorithm 1: everything after the picture, question included)
        or ``generated``.
    include_self
        Whether the predicting row's own key is strengthened. The paper's inequality excludes it.
    decay_r
        Below 1: the gain itself, in place of ``1 + beta``, to weaken the window (saliency-decay experiment). 1 is off.

    Examples
    --------
    >>> LocoRE(beta=0.2, layers="9-14").beta
    0.2
    """

    name: ClassVar[str] = "locore"
    summary: ClassVar[str] = "gain on the attention to the tokens just before the one being predicted"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    paper: ClassVar[Paper | None] = Paper(
        title="Hallucination Begins Where Saliency Drops", arxiv="2601.20279", where="Eq. 8-10, Algorithm 2"
    )
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS, Point.ATTENTION_SCORES}))
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "lineage": {"mode": "logit_scale", "layers": "9-14"},
        "logit_bias": {"mode": "logit_bias"},
        "efficient": {"mode": "logit_bias"},
    }
    preset_fidelity: ClassVar[dict[str, Fidelity]] = dict.fromkeys(
        ("lineage", "logit_bias", "efficient"), Fidelity.RECONSTRUCTED
    )

    beta: float = 0.15
    window: int = 5
    layers: str = "all"
    mode: str = "post_raw"
    history_start: str = "after_image"
    include_self: bool = False
    decay_r: float = 1.0

    def __post_init__(self) -> None:
        self.require_finite("beta")
        self.require(self.beta > -1.0, "beta", "be above -1 (the gain 1 + beta must be positive)")
        self.require(0.0 < self.decay_r <= 1.0, "decay_r", "be above 0 and at most 1 (1: beta counts)")
        self.require(self.window >= 1, "window", "be at least 1")
        self.require_option("mode", ("post_raw", "post_renorm", *_SCORE_MODES))
        self.require_option("history_start", ("after_image", "generated"))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Act on the predicting rows of the configured layers."""
        point = Point.ATTENTION_SCORES if self.mode in _SCORE_MODES else Point.ATTENTION_PROBS
        layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
        text = {Role.GENERATED} if self.history_start == "generated" else {Role.PROMPT, Role.GENERATED}
        return [
            Subscription(
                point=point,
                access=Access.WRITE,
                layers=layers,
                rows=Rows.PREDICTORS,
                where=f"{self.window} keys before the row",
                roles=frozenset(text),
                normalised=self.mode != "post_raw",
            )
        ]

    @property
    def _beta(self) -> float:
        return self.beta if self.decay_r == 1.0 else self.decay_r - 1.0

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> Tensor | None:
        """A[q*, j] <- A[q*, j] * gamma_j (Algorithm 2)."""
        gained = None
        if self._beta != 0.0:
            gain = state.once("gain", event.rows, lambda: self._gain(event))
            gained = event.probs * gain
            if self.mode == "post_renorm":  # rows without a window stay bit for bit
                acts = state.once("acts", event.rows, lambda: (gain != 1.0).any(-1, keepdim=True))
                gained = torch.where(acts, gained / gained.sum(-1, keepdim=True), event.probs)
        if state.tracing:
            self._trace(event, state, event.probs, event.probs if gained is None else gained)
        return gained

    def on_attention_scores(self, event: AttentionScores, state: MethodState) -> Tensor | None:
        """Z[q*, j] <- Z[q*, j] + log gamma_j, or times gamma_j in the lineage's reading."""
        moved, scores = None, event.scores
        if self._beta != 0.0:
            moved = scores * (1.0 + self._beta) if self.mode == "logit_scale" else scores + math.log1p(self._beta)
            moved = torch.where(state.once("window", event.rows, lambda: self._window(event, scores)), moved, scores)
        if state.tracing:
            self._trace(event, state, scores.softmax(-1), (scores if moved is None else moved).softmax(-1))
        return moved

    def _trace(
        self, event: AttentionProbs | AttentionScores, state: MethodState, before: Tensor, after: Tensor
    ) -> None:
        """Report the mass on the window before the edit and of the whole row after it, head mean of the last row."""
        mass = (before * self._window(event, before)).sum(-1)[:, :, -1].mean(1)
        state.trace(event, window_mass=mass, row_mass=after.sum(-1)[:, :, -1].mean(1))

    def _gain(self, event: AttentionProbs) -> Tensor:
        """gamma_j: 1 + beta within the window, 1 elsewhere, ``[B, 1, R, K]``."""
        return torch.where(self._window(event, event.probs), event.probs.new_tensor(1.0 + self._beta), 1.0)

    def _window(self, event: AttentionProbs | AttentionScores, matrix: Tensor) -> Tensor:
        """Keys with gamma_j > 1: J = {S0 <= j < q*} within the window, ``[B, 1, R, K]``."""
        layout = event.layout
        start = layout.after_image if self.history_start == "after_image" else layout.prompt_length
        start = torch.as_tensor(start, device=matrix.device).expand(layout.rows)[:, None, None]
        keys = torch.arange(matrix.shape[-1], device=matrix.device)
        distance = event.rows.to(matrix.device)[:, None] - keys
        near = (distance <= self.window) & (distance >= (0 if self.include_self else 1))
        return (near & (keys >= start)).unsqueeze(1)

    @classmethod
    def identity(cls) -> Self:
        """No gain."""
        return cls(beta=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return every mode once."""
        return [
            {"beta": 0.5, "window": 3},
            {"decay_r": 0.5, "mode": "post_renorm", "include_self": True},
            {"beta": 0.3, "mode": "logit_bias", "history_start": "generated"},
            {"beta": 1.0, "mode": "logit_scale", "layers": "0.25-0.5"},
        ]
