"""SGRS by brute force: full-sequence gradients with respect to every attention matrix, one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from . import naive_locore
from .tiny import full_forward, strip

Draws = Callable[[int, int], float]


def normalise(row: torch.Tensor, norm: str) -> torch.Tensor:
    """Eq. 5 on one row of head-summed |A * G|, with the row's L2 norm or one of the alternatives."""
    if norm == "none":
        return row
    denominator = {"row_l2": row.pow(2).sum().sqrt(), "row_l1": row.sum(), "row_max": row.max()}[norm]
    return row / (denominator + torch.finfo(row.dtype).tiny)


def reduce_row(row: torch.Tensor, columns: Sequence[int], reduce: str, window: int) -> float:
    """Inner part of Eq. 6: the mean over the output columns J, their sum, or the sum of the last ``window`` of J."""
    if reduce == "mean":
        return float(row[list(columns)].mean())
    if reduce == "sum":
        return float(row[list(columns)].sum())
    if reduce == "window_sum":
        return float(row[list(columns)[-window:]].sum())
    raise ValueError(f"unknown reduce {reduce!r}")


def score_rows(
    products: Sequence[torch.Tensor], columns: Sequence[int], *, norm: str, reduce: str, window: int
) -> float:
    """Eq. 4-6 from A * G of each target layer on one query row, ``[H, K]`` per layer; mean over layers."""
    values = [reduce_row(normalise(p.abs().sum(0), norm), columns, reduce, window) for p in products]
    if any(value != value for value in values):
        raise ValueError("a saliency is not a number")
    return sum(values) / len(values)


def output_columns(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    prompt_len: int,
    history_start: str,
    include_diagonal: bool,
) -> list[int]:
    """J of Eq. 6 for the last row q*: S0 <= j <= q*, or j < q* without the diagonal."""
    start = naive_locore.output_start(model, input_ids, prompt_len, history_start)
    return list(range(start, input_ids.shape[1] - (0 if include_diagonal else 1)))


def products(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    candidate: int,
    *,
    layers: Sequence[int],
    row: int = -1,
    loss_row: int = -1,
    locore: dict[str, Any] | None = None,
    prompt_len: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """A * dl/dA of every target layer on query row ``row``, ``[H, T]`` each (Eq. 2-4 before the absolute value).

    l(c) = -log softmax(y[loss_row])_c. A is the matrix that multiplies the values, after LocoRE if it is active.
    """
    extra: dict[str, Any] = {}
    if locore is not None:
        extra = dict(naive_locore.edits(model, input_ids, prompt_len=prompt_len or input_ids.shape[1], **locore))
    out = full_forward(model, input_ids, pixel_values, collect=True, leaves=True, dtype=dtype, **extra)
    loss = -torch.log_softmax(out.logits[loss_row], dim=-1)[candidate]
    wanted = [out.probs[layer] for layer in layers]
    gradients = torch.autograd.grad(loss, wanted)
    return [(a * g).tril()[:, row].detach() for a, g in zip(wanted, gradients, strict=True)]


def saliency(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    candidate_ids: Sequence[int],
    *,
    layers: Sequence[int],
    locore: dict[str, Any] | None = None,
    prompt_len: int | None = None,
    history_start: str = "after_image",
    include_diagonal: bool = True,
    norm: str = "row_l2",
    reduce: str = "mean",
    window: int = 5,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """S(c) of Eq. 2-6 for each candidate of the token after the unpadded ``input_ids`` ``[1, T]``.

    ``prompt_len`` (default: all of it) separates prompt from generated tokens. ``locore`` holds the settings of
    :func:`naive_locore.edits` other than ``prompt_len``. ``window`` is only used by ``reduce="window_sum"``.
    """
    prompt_len = prompt_len or input_ids.shape[1]
    columns = output_columns(model, input_ids, prompt_len, history_start, include_diagonal)
    if not columns:
        raise ValueError("the saliency of a candidate is not defined without an output column")
    scores = []
    for candidate in candidate_ids:
        parts = products(
            model, input_ids, pixel_values, candidate, layers=layers, locore=locore, prompt_len=prompt_len, dtype=dtype
        )
        scores.append(score_rows(parts, columns, norm=norm, reduce=reduce, window=window))
    return scores


def pick(probabilities: Sequence[float], u: float) -> int:
    """Index chosen by u in [0, 1) from the inverse cumulative distribution of the renormalised probabilities."""
    total, running = sum(probabilities), 0.0
    for index, probability in enumerate(probabilities):
        running += probability / total
        if u < running:
            return index
    return len(probabilities) - 1


def threshold(history: Sequence[float], alpha: float, window: int) -> float:
    """tau: alpha times the mean of the last ``window`` accepted scores, zero without any."""
    last = list(history)[-window:]
    return alpha * sum(last) / len(last) if last else 0.0


def generate(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    alpha: float,
    top_k: int,
    max_resample: int,
    window: int,
    layers: Sequence[int],
    proposal: str = "sample",
    draws: Draws | None = None,
    history_start: str = "after_image",
    include_diagonal: bool = True,
    norm: str = "row_l2",
    reduce: str = "mean",
    history_on_fallback: bool = True,
    on_skip: str = "base",
    max_new_tokens: int,
    eos: Collection[int] = (),
    locore: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Algorithm 1; returns the new tokens and one record per step.

    Candidates are the ``top_k`` tokens in descending probability. ``draws(step, draw_index)`` supplies the uniform
    numbers of ``proposal="sample"``; ``greedy_order`` tries the candidates in order. Record: ``candidates``, ``p``
    (full-vocabulary probabilities), ``S`` (token -> score, scored ones only, in order of scoring), ``tau``,
    ``rejected``, ``fallback``, ``J`` (unpadded positions), ``token``, ``skipped``, ``history`` (after the step),
    ``logits`` (raw, ``[V]``).
    """
    if proposal == "sample" and draws is None:
        raise ValueError("proposal 'sample' needs draws")
    ids = strip(input_ids, attention_mask)
    prompt_len = ids.shape[1]
    history: list[float] = []
    tokens: list[int] = []
    trace: list[dict[str, Any]] = []

    for step in range(max_new_tokens):
        extra: dict[str, Any] = {}
        if locore is not None:
            extra = dict(naive_locore.edits(model, ids, prompt_len=prompt_len, **locore))
        logits = full_forward(model, ids, pixel_values, dtype=dtype, **extra).logits[-1]
        order = torch.argsort(logits, descending=True, stable=True)[:top_k]
        probability = dict(zip(order.tolist(), torch.softmax(logits, -1)[order].tolist(), strict=True))
        candidates = list(probability)
        columns = output_columns(model, ids, prompt_len, history_start, include_diagonal)
        tau = threshold(history, alpha, window)
        scores: dict[int, float] = {}
        rejected: list[int] = []
        token: int | None = None
        fallback = False

        def propose(remaining: list[int], draw: int, step: int = step, p: dict[int, float] = probability) -> int:
            if proposal == "greedy_order":
                return remaining[0]
            assert draws is not None
            return remaining[pick([p[c] for c in remaining], draws(step, draw))]

        def score(
            candidate: int, ids: torch.Tensor = ids, columns: list[int] = columns, scores: dict[int, float] = scores
        ) -> float:
            parts = products(
                model, ids, pixel_values, candidate, layers=layers, locore=locore, prompt_len=prompt_len, dtype=dtype
            )
            scores[candidate] = score_rows(parts, columns, norm=norm, reduce=reduce, window=window)
            return scores[candidate]

        if not columns:
            token = candidates[0] if on_skip == "base" else propose(candidates, 0)
        else:
            remaining = list(candidates)
            for draw in range(max_resample):
                if not remaining:
                    break
                candidate = propose(remaining, draw)
                if score(candidate) >= tau:
                    token = candidate
                    history.append(scores[token])
                    break
                rejected.append(candidate)
                remaining.remove(candidate)
            if token is None:
                fallback = True
                for candidate in candidates:
                    if candidate not in scores:
                        score(candidate)
                token = max(candidates, key=scores.__getitem__)  # ties: the more probable one
                if history_on_fallback:
                    history.append(scores[token])
        tokens.append(token)
        trace.append(
            {
                "candidates": candidates,
                "p": [probability[c] for c in candidates],
                "S": scores,
                "tau": tau,
                "rejected": rejected,
                "fallback": fallback,
                "J": columns,
                "token": token,
                "skipped": not columns,
                "history": list(history),
                "logits": logits,
            }
        )
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, trace
