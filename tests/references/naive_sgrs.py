"""SGRS by brute force: full-sequence gradients with respect to every attention matrix, one candidate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from . import naive_locore
from .tiny import full_forward, merged_embeddings, strip

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


def direct_products(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    candidate: int,
    *,
    layers: Sequence[int],
    locore: dict[str, Any] | None = None,
    prompt_len: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """A * g of the last row with the gradient along the direct path only, ``[H, T]`` per target layer.

    One head's output reaches the logits through the output projection, the final norm (its scale held fixed) and the
    unembedding: g_j = w . W_O v_j, with w the norm's weight times U^T (softmax - e_c), over the scale. Nothing else of
    what lies between is differentiated.
    """
    extra: dict[str, Any] = {}
    if locore is not None:
        extra = dict(naive_locore.edits(model, input_ids, prompt_len=prompt_len or input_ids.shape[1], **locore))
    out = full_forward(model, input_ids, pixel_values, collect=True, dtype=dtype, **extra)
    decoder, text = model.model.language_model, model.config.text_config
    with torch.no_grad():
        inputs = [merged_embeddings(model, input_ids, pixel_values).to(out.logits.dtype), *out.hidden]

    def scale(x: torch.Tensor, norm: Any) -> torch.Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    cotangent = torch.softmax(out.logits[-1], -1)
    cotangent[candidate] -= 1
    stream = inputs[-1][-1]
    weight = decoder.norm.weight.to(stream.dtype) * scale(stream, decoder.norm)
    w = weight * (cotangent @ model.lm_head.weight.to(stream.dtype))
    groups = text.num_attention_heads // text.num_key_value_heads
    found = []
    for layer in layers:
        block = decoder.layers[layer]
        normed = (
            block.input_layernorm.weight.to(stream.dtype) * inputs[layer] * scale(inputs[layer], block.input_layernorm)
        )
        values = normed @ block.self_attn.v_proj.weight.to(stream.dtype).T
        width = values.shape[1] // text.num_key_value_heads
        out_proj = block.self_attn.o_proj.weight.to(stream.dtype)
        gradient = torch.zeros_like(out.probs[layer][:, -1])
        for head in range(text.num_attention_heads):
            kv = head // groups
            for j in range(gradient.shape[1]):
                moved = out_proj[:, head * width : (head + 1) * width] @ values[j, kv * width : (kv + 1) * width]
                gradient[head, j] = w @ moved
        found.append(out.probs[layer][:, -1] * gradient)
    return found


def official_scores(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    candidates: Sequence[int],
    *,
    layers: Sequence[int],
    start: int,
) -> list[list[float]]:
    """Scores per candidate and layer by the official code's procedure: the candidate's own row.

    The candidate is appended, the loss is that of the logits before it (``logits[:, -2]``), and the saliency is read
    in the last row of the longer sequence (T - 1): head mean, row norm clamped at 1e-9, mean over [start, T - 1).
    """
    found = []
    for candidate in candidates:
        longer = torch.cat([input_ids, torch.tensor([[candidate]])], dim=1)
        last = longer.shape[1] - 1
        parts = products(model, longer, pixel_values, candidate, layers=layers, row=last, loss_row=-2)
        rows = [part.abs().mean(0) for part in parts]
        found.append([float((row / row.norm().clamp(min=1e-9))[start:last].mean()) for row in rows])
    return found


def pick(probabilities: Sequence[float], u: float, temperature: float = 1.0) -> int:
    """Index chosen by u in [0, 1) from the inverse cumulative distribution of the renormalised probabilities."""
    largest = max(probabilities)
    weights = [(p / largest) ** (1 / temperature) for p in probabilities]
    total, running = sum(weights), 0.0
    for index, weight in enumerate(weights):
        running += weight / total
        if u < running:
            return index
    return len(weights) - 1


def threshold(history: Sequence[float], alpha: float, window: int, window_rule: str = "last_w") -> float:
    """tau: alpha times the mean of the last ``window`` accepted scores (or one more), zero without any."""
    last = list(history)[-(window + {"last_w": 0, "w_plus_1": 1}[window_rule]) :]
    return alpha * sum(last) / len(last) if last else 0.0


def prompt_tail(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    rows: int,
    *,
    include_diagonal: bool = True,
    **settings: Any,
) -> list[float]:
    """Teacher-forced scores of the last ``rows`` prompt tokens, oldest first; only text after the image is scored."""
    length = input_ids.shape[1]
    start = naive_locore.output_start(model, input_ids, length, "after_image")
    found: list[float] = []
    for row in range(max(length - 1 - rows, start), length - 1):
        seen = input_ids[:, : row + 1]
        if not output_columns(model, seen, length, "after_image", include_diagonal):
            continue
        target = int(input_ids[0, row + 1])
        found += saliency(model, seen, pixel_values, [target], include_diagonal=include_diagonal, **settings)
    return found


@dataclass
class Step:
    """One step of Algorithm 1: ``S`` in order of scoring, ``J`` unpadded positions, ``history`` after the step."""

    candidates: list[int]
    p: list[float]
    J: list[int]
    tau: float
    logits: torch.Tensor
    S: dict[int, float] = field(default_factory=dict)
    image: dict[int, float] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)
    fallback: bool = False
    skipped: bool = False
    confident: bool = False
    exempted: bool = False
    token: int = -1
    history: list[float] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


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
    window_rule: str = "last_w",
    proposal: str = "sample",
    temperature: float = 1.0,
    draws: Draws | None = None,
    history_start: str = "after_image",
    history_init: str = "empty",
    include_diagonal: bool = True,
    norm: str = "row_l2",
    reduce: str = "mean",
    history_on_fallback: str | bool = "append",
    fallback: str = "argmax_saliency",
    eta: float = 1.0,
    on_skip: str = "base",
    skip_above: float = 1.0,
    free: Collection[int] = (),
    gradient: str = "exact",
    max_new_tokens: int,
    eos: Collection[int] = (),
    locore: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[int], list[Step]]:
    """Algorithm 1; returns the new tokens and one record per step.

    Candidates are the ``top_k`` tokens in descending probability. ``draws(step, draw_index)`` supplies the uniform
    numbers of ``proposal="sample"``; ``greedy_order`` tries the candidates in order. Tokens in ``free`` are accepted
    without a score when they are drawn. A step whose top probability exceeds ``skip_above`` is left to ``on_skip``.
    """
    if proposal == "sample" and draws is None:
        raise ValueError("proposal 'sample' needs draws")
    ids = strip(input_ids, attention_mask)
    prompt_len = ids.shape[1]
    marks = (ids[0] == model.config.image_token_id).nonzero().flatten().tolist()
    scoring: dict[str, Any] = {"norm": norm, "reduce": reduce, "window": window}
    history: list[float] = []
    if history_init == "prompt_tail" and history_start == "after_image":
        rows = window + (window_rule == "w_plus_1")
        tail = {"include_diagonal": include_diagonal, "layers": layers, "dtype": dtype, **scoring}
        history = prompt_tail(model, ids, pixel_values, rows, **tail)
    trace: list[Step] = []

    for number in range(max_new_tokens):
        extra: dict[str, Any] = {}
        if locore is not None:
            extra = dict(naive_locore.edits(model, ids, prompt_len=prompt_len, **locore))
        logits = full_forward(model, ids, pixel_values, dtype=dtype, **extra).logits[-1]
        order = torch.argsort(logits, descending=True, stable=True)[:top_k]
        probability = dict(zip(order.tolist(), torch.softmax(logits, -1)[order].tolist(), strict=True))
        candidates = list(probability)
        step = Step(
            candidates=candidates,
            p=[probability[c] for c in candidates],
            J=output_columns(model, ids, prompt_len, history_start, include_diagonal),
            tau=threshold(history, alpha, window, window_rule),
            logits=logits,
        )
        trace.append(step)

        def propose(remaining: list[int], draw: int, number: int = number, p: dict[int, float] = probability) -> int:
            if proposal == "greedy_order":
                return remaining[0]
            assert draws is not None
            return remaining[pick([p[c] for c in remaining], draws(number, draw), temperature)]

        def score(candidate: int, ids: torch.Tensor = ids, step: Step = step) -> float:
            how = products if gradient == "exact" else direct_products
            parts = how(
                model, ids, pixel_values, candidate, layers=layers, locore=locore, prompt_len=prompt_len, dtype=dtype
            )
            step.S[candidate] = score_rows(parts, step.J, **scoring)
            over = {**scoring, "reduce": "mean" if reduce == "mean" else "sum"}  # an image has no last few columns
            step.image[candidate] = score_rows(parts, marks, **over) if marks else 0.0
            return step.S[candidate]

        step.confident = bool(step.J) and step.p[0] > skip_above
        step.skipped = not step.J or step.confident
        if step.skipped:
            step.token = candidates[0] if on_skip == "base" else propose(candidates, 0)
        else:
            remaining = list(candidates)
            for draw in range(max_resample):
                if not remaining:
                    break
                candidate = propose(remaining, draw)
                if candidate in free:
                    step.token, step.exempted = candidate, True
                    break
                if score(candidate) >= step.tau:
                    step.token = candidate
                    history.append(step.S[candidate])
                    break
                step.rejected.append(candidate)
                remaining.remove(candidate)
            if step.token < 0:
                step.fallback = True
                for candidate in candidates:
                    if candidate not in step.S:
                        score(candidate)
                if fallback == "argmax_saliency":  # ties: the more probable one
                    step.token = max(candidates, key=step.S.__getitem__)
                else:
                    worth = {c: math.log(probability[c]) + eta * math.log(step.S[c]) for c in candidates}
                    step.token = max(candidates, key=worth.__getitem__)
                if history_on_fallback in ("append", True):
                    history.append(step.S[step.token])
        step.history = list(history)
        if step.token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[step.token]])], dim=1)
    return [step.token for step in trace], trace
