"""LocoRE by brute force: every row that predicts a generated token gets its own gain, in a full-sequence forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypedDict

import torch
from transformers import LlavaForConditionalGeneration

from .tiny import Edit, full_forward, strip

MODES = ("post_raw", "post_renorm", "logit_bias", "logit_scale")


class Edits(TypedDict):
    """The two attention callbacks of :func:`full_forward`."""

    scores_edit: Edit
    probs_edit: Edit


def output_start(
    model: LlavaForConditionalGeneration, input_ids: torch.Tensor, prompt_len: int, history_start: str
) -> int:
    """First key position that counts as output (S0): after the last image of the prompt, or after the prompt."""
    if history_start == "generated":
        return prompt_len
    if history_start != "after_image":
        raise ValueError(f"unknown history_start {history_start!r}")
    where: list[int] = (input_ids[0, :prompt_len] == model.config.image_token_id).nonzero().flatten().tolist()
    if not where:
        raise ValueError("after_image is not defined for a prompt without an image")
    return where[-1] + 1


def window_keys(row: int, start: int, window: int, include_self: bool = False) -> list[int]:
    """Keys j with start <= j < row and row - j <= window (Eq. 8, the query itself excluded unless asked for)."""
    return [j for j in range(start, row + 1) if row - j <= window and (include_self or j != row)]


def gain_matrix(
    length: int, prompt_len: int, start: int, beta: float, window: int, include_self: bool = False
) -> torch.Tensor:
    """Gain gamma ``[T, T]`` (Eq. 9): 1 + beta on the window of every predictor row, one elsewhere."""
    gamma = torch.ones(length, length, dtype=torch.float64)
    for row in range(prompt_len - 1, length):
        for j in window_keys(row, start, window, include_self):
            gamma[row, j] = 1 + beta
    return gamma


def apply_scores(scores: torch.Tensor, gamma: torch.Tensor, mode: str) -> torch.Tensor:
    """Pre-softmax modes: add log gamma, or multiply by gamma, only where gamma differs from one."""
    gamma = gamma.to(scores.dtype)
    if mode == "logit_bias":
        return torch.where(gamma != 1, scores + torch.log(gamma), scores)
    if mode == "logit_scale":
        return torch.where(gamma != 1, scores * gamma, scores)
    return scores


def apply_probs(probs: torch.Tensor, gamma: torch.Tensor, mode: str) -> torch.Tensor:
    """Post-softmax modes (Eq. 10): A * gamma as it stands, or divided by its row sum."""
    if mode not in ("post_raw", "post_renorm"):
        return probs
    gamma = gamma.to(probs.dtype)
    gained = probs * gamma
    if mode == "post_raw":
        return gained
    touched = (gamma != 1).any(-1, keepdim=True)
    return torch.where(touched, gained / gained.sum(-1, keepdim=True), probs)


def edits(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    *,
    prompt_len: int,
    beta: float,
    window: int,
    mode: str,
    layers: Sequence[int] | None,
    history_start: str,
    include_self: bool = False,
    decay_r: float = 1.0,
) -> Edits:
    """Callbacks for :func:`full_forward` on this (prompt + generated) sequence; ``layers=None`` means all.

    ``decay_r`` below one stands in for beta as r - 1.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}")
    start = output_start(model, input_ids, prompt_len, history_start)
    beta = beta if decay_r == 1 else decay_r - 1
    gamma = gain_matrix(input_ids.shape[1], prompt_len, start, beta, window, include_self)

    def on(layer: int) -> bool:
        return layers is None or layer in layers

    return {
        "scores_edit": lambda layer, z: apply_scores(z, gamma, mode) if on(layer) else z,
        "probs_edit": lambda layer, a: apply_probs(a, gamma, mode) if on(layer) else a,
    }


def generate(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    beta: float,
    window: int,
    mode: str,
    layers: Sequence[int] | None = None,
    history_start: str = "after_image",
    include_self: bool = False,
    decay_r: float = 1.0,
    max_new_tokens: int,
    eos: Collection[int] = (),
    forced: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding with Algorithm 2; returns the new tokens and the raw logits ``[T_new, V]`` that chose them.

    ``forced`` feeds these tokens instead of the argmax (teacher forcing).
    """
    ids = strip(input_ids, attention_mask)
    settings: dict[str, Any] = {
        "prompt_len": ids.shape[1],
        "beta": beta,
        "window": window,
        "mode": mode,
        "layers": layers,
        "history_start": history_start,
        "include_self": include_self,
        "decay_r": decay_r,
    }
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        out = full_forward(model, ids, pixel_values, dtype=dtype, **edits(model, ids, **settings))
        steps.append(out.logits[-1])
        token = int(out.logits[-1].argmax()) if forced is None else forced[step]
        tokens.append(token)
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, torch.stack(steps)
