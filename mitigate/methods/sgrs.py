"""SGRS: accept a candidate token only if its gradient leans on the text so far as much as recent tokens did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Phase,
    Point,
    Rows,
    Selection,
    SelectToken,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.core.points import MAIN_PHASES
from mitigate.errors import HookError, UnsupportedModel
from mitigate.lazy import torch
from mitigate.ops.saliency import NORMS, REDUCTIONS, cotangent, last_columns, layer_shares

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout


@dataclass(kw_only=True)
class Draw:
    """The candidates of one step, all rows at once.

    Parameters
    ----------
    candidates, probabilities
        ``[B, k]`` tokens by descending probability, and their probabilities in the whole vocabulary.
    columns
        ``[B, K]`` J, the earlier text.
    rejected
        ``[B, k]`` candidates drawn and refused.
    saliency, layer_saliency, image_saliency
        S(c) ``[B, k]``, layer by layer ``[B, k, l]``, and the same over the image's columns; NaN until scored.
    backwards
        ``[B]`` scores that took a backward pass.
    """

    candidates: Tensor
    probabilities: Tensor
    columns: Tensor
    rejected: Tensor
    saliency: Tensor
    layer_saliency: Tensor
    image_saliency: Tensor
    backwards: Tensor

    @property
    def alive(self) -> Tensor:
        """``[B, k]`` candidates that can still be drawn."""
        return (self.probabilities > 0) & ~self.rejected

    def at(self, place: Tensor) -> Tensor:
        """Return the candidates at places ``[B]``."""
        return self.candidates.gather(1, place.clamp_min(0)[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class SGRS(Method):
    """Saliency-Guided Rejection Sampling: rejects candidates that the text so far does not support.

    The saliency S(c) of a candidate is the share of |attention x gradient| that falls on what was written before, in
    the row that predicts it (Eq. 2-6). A drawn candidate is accepted if S(c) reaches ``alpha`` times the mean of the
    last accepted scores; after ``max_resample`` rejections the most salient candidate is taken (Algorithm 1).

    Paper: arXiv 2601.20279, Eq. 1-6 and Algorithm 1. ``top_k``, ``max_resample``, ``window`` and the layers are the
    official code's, which reads the saliency in the candidate's own row, where by causality it is zero; Eq. 6 has the
    row that predicts the candidate. ``query_row="candidate_legacy"`` keeps the zero as a negative control.

    Parameters
    ----------
    alpha
        Share of the recent mean a candidate must reach. Paper: 0.6; 0 accepts everything.
    top_k, max_resample
        Candidates, and draws among them, per step. Code: 5 and 3.
    window, window_rule
        Accepted scores the threshold looks back on: 5, ``last_w`` (code) or ``w_plus_1`` (the paper's inequality).
    layers
        Layers whose attention is differentiated. Code: 6-8 of 32; the default is the same share of the depth.
    history_start
        First key that counts as earlier text: ``after_image`` (Eq. 6: the question counts) or ``generated``.
    history_init
        At the first token: ``empty`` (nothing is rejected there) or ``prompt_tail``, the prompt's last tokens' scores.
    include_diagonal
        Whether the predicting row's own key counts (Eq. 6: yes).
    norm
        Normalisation of a saliency row (Eq. 5): ``row_l2``, ``row_l1``, ``row_max`` or ``none``.
    reduce
        Eq. 6: ``mean`` over the earlier text, ``sum``, or ``window_sum`` over its last ``window`` keys.
    proposal
        ``sample`` draws by probability after the caller's logits processors, from the request's seeded generators;
        ``greedy_order`` tries the most probable first.
    temperature
        Of the proposal's draws. Code: 1 (its option is unused).
    fallback, eta
        After all rejections: ``argmax_saliency`` (paper) or ``argmax_logp_plus_eta_log_s`` (not in the paper).
    history_on_fallback
        Whether a fallback's score enters the history: ``append`` (code) or ``skip`` (Algorithm 1).
    on_skip
        Choice in steps without scores (no earlier text, or confident): ``base`` (plain decoding) or ``proposal``.
    skip_above
        Steps with a more probable token than this are left alone, as is the history; 1: none. Not in the paper.
    exempt
        Tokens accepted without a score: ``none`` (paper), ``eos`` or ``special`` (end tokens and all special ones).
    gate_on
        Tokens that are scored: ``all`` (paper), ``word_start`` or ``content``; others are accepted without a score.
    gradient
        ``exact``, or ``direct``: no backward, only the direct path from heads to logits. Not in the paper.
    query_row
        ``predictor``, or ``candidate_legacy``: the official code's row, zero by construction.

    Examples
    --------
    >>> SGRS(alpha=0.6, proposal="greedy_order").top_k
    5
    """

    name: ClassVar[str] = "sgrs"
    summary: ClassVar[str] = "rejects candidate tokens whose gradient leans too little on the text so far"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    version: ClassVar[int] = 2
    paper: ClassVar[Paper | None] = Paper(
        title="Hallucination Begins Where Saliency Drops", arxiv="2601.20279", where="Eq. 1-6, Algorithm 1"
    )
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.ATTENTION_PROBS}),
        writes=frozenset({Point.SELECT_TOKEN}),
        gradient=True,
        selects_token=True,
        stochastic=True,
        forwards_per_sample=1.0,  # history_init=prompt_tail, as are the backwards
        backwards_per_sample=5.0,
        backwards_per_token=5.0,
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "safe": {"exempt": "special", "proposal": "greedy_order"},
        "official-code": {"query_row": "candidate_legacy", "proposal": "sample"},
        "efficient": {"skip_above": 0.95, "exempt": "eos", "proposal": "greedy_order", "layers": "0.65-0.75"},
        "forward-only": {"gradient": "direct", "exempt": "eos", "proposal": "greedy_order", "layers": "0.65-0.75"},
    }
    preset_fidelity: ClassVar[dict[str, Fidelity]] = {"official-code": Fidelity.CONTROL} | dict.fromkeys(
        ("efficient", "forward-only"), Fidelity.RECONSTRUCTED
    )

    alpha: float = 0.6
    top_k: int = 5
    max_resample: int = 3
    window: int = 5
    window_rule: str = "last_w"
    layers: str = "0.1875-0.25"
    history_start: str = "after_image"
    history_init: str = "empty"
    include_diagonal: bool = True
    norm: str = "row_l2"
    reduce: str = "mean"
    proposal: str = "sample"
    temperature: float = 1.0
    fallback: str = "argmax_saliency"
    eta: float = 1.0
    history_on_fallback: str = "append"
    on_skip: str = "base"
    skip_above: float = 1.0
    exempt: Annotated[str, "not seen on tiny models"] = "none"
    gate_on: str = "all"
    gradient: str = "exact"
    query_row: str = "predictor"

    def __post_init__(self) -> None:
        self.require_finite("alpha", "temperature", "eta")
        self.require(self.alpha >= 0.0, "alpha", "not be negative")
        for parameter in ("top_k", "max_resample", "window"):
            self.require(getattr(self, parameter) >= 1, parameter, "be at least 1")
        self.require(self.temperature > 0.0, "temperature", "be above 0 (proposal=greedy_order draws nothing)")
        self.require(self.eta > 0.0, "eta", "be above 0")
        self.require(0.0 <= self.skip_above <= 1.0, "skip_above", "be between 0 and 1 (1 skips no step)")
        self.require_option("window_rule", ("last_w", "w_plus_1"))
        self.require_option("history_start", ("after_image", "generated"))
        self.require_option("history_init", ("empty", "prompt_tail"))
        self.require_option("norm", NORMS)
        self.require_option("reduce", REDUCTIONS)
        self.require_option("proposal", ("sample", "greedy_order"))
        self.require_option("fallback", ("argmax_saliency", "argmax_logp_plus_eta_log_s"))
        self.require_option("history_on_fallback", ("append", "skip"))
        self.require_option("on_skip", ("base", "proposal"))
        self.require_option("exempt", ("none", "eos", "special"))
        self.require_option("gate_on", ("all", "word_start", "content"))
        self.require_option("gradient", ("exact", "direct"))
        self.require_option("query_row", ("predictor", "candidate_legacy"))
        tail = self.history_init == "prompt_tail"
        self.require(self.needs_gradient or not tail, "history_init", "be empty without gradient=exact in query_row")

    @property
    def needs_gradient(self) -> bool:
        """Whether the scores take backward passes: not along the direct path, nor for a row that is zero anyway."""
        return self.gradient == "exact" and self.query_row == "predictor"

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Differentiate the predicting row in the target layers, and choose the token."""
        layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
        if self.history_init == "prompt_tail" and not model.causal_prompt:
            why = f"prompt tokens of {model.family} see those they would have to predict"
            raise UnsupportedModel(f"{self.name}: {why}; set methods.{self.name}.history_init=empty")
        where = f"among the {self.top_k} most probable tokens"
        choose = Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE, where=where)
        read = Subscription(
            point=Point.ATTENTION_PROBS,
            access=Access.GRADIENT if self.needs_gradient else Access.DIRECT,
            layers=layers,
            phases=MAIN_PHASES | {Phase.DIAGNOSTIC} if self.history_init == "prompt_tail" else MAIN_PHASES,
            rows=Rows.LAST,
            where="predicting row x earlier text",
        )
        return [choose] if self.query_row == "candidate_legacy" else [read, choose]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Only the gradient is needed; it is asked for when the token is chosen."""

    def on_select_token(self, event: SelectToken, state: MethodState) -> Selection:
        """Draw, score, accept or reject, for all rows at once (Algorithm 1)."""
        if state.get("history") is None:
            state.history = self._first_history(event, state)
        draw = self._candidates(event)
        written = event.active & draw.columns.any(-1)
        confident = written & (draw.probabilities[:, 0] > self.skip_above)
        open_rows = gated = written & ~confident
        tau = self._threshold(state, event)
        place = torch.full_like(draw.candidates[:, 0], -1)  # -1: plain decoding decides
        if self.on_skip == "proposal":
            idle = event.active & ~gated
            place = torch.where(idle, self._propose(event, draw, idle), place)
        free = torch.zeros_like(gated)
        for _ in range(self.max_resample):
            if not bool(open_rows.any()):
                break
            drawn = self._propose(event, draw, open_rows)
            pardoned = open_rows & self._free(event, draw.at(drawn))
            self._score(event, draw, drawn, open_rows & ~pardoned)
            accepted = open_rows & (pardoned | (draw.saliency.gather(1, drawn[:, None])[:, 0] >= tau))
            place, free = torch.where(accepted, drawn, place), free | pardoned
            refused = (open_rows & ~accepted).nonzero().flatten()
            draw.rejected[refused, drawn[refused]] = True
            open_rows = open_rows & ~accepted & draw.alive.any(-1)
        left = gated & (place < 0)
        if bool(left.any()):
            place = torch.where(left, self._fall_back(event, draw, left), place)
        gated = gated & ~free
        for row in (gated & ~left if self.history_on_fallback == "skip" else gated).nonzero().flatten().tolist():
            state.history[row].append(float(draw.saliency[row, place[row]]))
        counts = {"steps": event.active, "skipped": confident, "exempted": free, "gated": gated, "fallbacks": left}
        self._count(state, draw, place, counts)
        known = {**vars(draw), "columns": draw.columns.sum(-1), "threshold": tau}
        state.trace(event, **known, fallback=left, chosen_place=place)
        return Selection(token=draw.at(place), chosen=place >= 0)

    def _candidates(self, event: SelectToken) -> Draw:
        """C: the most probable tokens, and J, the columns their scores are taken over."""
        # the caller's logits processors decide what may be proposed; without any, scores are the raw logits
        top = event.scores.softmax(-1).topk(min(self.top_k, event.scores.shape[-1]), dim=-1)
        unknown = torch.full_like(top.values, torch.nan)
        per_layer = unknown[..., None].repeat(1, 1, max(len(event.differentiates), 1))
        return Draw(
            candidates=top.indices,
            probabilities=top.values,
            columns=self._earlier_text(event.layout, event.layout.length - 1).to(unknown.device),
            rejected=torch.zeros_like(top.indices, dtype=torch.bool),
            saliency=unknown,
            layer_saliency=per_layer,
            image_saliency=per_layer.clone(),
            backwards=torch.zeros_like(unknown[:, 0]),
        )

    def _propose(self, event: SelectToken, draw: Draw, rows: Tensor) -> Tensor:
        """Draw one living candidate per row; ``[B]`` places among the candidates."""
        alive = draw.alive
        if self.proposal == "greedy_order":
            return draw.probabilities.masked_fill(~alive, -1.0).argmax(-1)
        logs = (draw.probabilities.double().log() / self.temperature).masked_fill(~alive, -torch.inf)
        steps = logs.softmax(-1).cumsum(-1)
        uniform = event.request.uniform(rows).to(steps.device)[:, None]
        return ((steps > uniform * steps[:, -1:]) & alive).int().argmax(-1)

    def _fall_back(self, event: SelectToken, draw: Draw, left: Tensor) -> Tensor:
        """All draws rejected: take the best of all candidates, scoring those not drawn; ``[B]`` places."""
        for place in range(draw.candidates.shape[1]):
            missing = left & draw.saliency[:, place].isnan() & (draw.probabilities[:, place] > 0)
            self._score(event, draw, torch.full_like(draw.candidates[:, 0], place), missing)
        value = draw.saliency
        if self.fallback == "argmax_logp_plus_eta_log_s":
            value = draw.probabilities.log() + self.eta * value.clamp_min(torch.finfo(value.dtype).tiny).log()
        return value.nan_to_num(nan=-torch.inf).argmax(-1)

    @property
    def _lookback(self) -> int:
        return self.window + (self.window_rule == "w_plus_1")

    def _threshold(self, state: MethodState, event: SelectToken) -> Tensor:
        """Tau = alpha x mean of the last scores; 0 while there are none. ``[B]``."""
        means = [sum(last) / len(last) if (last := scores[-self._lookback :]) else 0.0 for scores in state.history]
        return self.alpha * torch.tensor(means, device=event.logits.device, dtype=torch.float32)

    def _free(self, event: SelectToken, token: Tensor) -> Tensor:
        """Tokens accepted without a score, ``[B]``."""
        free = torch.zeros_like(event.active)
        if self.exempt != "none":
            free = torch.isin(token, event.request.end_tokens)
        if self.exempt == "special":
            free = free | event.request.vocabulary.special[token]
        if self.gate_on != "all":
            free = free | ~getattr(event.request.vocabulary, self.gate_on)[token]
        return free

    def _count(self, state: MethodState, draw: Draw, place: Tensor, counts: dict[str, Tensor]) -> None:
        for name, rows in counts.items():
            state.count(name, 1.0, rows)
        for name, value in (("saliency", draw.saliency), ("image_saliency", draw.image_saliency.mean(-1))):
            state.count(name, torch.where(counts["gated"], value.gather(1, place.clamp_min(0)[:, None])[:, 0], 0.0))
        state.count("rejections", draw.rejected.sum(-1))
        state.count("steps_with_rejection", 1.0, draw.rejected.any(-1))
        state.count("extra_backwards", draw.backwards)

    def _earlier_text(self, layout: TokenLayout, last: int, keys: int = 0) -> Tensor:
        """J of the row at column ``last``, as a mask over ``keys`` columns (up to the row's own by default)."""
        start = layout.after_image if self.history_start == "after_image" else layout.prompt_length
        start = torch.as_tensor(start, device=layout.roles.device).expand(layout.rows)[:, None]
        columns = torch.arange(keys or last + 1, device=layout.roles.device)
        inside = (columns >= start) & (columns <= (last if self.include_diagonal else last - 1))
        return last_columns(inside, self.window) if self.reduce == "window_sum" else inside

    def _first_history(self, event: SelectToken, state: MethodState) -> list[list[float]]:
        """Hist before the first token: empty, or the scores of the prompt's last tokens (oldest first)."""
        history: list[list[float]] = [[] for _ in range(event.layout.rows)]
        if self.history_init == "empty" or self.history_start == "generated":
            return history
        replay = event.request.replay(state, rows=self._lookback)
        for index, column in enumerate(replay.columns.tolist() if bool(replay.valid.any()) else ()):
            columns = self._earlier_text(event.layout, column, event.layout.length - 1).to(event.logits.device)
            rows = event.active & replay.valid[:, index] & columns.any(-1)
            away = cotangent(replay.logits[:, index], replay.targets[:, index], unit=self.norm != "none")
            (shares,) = self._shares(replay.gradients(index, away * rows[:, None]), rows, columns)
            state.count("extra_backwards", 1.0, rows)
            for row in rows.nonzero().flatten().tolist():
                history[row].append(float(shares[row].mean()))
        return history

    def _score(self, event: SelectToken, draw: Draw, place: Tensor, rows: Tensor) -> None:
        """Fill in S(c) for the candidate at ``place`` of the given rows: one backward for the whole batch."""
        if not bool(rows.any()):
            return
        if self.query_row == "candidate_legacy":
            # the loss does not depend on the attention row of the token it predicts: its gradient is exactly zero
            text = image = torch.zeros_like(draw.layer_saliency[:, 0])
        else:
            away = cotangent(event.logits, draw.at(place), unit=self.norm != "none") * rows[:, None]
            picture = event.layout.image_mask.to(rows.device)
            text, image = self._shares(event.attention_gradients(away), rows, draw.columns, picture)
            draw.backwards += rows * float(self.needs_gradient)
        at = rows.nonzero().flatten()
        draw.layer_saliency[at, place[at]] = text[at]
        draw.image_saliency[at, place[at]] = image[at]
        draw.saliency[at, place[at]] = text[at].mean(-1)

    def _shares(self, parts: dict[int, tuple[Tensor, Tensor]], rows: Tensor, *columns: Tensor) -> list[Tensor]:
        """Eq. 4-6 over each mask of columns: ``[B, l]`` per mask; a number that is none is an error."""
        found = layer_shares(parts.values(), columns, norm=self.norm, reduce=self.reduce)
        if not all(bool(share[rows].isfinite().all()) for share in found):
            raise HookError(f"{self.name}: a saliency is not a number; the model's logits or attention are not finite")
        return found

    @classmethod
    def identity(cls) -> Self:
        """Accept the most probable candidate: the tokens of greedy decoding."""
        return cls(alpha=0.0, proposal="greedy_order")

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return strict thresholds in both orders, the direct path and the control."""
        return [
            {"alpha": 9.0, "layers": "all", "proposal": "greedy_order", "history_init": "prompt_tail", "window": 3},
            {"alpha": 2.0, "reduce": "window_sum", "norm": "row_l1", "history_start": "generated", "max_resample": 2},
            {"alpha": 3.0, "gradient": "direct", "fallback": "argmax_logp_plus_eta_log_s", "eta": 0.1, "exempt": "eos"},
            {"query_row": "candidate_legacy", "temperature": 1.5, "skip_above": 0.3, "on_skip": "proposal", "top_k": 3},
            {"include_diagonal": False, "gate_on": "content", "window_rule": "w_plus_1", "history_on_fallback": "skip"},
        ]
