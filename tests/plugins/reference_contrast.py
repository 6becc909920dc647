"""PAI and VCD by brute force, from their equations: one sample, the whole sequence anew for every token, no cache.

Nothing of the library is used: the decoder is written out in ``tests/references/tiny.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.references.tiny import full_forward, image_spans, strip

Pixels = torch.Tensor | None
#: ids ``[1, T]`` and the prompt's length -> logits ``[V]`` to choose the next token from.
Scores = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass
class Generated:
    """What was generated: tokens, and per step the logits they were chosen from, ``[T, V]``."""

    tokens: list[int]
    logits: torch.Tensor


def decode(scores: Scores, ids: torch.Tensor, steps: int, eos: Collection[int], forced: Sequence[int]) -> Generated:
    """Feed the forced tokens, then choose greedily."""
    prompt, tokens, kept = ids.shape[1], [], []
    for step in range(steps):
        logits = scores(ids, prompt)
        token = forced[step] if step < len(forced) else int(logits.argmax())
        kept.append(logits)
        tokens.append(token)
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return Generated(tokens, torch.stack(kept))


def plausible(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Adaptive plausibility: probability at least ``share`` times the largest one."""
    p = logits.softmax(-1)
    return p >= share * p.max()


def cut(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Minus infinity for what is not kept."""
    return torch.tensor([float(value) if keep else -math.inf for value, keep in zip(logits, kept, strict=True)])


# ------------------------------------------------------------------------------------------------------------------ PAI


def image_last_rows(
    columns: Collection[int], prompt: int, layers: Collection[int], alpha: float, rows: str
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Edit of the scores ``[H, T, T]``, entry by entry: s + alpha |s| at picture keys of the chosen rows."""

    def edit(layer: int, z: torch.Tensor) -> torch.Tensor:
        if layer not in layers or not columns:
            return z
        z = z.clone()
        first = {"predicting": prompt - 1, "after_image": max(columns) + 1}[rows]
        for row in range(first, z.shape[1]):
            for key in columns:
                if key <= row:
                    z[:, row, key] = z[:, row, key] + alpha * z[:, row, key].abs()
        return z

    return edit


def pai(
    model: Any,
    input_ids: torch.Tensor,
    pixel_values: Pixels,
    attention_mask: torch.Tensor | None = None,
    *,
    alpha: float = 0.2,
    gamma: float = 1.1,
    cut_off: float = 0.1,
    layers: Collection[int] = range(2, 6),
    rows: str = "predicting",
    guidance_on: str = "log_probs",
    cut_off_from: str = "image",
    steps: int,
    eos: Collection[int] = (),
    forced: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Generated:
    """Generate with PAI."""
    ids = strip(input_ids, attention_mask)
    n_images = 0 if pixel_values is None else len(pixel_values)
    columns = {column for span in image_spans(model, ids, n_images) for column in span}

    def scores(ids: torch.Tensor, prompt: int) -> torch.Tensor:
        edit = image_last_rows(columns, prompt, layers, alpha, rows)
        with_image = full_forward(model, ids, pixel_values, scores_edit=edit, dtype=dtype).logits[-1]
        if not columns:
            return with_image
        if gamma == 1:
            return cut(with_image, plausible(with_image, cut_off))
        words = ids[:, [t for t in range(ids.shape[1]) if t not in columns]]
        alone = full_forward(model, words, None, dtype=dtype).logits[-1]
        if guidance_on == "probs":
            mixed = gamma * with_image.softmax(-1) - (gamma - 1) * alone.softmax(-1)
            guided = torch.tensor([math.log(p) if p > 0 else -math.inf for p in mixed.tolist()]).to(with_image)
        elif guidance_on == "log_probs":
            guided = gamma * with_image.log_softmax(-1) - (gamma - 1) * alone.log_softmax(-1)
        else:
            guided = gamma * with_image - (gamma - 1) * alone
        return cut(guided, plausible(with_image if cut_off_from == "image" else guided, cut_off))

    return decode(scores, ids, steps, eos, forced)


# ------------------------------------------------------------------------------------------------------------------ VCD


def row_generator(seed: int, name: str) -> torch.Generator:
    """The library's documented promise: a sample's draws depend on the seed and its name."""
    digest = hashlib.sha256(f"{seed}:{name}:0".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def diffuse(pixels: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
    """Share of the picture and of the noise after ``step + 1`` steps of the diffusion process, in double precision."""
    t = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    betas = torch.sigmoid(t) * (5e-3 - 1e-5) + 1e-5
    left = torch.cumprod(1 - betas, 0)[step]
    mixed: torch.Tensor = left.sqrt() * pixels.double() + (1 - left).sqrt() * noise.double()
    return mixed.to(pixels.dtype)


def vcd(
    model: Any,
    input_ids: torch.Tensor,
    pixel_values: Pixels,
    attention_mask: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    noise_step: int = 500,
    cut_off_from: str = "clean",
    seed: int = 0,
    name: str = "0",
    steps: int,
    eos: Collection[int] = (),
    forced: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Generated:
    """Generate with VCD; every picture of the sample gets the next numbers of the sample's generator."""
    ids = strip(input_ids, attention_mask)
    noised: Pixels = None
    if pixel_values is not None:
        generator = row_generator(seed, name)
        noise = [torch.randn(picture.shape, generator=generator) for picture in pixel_values]
        noised = diffuse(pixel_values, torch.stack(noise), noise_step)

    def scores(ids: torch.Tensor, prompt: int) -> torch.Tensor:
        clean = full_forward(model, ids, pixel_values, dtype=dtype).logits[-1]
        if noised is None:
            return clean
        blurred = full_forward(model, ids, noised, dtype=dtype).logits[-1]
        contrast = (1 + alpha) * clean - alpha * blurred
        return cut(contrast, plausible(clean if cut_off_from == "clean" else contrast, beta))

    return decode(scores, ids, steps, eos, forced)
