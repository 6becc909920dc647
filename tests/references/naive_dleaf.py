"""D-LEAF (reconstruction) by brute force: loops over layers, rows, heads and keys of full-sequence forwards.

One sample at a time, without a cache. Every row to be edited has its own threshold, learned from the layers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev

import torch
from transformers import LlavaForConditionalGeneration

from .tiny import Edit, full_forward, image_spans, strip

Row = list[float]
"""One head's weights (or scores) of one query row, over the keys it may see."""


@dataclass(frozen=True)
class Settings:
    """Every open question of the reconstruction; the defaults are the project's reading."""

    gamma: float = 0.8
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
    heads: str = "abnormal"


# ------------------------------------------------------------------------------------------------- entropy of one layer


def shannon(weights: Sequence[float], renormalise: bool) -> float:
    """-sum p ln p; with ``renormalise`` of the weights divided by their sum, or ln n when that is zero."""
    if renormalise:
        mass = sum(weights)
        weights = [w / mass for w in weights] if mass > 0 else [1 / len(weights)] * len(weights)
    return -sum(w * math.log(w) for w in weights if w > 0)


def layer_entropy(heads: Sequence[Row], keys: Sequence[int], pool: str, renormalise: bool) -> float:
    """LIAE of one row: one number for all heads of a layer."""
    on_image = [[head[j] for j in keys] for head in heads]
    if pool == "mean_of_entropies":
        return fmean(shannon(head, renormalise) for head in on_image)
    if pool == "max":
        pooled = [max(column) for column in zip(*on_image, strict=True)]
    elif pool == "renorm_mean":
        shares = []
        for head in on_image:
            mass = sum(head)
            shares.append([w / mass for w in head] if mass > 0 else [1 / len(keys)] * len(keys))
        pooled = [fmean(column) for column in zip(*shares, strict=True)]
    elif pool == "mass_mean":
        pooled = [fmean(column) for column in zip(*on_image, strict=True)]
    else:
        raise ValueError(f"unknown pool_heads {pool!r}")
    return shannon(pooled, renormalise)


def entropy_of(heads: Sequence[Row], images: Sequence[Sequence[int]], s: Settings) -> float:
    """LIAE of one row, in the units of the settings; ``images`` are the keys of each visible picture."""
    sets = [[j for image in images for j in image]] if s.multi_image == "union" else images
    value = fmean(layer_entropy(heads, keys, s.pool_heads, s.renormalise_image) for keys in sets)
    if s.entropy_scale == "nats":
        return value
    largest = fmean(math.log(len(keys)) for keys in sets)
    return value / largest if largest > 0 else value


def without_sinks(heads: Sequence[Row], images: Sequence[Sequence[int]], sink_std: float) -> list[list[int]]:
    """Drop patches whose mean weight over heads is far above that of all patches."""
    mean = {j: fmean(head[j] for head in heads) for image in images for j in image}
    limit = fmean(mean.values()) + sink_std * pstdev(mean.values())
    kept = [[j for j in image if mean[j] <= limit] for image in images]
    return [image for image in kept if image]


# ----------------------------------------------------------------------------------------------------------- thresholds


def exceeds(entropy: float, earlier: Sequence[float], s: Settings) -> bool:
    """Whether a layer is flagged, given the entropies learned from the layers before it."""
    if not earlier and s.first_layer == "initialise":
        return False
    if s.threshold == "fixed":
        assert s.fixed_threshold is not None
        return entropy > s.fixed_threshold + s.delta
    if not earlier:
        return True
    if s.threshold == "bas_min":
        level = min(earlier)
    elif s.threshold == "running_mean":
        level = fmean(earlier)
    elif s.threshold == "mean_plus_kstd":
        level = fmean(earlier) + s.k_std * pstdev(earlier)
    elif s.threshold == "ema":
        level = earlier[0]
        for value in earlier[1:]:
            level = s.ema_decay * level + (1 - s.ema_decay) * value
    else:
        raise ValueError(f"unknown threshold {s.threshold!r}")
    return entropy > level + s.delta


# ------------------------------------------------------------------------------------------------------- heads of a row


def low_heads(focus: Sequence[float], s: Settings) -> list[int]:
    """Heads to be mixed; never the one with most focus (the first of equals)."""
    heads = range(len(focus))
    if s.heads == "all":
        low = list(heads)
    elif s.abnormal_heads == "below_mean":
        low = [h for h in heads if focus[h] < fmean(focus)]
    elif s.abnormal_heads == "below_median":
        low = [h for h in heads if focus[h] < median(focus)]
    elif s.abnormal_heads == "ratio_of_best":
        low = [h for h in heads if focus[h] < s.best_ratio * max(focus)]
    elif s.abnormal_heads == "bottom_k":
        low = sorted(heads, key=lambda h: focus[h])[: s.bottom_k]
    else:
        raise ValueError(f"unknown abnormal_heads {s.abnormal_heads!r}")
    return [h for h in low if h != list(focus).index(max(focus))]


def reference_row(matrix: Sequence[Row], focus: Sequence[float], s: Settings) -> tuple[Row, float]:
    """Row to mix with, and its focus."""
    heads = range(len(focus))
    if s.reference == "argmax_iaf":
        share = {max(heads, key=lambda h: focus[h]): 1.0}
    elif s.reference == "topk_mean":
        best = sorted(heads, key=lambda h: -focus[h])[: s.top_k]
        share = {h: 1 / len(best) for h in best}
    elif s.reference == "iaf_weighted":
        total = sum(focus)
        share = {h: focus[h] / total if total > 0 else 1 / len(focus) for h in heads}
    else:
        raise ValueError(f"unknown reference {s.reference!r}")
    row = [sum(share[h] * matrix[h][j] for h in share) for j in range(len(matrix[0]))]
    return row, sum(share[h] * focus[h] for h in share)


def mix(head: Row, reference: Row, patches: Collection[int], s: Settings) -> Row:
    """(1 - gamma) A[h] + gamma A[r], over the whole row or the picture's keys (the row's sum is kept)."""
    mixed = [(1 - s.gamma) * a + s.gamma * r for a, r in zip(head, reference, strict=True)]
    if s.mix_scope == "row":
        return mixed
    mixed = [mixed[j] if j in patches else head[j] for j in range(len(head))]
    if s.mix_stage == "pre":
        return mixed
    return [w * sum(head) / sum(mixed) for w in mixed]


def softmax(row: Row) -> Row:
    """Softmax of one row of scores."""
    top = max(row)
    weights = [math.exp(z - top) for z in row]
    return [w / sum(weights) for w in weights]


# ---------------------------------------------------------------------------------------------------------- one forward


@dataclass
class Climb:
    """What one query row has seen on its way up through the layers."""

    entropies: list[float]
    best: tuple[Row, float] | None = None


@dataclass
class Sweep:
    """One forward over a whole sequence; ``flags`` are the (layer, row) pairs that were corrected."""

    settings: Settings
    images: Sequence[Sequence[int]]
    climbs: dict[int, Climb]
    draws: Callable[[int, int], bool] | None
    flags: set[tuple[int, int]] = field(default_factory=set)
    diagnosed: set[tuple[int, int]] = field(default_factory=set)
    scores: torch.Tensor | None = None

    def correct(self, layer: int, matrix: torch.Tensor) -> torch.Tensor:
        """Edit weights, or scores with ``mix_stage="pre"``, ``[H, T, T]``, row by row."""
        out = matrix.clone()
        for row in self.climbs:
            heads = matrix[:, row, : row + 1].tolist()
            for head, new in enumerate(self.row(layer, row, heads)):
                if new != heads[head]:
                    out[head, row, : row + 1] = torch.tensor(new, dtype=matrix.dtype)
        return out

    def row(self, layer: int, row: int, matrix: list[Row]) -> list[Row]:
        """Diagnose and correct one row: ``matrix`` holds one list per head."""
        s, climb = self.settings, self.climbs[row]
        images = [[j for j in image if j <= row] for image in self.images]
        images = [image for image in images if image]
        if not images:
            return matrix
        self.diagnosed.add((layer, row))
        patches = {j for image in images for j in image}
        weights = [softmax(head) for head in matrix] if s.mix_stage == "pre" else matrix
        if s.exclude_image_sinks == "outliers":
            images = without_sinks(weights, images, s.sink_std)
        entropy = entropy_of(weights, images, s)
        judged = weights
        if s.diagnosis_weights == "pre_softmax":
            assert self.scores is not None
            judged = [[abs(z) for z in head] for head in self.scores[:, row, : row + 1].tolist()]
        focus = [sum(head[j] for image in images for j in image) for head in judged]
        reference = reference_row(matrix, focus, s)
        if s.reference_scope == "earlier" and climb.best is not None and climb.best[1] >= reference[1]:
            reference = climb.best
        climb.best = reference
        flagged = exceeds(entropy, climb.entropies, s) if s.gate == "threshold" else s.gate == "always"
        if s.gate == "random":
            assert self.draws is not None
            flagged = self.draws(layer, row)
        new = list(matrix)
        if flagged:
            self.flags.add((layer, row))
            for head in low_heads(focus, s):
                new[head] = mix(matrix[head], reference[0], patches, s)
        if s.state_update == "post":
            entropy = entropy_of([softmax(head) for head in new] if s.mix_stage == "pre" else new, images, s)
        climb.entropies.append(entropy)
        return new

    def scores_edit(self, layers: Collection[int]) -> Edit:
        """Keep the scores; edit them where mixing comes before softmax."""

        def edit(layer: int, scores: torch.Tensor) -> torch.Tensor:
            self.scores = scores
            return self.correct(layer, scores) if layer in layers and self.settings.mix_stage == "pre" else scores

        return edit

    def probs_edit(self, layers: Collection[int]) -> Edit:
        """Edit the weights where mixing comes after softmax."""

        def edit(layer: int, probs: torch.Tensor) -> torch.Tensor:
            return self.correct(layer, probs) if layer in layers and self.settings.mix_stage == "post" else probs

        return edit


def rows_of(ids: torch.Tensor, image_token: int, prompt_len: int, s: Settings) -> list[int]:
    """Query rows to be edited in a sequence ``[1, T]``."""
    length = ids.shape[1]
    placeholders = [t for t in range(length) if int(ids[0, t]) == image_token]
    if s.rows == "last":
        rows = list(range(prompt_len - 1, length))
    elif s.rows == "all_generated":
        rows = list(range(prompt_len, length))
    elif s.rows == "all_text":
        rows = [t for t in range(length) if t not in placeholders and any(p < t for p in placeholders)]
    else:
        raise ValueError(f"unknown rows {s.rows!r}")
    return [t for t in rows if t >= prompt_len] if s.prefill == "none" else rows


def logits(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    forced: Sequence[int],
    settings: Settings,
    layers: Sequence[int] = range(6),
    images: Sequence[Sequence[int]] | None = None,
    draws: Callable[[int, int], bool] | None = None,
) -> tuple[torch.Tensor, Sweep]:
    """Raw logits ``[T_new, V]`` that choose the tokens ``forced`` one after the other, and the last forward's notes.

    ``images`` are the patch positions of every picture in the unpadded prompt (the model's own raster by default);
    ``draws(layer, row)`` decides for the random gate.
    """
    prompt = strip(input_ids, attention_mask)
    length = prompt.shape[1]
    if images is None:
        images = image_spans(model, prompt, 0 if pixel_values is None else len(pixel_values))
    history: dict[int, list[float]] = {}
    steps: list[torch.Tensor] = []
    # a threshold that lives through the sample needs every earlier forward, another one only the last
    sweep, first = None, 0 if settings.bas_scope == "sample" else len(forced) - 1
    for step in range(first, len(forced)):
        ids = torch.cat([prompt, torch.tensor([list(forced[:step])], dtype=prompt.dtype)], dim=1)
        rows = rows_of(ids, model.config.image_token_id, length, settings)
        climbs = {row: Climb(list(history.get(row - 1, [])) if row >= length else []) for row in rows}
        sweep = Sweep(settings, images, climbs, draws)
        out = full_forward(
            model,
            ids,
            pixel_values,
            scores_edit=sweep.scores_edit(layers),
            probs_edit=sweep.probs_edit(layers),
        )
        if settings.bas_scope == "sample":
            history = {row: list(climb.entropies) for row, climb in climbs.items()}
        steps.append(out.logits[-1])
        if step == len(forced) - 1 and settings.bas_scope == "forward":
            steps = list(out.logits[length - 1 :])
    assert sweep is not None
    return torch.stack(steps), sweep
