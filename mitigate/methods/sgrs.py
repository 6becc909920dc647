"""SGRS: accept a candidate token only if its gradient leans on the text so far as much as recent tokens did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Point,
    Rows,
    Selection,
    SelectToken,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.errors import HookError
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Draw:
    """The candidates of one step, all rows at once.

    Parameters
    ----------
    tokens, probs
        ``[B, top_k]`` candidates by descending probability, and their probabilities in the whole vocabulary.
    alive
        ``[B, top_k]`` candidates not yet rejected.
    saliency
        ``[B, top_k]`` scores S(c); NaN until a candidate is scored.
    """

    tokens: Tensor
    probs: Tensor
    alive: Tensor
    saliency: Tensor


@dataclass(frozen=True, kw_only=True)
class SGRS(Method):
    """Saliency-Guided Rejection Sampling: rejects candidates that the text so far does not support.

    The saliency S(c) of a candidate is the share of |attention x gradient| that falls on what was written before, in
    the row that predicts it (Eq. 2-6). A drawn candidate is accepted if S(c) reaches ``alpha`` times the mean of the
    last accepted scores; after ``max_resample`` rejections the most salient candidate is taken (Algorithm 1).

    Paper: arXiv 2601.20279, Eq. 1-6 and Algorithm 1. ``top_k``, ``max_resample``, ``window`` and the layers are the
    official code's. That code reads the saliency in the candidate's own row, where by causality it is zero; here it is
    the row that predicts the candidate, as Eq. 6 has it. ``query_row="candidate"`` keeps the zero as a negative
    control.

    Parameters
    ----------
    alpha
        Share of the recent mean a candidate must reach. Paper: 0.6; 0 accepts everything.
    top_k
        Candidates per step.
    max_resample
        Draws per step.
    window
        Accepted scores the threshold looks back on.
    layers
        Layers whose attention is differentiated. Code: 6-8 of 32; the default is the same share of the depth.
    history_start
        First key that counts as earlier text: ``after_image`` (Eq. 6: the question counts) or ``generated``.
    include_diagonal
        Whether the predicting row's own key counts (Eq. 6: yes).
    norm
        Normalisation of a saliency row (Eq. 5): ``row_l2``, ``row_l1``, ``row_max`` or ``none``.
    reduce
        Eq. 6: ``mean`` over the earlier text, ``sum``, or ``window_sum`` over its last ``window`` keys.
    proposal
        ``sample`` draws candidates by their probability after the caller's logits processors (none by default, the
        paper's temperature 1), from the request's seeded generators; ``greedy_order`` tries the most probable first.
    history_on_fallback
        Whether a fallback's score enters the history: ``append`` (code) or ``skip`` (Algorithm 1).
    on_skip
        Choice where no earlier text exists: ``base`` (plain decoding) or ``proposal``.
    exempt
        ``none``, or ``eos``: end tokens are accepted without a score.
    query_row
        ``predictor``, or ``candidate``: the official code's row, zero by construction.

    Examples
    --------
    >>> SGRS(alpha=0.6, proposal="greedy_order").top_k
    5
    """

    name: ClassVar[str] = "sgrs"
    summary: ClassVar[str] = "rejects candidate tokens whose gradient leans too little on the text so far"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    paper: ClassVar[Paper | None] = Paper(
        title="Hallucination Begins Where Saliency Drops", arxiv="2601.20279", where="Eq. 1-6, Algorithm 1"
    )
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.ATTENTION_PROBS}),
        writes=frozenset({Point.SELECT_TOKEN}),
        gradient=True,
        selects_token=True,
        stochastic=True,
        backwards_per_token=5.0,
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "safe": {"exempt": "eos", "proposal": "greedy_order"},
        "official-code": {"query_row": "candidate"},
    }

    alpha: float = 0.6
    top_k: int = 5
    max_resample: int = 3
    window: int = 5
    layers: str = "0.1875-0.25"
    history_start: str = "after_image"
    include_diagonal: bool = True
    norm: str = "row_l2"
    reduce: str = "mean"
    proposal: str = "sample"
    history_on_fallback: str = "append"
    on_skip: str = "base"
    exempt: str = "none"
    query_row: str = "predictor"

    def __post_init__(self) -> None:
        self.require_finite("alpha")
        self.require(self.alpha >= 0.0, "alpha", "not be negative")
        for parameter in ("top_k", "max_resample", "window"):
            self.require(getattr(self, parameter) >= 1, parameter, "be at least 1")
        self.require_option("history_start", ("after_image", "generated"))
        self.require_option("norm", ("row_l2", "row_l1", "row_max", "none"))
        self.require_option("reduce", ("mean", "sum", "window_sum"))
        self.require_option("proposal", ("sample", "greedy_order"))
        self.require_option("history_on_fallback", ("append", "skip"))
        self.require_option("on_skip", ("base", "proposal"))
        self.require_option("exempt", ("none", "eos"))
        self.require_option("query_row", ("predictor", "candidate"))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Differentiate the predicting row in the target layers, and choose the token."""
        layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
        return [
            Subscription(
                point=Point.ATTENTION_PROBS,
                access=Access.GRADIENT,
                layers=layers,
                rows=Rows.LAST,
                where="predicting row x earlier text",
            ),
            Subscription(
                point=Point.SELECT_TOKEN, access=Access.WRITE, where=f"among the {self.top_k} most probable tokens"
            ),
        ]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Only the graph is needed; it is read when the token is chosen."""

    # ------------------------------------------------------------------------------------------------------ Algorithm 1

    def on_select_token(self, event: SelectToken, state: MethodState) -> Selection:
        """Draw, score, accept or reject, for all rows at once (Algorithm 1)."""
        if state.get("history") is None:
            state.history = [[] for _ in range(event.layout.rows)]
        # the caller's logits processors decide what may be proposed; without any, scores are the raw logits
        top = event.scores.softmax(-1).topk(min(self.top_k, event.scores.shape[-1]), dim=-1)
        draw = Draw(top.indices, top.values, alive=top.values > 0, saliency=torch.full_like(top.values, torch.nan))
        columns = self._earlier_text(event)
        scored = event.active & columns.any(-1)
        state.count("steps", 1.0, event.active)
        state.count("gated", 1.0, scored)
        place = torch.zeros_like(draw.tokens[:, 0])
        chosen = torch.zeros_like(event.active)
        if self.on_skip == "proposal":
            skipped = event.active & ~scored
            place = torch.where(skipped, self._propose(event, draw, skipped), place)
            chosen = skipped
        tau = self._threshold(state, event)
        open_rows = scored.clone()
        for _ in range(self.max_resample):
            if not bool(open_rows.any()):
                break
            drawn = self._propose(event, draw, open_rows)
            free = self._exempt(event, draw, drawn) & open_rows
            self._score(event, state, draw, drawn, open_rows & ~free, columns)
            saliency = draw.saliency.gather(1, drawn[:, None])[:, 0]
            accepted = open_rows & (free | (saliency >= tau))
            place = torch.where(accepted, drawn, place)
            self._remember(state, saliency, accepted & ~free)
            rejected = open_rows & ~accepted
            state.count("rejections", 1.0, rejected)
            draw.alive[rejected] = draw.alive[rejected].scatter(1, drawn[rejected][:, None], False)
            open_rows = rejected & draw.alive.any(-1)
            chosen = chosen | accepted
        left = scored & ~chosen
        if bool(left.any()):
            place = torch.where(left, self._fall_back(event, state, draw, left, columns), place)
        token = draw.tokens.gather(1, place[:, None])[:, 0]
        return Selection(token=token, chosen=chosen | left)

    def _propose(self, event: SelectToken, draw: Draw, rows: Tensor) -> Tensor:
        """Draw one living candidate per row; ``[B]`` places among the candidates."""
        weights = draw.probs * draw.alive
        if self.proposal == "greedy_order":
            return weights.masked_fill(~draw.alive, -1.0).argmax(-1)
        uniform = event.request.uniform(rows).to(weights.device, torch.float64)
        steps = weights.double().cumsum(-1)
        reached = steps > uniform[:, None] * steps[:, -1:]
        return (reached & draw.alive).int().argmax(-1)

    def _fall_back(self, event: SelectToken, state: MethodState, draw: Draw, left: Tensor, columns: Tensor) -> Tensor:
        """All draws rejected: take the most salient of all candidates, scoring those not drawn; ``[B]`` places."""
        for place in range(draw.tokens.shape[1]):
            missing = left & draw.saliency[:, place].isnan() & (draw.probs[:, place] > 0)
            self._score(event, state, draw, torch.full_like(draw.tokens[:, 0], place), missing, columns)
        state.count("fallbacks", 1.0, left)
        best = draw.saliency.nan_to_num(nan=-torch.inf).argmax(-1)
        if self.history_on_fallback == "append":
            self._remember(state, draw.saliency.gather(1, best[:, None])[:, 0], left)
        return best

    def _threshold(self, state: MethodState, event: SelectToken) -> Tensor:
        """Tau = alpha x mean of the last ``window`` scores; 0 while there are none. ``[B]``."""
        recent = [scores[-self.window :] for scores in state.history]
        means = [sum(scores) / len(scores) if scores else 0.0 for scores in recent]
        return self.alpha * torch.tensor(means, device=event.logits.device, dtype=torch.float32)

    def _remember(self, state: MethodState, saliency: Tensor, rows: Tensor) -> None:
        for row in rows.nonzero().flatten().tolist():
            state.history[row].append(float(saliency[row]))

    def _exempt(self, event: SelectToken, draw: Draw, drawn: Tensor) -> Tensor:
        if self.exempt == "none":
            return torch.zeros_like(event.active)
        return torch.isin(draw.tokens.gather(1, drawn[:, None])[:, 0], event.request.end_tokens)

    # ----------------------------------------------------------------------------------------------------- the saliency

    def _earlier_text(self, event: SelectToken) -> Tensor:
        """J: the key columns that count as earlier text, ``[B, K]``."""
        layout = event.layout
        start = layout.after_image if self.history_start == "after_image" else layout.prompt_length
        start = torch.as_tensor(start, device=event.logits.device).expand(layout.rows)[:, None]
        keys = torch.arange(layout.length, device=event.logits.device)
        last = layout.length - (1 if self.include_diagonal else 2)
        inside = (keys >= start) & (keys <= last)
        return inside & (keys > last - self.window) if self.reduce == "window_sum" else inside

    def _score(
        self, event: SelectToken, state: MethodState, draw: Draw, place: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        """Fill in S(c) for the candidate at ``place`` of the given rows: one backward for the whole batch."""
        if not bool(rows.any()):
            return
        token = draw.tokens.gather(1, place[:, None])[:, 0]
        saliency = self._saliency(event, token, rows, columns)
        if bool(saliency[rows].isnan().any()):
            raise HookError(
                f"{self.name}: saliency is not a number at step {event.step}; the model's logits are not finite"
            )
        if self.query_row == "predictor":
            state.count("extra_backwards", 1.0, rows)
        filled = torch.where(rows, saliency, draw.saliency.gather(1, place[:, None])[:, 0])
        draw.saliency = draw.saliency.scatter(1, place[:, None], filled[:, None])

    def _saliency(self, event: SelectToken, token: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """S(c) of one candidate per row (Eq. 2-6), ``[B]``."""
        if self.query_row == "candidate":
            # the loss does not depend on the attention row of the token it predicts: its gradient is exactly zero
            return torch.zeros_like(event.logits[:, 0])
        # d(-log p_c)/d(logits) = p - e_c, where p_c - 1 is minus the sum of the others: no cancellation as p_c -> 1
        others = event.logits.softmax(-1).scatter(1, token[:, None], 0.0)
        cotangent = others.scatter(1, token[:, None], -others.sum(-1, keepdim=True))
        if self.norm != "none":  # a normalised row ignores the cotangent's length, and unit length cannot underflow
            cotangent = cotangent / cotangent.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        layers = event.attention_gradients(cotangent * rows[:, None])
        per_layer = [self._share(attention, gradient, columns) for attention, gradient in layers.values()]
        mean: Tensor = torch.stack(per_layer).mean(0).float()
        return mean

    def _share(self, attention: Tensor, gradient: Tensor, columns: Tensor) -> Tensor:
        """One layer's part of Eq. 6: ``[B, H, K]`` attention and gradient to ``[B]``."""
        row = (attention * gradient).abs().sum(1)  # Eq. 4, summed over heads
        if self.norm == "row_l2":
            size = row.norm(dim=-1)
        elif self.norm == "row_l1":
            size = row.sum(-1)
        elif self.norm == "row_max":
            size = row.amax(-1)
        else:
            size = torch.ones_like(row[:, 0])
        total = (row / (size + torch.finfo(torch.float32).tiny)[:, None] * columns).sum(-1)  # Eq. 5
        share: Tensor = total / columns.sum(-1).clamp_min(1) if self.reduce == "mean" else total
        return share

    @classmethod
    def identity(cls) -> Self:
        """Accept the most probable candidate: the tokens of greedy decoding."""
        return cls(alpha=0.0, proposal="greedy_order")

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return strict thresholds in both orders."""
        return [
            {"alpha": 1.1, "proposal": "greedy_order", "layers": "0.5-0.75"},
            {"alpha": 0.9, "reduce": "window_sum", "norm": "row_l1", "history_start": "generated", "exempt": "eos"},
        ]
