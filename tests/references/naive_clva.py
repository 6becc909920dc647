"""CLVA's reading of the abstract by brute force: one sample, the full sequence, loops over layers, heads, rows, tokens.

Every row that predicts a token gets its own anchors from the layers below, in a forward without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from .tiny import Forward, full_forward, strip

#: Columns of every image's patches, the image's number, and its grid.
Span = tuple[list[int], int, tuple[int, int] | None]


@dataclass
class Settings:
    """Parameters, named as in the method; windows are layer lists."""

    early: Sequence[int] = (0,)
    mid: Sequence[int] = (2, 3)
    deep: Sequence[int] = (4, 5)
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


@dataclass
class Anchored:
    """What a row knows about one group of image tokens; lists run over ``columns``."""

    columns: list[int]
    noise: list[float]
    middle: list[float]
    anchors: list[float]
    penalty: list[float]


# --------------------------------------------------------------------------------------------- numbers on short lists


def normalised(values: Sequence[float]) -> list[float]:
    """Divide by the sum; zeros stay."""
    total = sum(values)
    return [value / total if total > 0 else 0.0 for value in values]


def to_one(values: Sequence[float]) -> list[float]:
    """Divide by the maximum; zeros stay."""
    largest = max(values)
    return [value / largest if largest > 0 else 0.0 for value in values]


def overlap(left: Sequence[float], right: Sequence[float]) -> float:
    """Bhattacharyya coefficient."""
    return sum(math.sqrt(p * q) for p, q in zip(left, right, strict=True))


def best(values: Sequence[float], count: int) -> set[int]:
    """Places of the largest values, the first among equals."""
    return set(sorted(range(len(values)), key=lambda place: -values[place])[:count])


def anchored(
    settings: Settings, columns: list[int], noise: list[float], middle: list[float], rise: list[float]
) -> Anchored:
    """s and nu from n, m and d."""
    count = len(columns)
    score = [max(m - settings.gamma * n, 0.0) for m, n in zip(middle, noise, strict=True)]
    if settings.mode == "dynamics":
        score = rise
    elif settings.mode == "product":
        score = [s * d for s, d in zip(score, rise, strict=True)]
    if settings.anchor_unit == "tokens":
        kept = best(score, max(round(settings.rho * count), settings.min_anchors))
        score = [value if place in kept else 0.0 for place, value in enumerate(score)]
    anchors = to_one(score)
    penalty = to_one([max(n - m, 0.0) for m, n in zip(middle, noise, strict=True)])
    if settings.shared_tokens == "keep":
        penalty = [0.0 if s > 0 else nu for s, nu in zip(anchors, penalty, strict=True)]
    return Anchored(columns, noise, middle, anchors, penalty)


def drift(deep: Sequence[float], noise: Sequence[float], middle: Sequence[float]) -> float:
    """Gate: the ratio of overlaps, stretched so that it is 0 at the middle map and 1 at the noise map."""
    ratio = overlap(deep, noise) / (overlap(deep, noise) + overlap(deep, middle))
    near, far = (overlap(here, noise) / (overlap(here, noise) + overlap(here, middle)) for here in (middle, noise))
    if abs(1 - overlap(noise, middle)) < 1e-6:
        return 0.5
    return min(max((ratio - near) / (far - near), 0.0), 1.0)


def score_step(settings: Settings, scores: Sequence[float], known: Anchored) -> list[float]:
    """What one head's scores on the group's columns get at full strength."""
    count = len(known.columns)
    if settings.operator == "log_ratio":
        u = 1 / count
        raw = [
            settings.alpha * math.log((m + u) / (2 * u)) - settings.beta * math.log((n + u) / (2 * u))
            for m, n in zip(known.middle, known.noise, strict=True)
        ]
        return [min(max(value, -2.0), 2.0) for value in raw]
    unit = 1.0
    if settings.scale == "absmean":
        unit = sum(abs(z) for z in scores) / count
    elif settings.scale == "mad":
        median = sorted(scores)[(count - 1) // 2]
        unit = sorted(abs(z - median) for z in scores)[(count - 1) // 2]
    return [
        unit * (settings.alpha * s - settings.beta * nu) for s, nu in zip(known.anchors, known.penalty, strict=True)
    ]


def mixture(settings: Settings, share: Sequence[float], known: Anchored, gate: float) -> list[float]:
    """``prob_mix`` on one head's distribution over the group's columns."""
    damped = [p * (1 - settings.damp * gate * nu) for p, nu in zip(share, known.penalty, strict=True)]
    damped = normalised(damped) if sum(damped) > 0 else list(share)
    if sum(known.anchors) == 0:
        return damped
    r = settings.mix * gate
    return [(1 - r) * p + r * s for p, s in zip(damped, normalised(known.anchors), strict=True)]


def head_shares(settings: Settings, masses: Sequence[float]) -> list[float]:
    """Weights of heads in a pooled map."""
    if settings.pool == "mass":
        return list(masses)
    if settings.pool == "top":
        chosen = best(masses, max(1, round(settings.top_heads * len(masses))))
        return [float(head in chosen) for head in range(len(masses))]
    return [1.0] * len(masses)


def pooled(maps: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Weighted mean over heads."""
    return [
        sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
        for values in zip(*maps, strict=True)
    ]


def average_images(group: dict[int, float], spans: Sequence[Span]) -> dict[int, float]:
    """Early map (column -> value) with every image's shape replaced by the mean shape of all images seen."""
    seen = [span for span in spans if all(column in group for column in span[0])]
    if len(seen) < 2:
        return group
    result = dict(group)
    for columns, _, grid in seen:
        shape = [0.0] * len(columns)
        for others, _, other_grid in seen:
            values = normalised([group[column] for column in others])
            (rows, wide), (rows_from, wide_from) = (
                (grid, other_grid)
                if grid and other_grid
                else (
                    (1, len(columns)),
                    (1, len(others)),
                )
            )
            for place in range(len(columns)):
                row, column = divmod(place, wide)
                down, right = int((row + 0.5) * rows_from / rows), int((column + 0.5) * wide_from / wide)
                shape[place] += values[down * wide_from + right]
        held = sum(group[column] for column in columns)
        for column, value in zip(columns, normalised(shape), strict=True):
            result[column] = held * value
    return result


# ----------------------------------------------------------------------------------------------------- one full forward


@dataclass
class Walk:
    """The callbacks of one full-sequence forward."""

    settings: Settings
    spans: list[Span]
    image_tokens: set[int]
    prompt: int
    noise_draw: dict[int, float] = field(default_factory=dict)
    maps: dict[tuple[int, int], dict[int, list[float]]] = field(default_factory=dict)  # (row, group) -> layer -> map
    embedded: torch.Tensor | None = None
    known: dict[int, list[Anchored]] = field(default_factory=dict)  # row -> groups

    def groups(self, row: int) -> list[list[int]]:
        """Columns of each group of image tokens the row can see; groups of which it sees none are left out."""
        joined: dict[int, list[int]] = {}
        for index, (columns, image, _) in enumerate(self.spans):
            key = {"pooled": 0, "per_image": image, "per_tile": index}[self.settings.multi_image]
            joined.setdefault(key, []).extend(column for column in columns if column <= row)
        return [columns for columns in joined.values() if columns]

    def edited_rows(self, length: int) -> list[int]:
        """Rows that are read and edited."""
        rows = list(range(self.prompt - 1, length))
        if self.settings.rows == "all_text":
            rows = [row for row in range(self.prompt - 1) if row not in self.image_tokens] + rows
        return [row for row in rows if self.groups(row)]

    def hidden(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Remember block 0's output."""
        if layer == 0:
            self.embedded = x
        return x

    def read(self, layer: int, probs: torch.Tensor) -> None:
        """Note every row's map of this layer."""
        settings = self.settings
        for row in self.edited_rows(probs.shape[1]):
            for index, columns in enumerate(self.groups(row)):
                raw = probs[:, row, columns].tolist()
                shares, masses = [normalised(values) for values in raw], [sum(values) for values in raw]
                weights = head_shares(settings, masses)
                seen = self.maps.setdefault((row, index), {})
                if settings.anchor_unit == "heads" and layer > settings.early[-1]:
                    noise = normalised(self.noise(row, index, columns))
                    unlike = [
                        1 - overlap(share, noise) if weight > 0 else -1.0
                        for share, weight in zip(shares, weights, strict=True)
                    ]
                    chosen = best(unlike, max(1, round(settings.rho * len(shares))))
                    weights = [weight * (head in chosen) for head, weight in enumerate(weights)]
                seen[layer] = pooled(shares if settings.normalise else raw, weights)

    def noise(self, row: int, index: int, columns: list[int]) -> list[float]:
        """n of a row and group."""
        settings = self.settings

        def early(place: int) -> dict[int, float]:
            seen = self.maps[row, place]
            values = [sum(part) / len(settings.early) for part in zip(*(seen[e] for e in settings.early), strict=True)]
            return dict(zip(self.groups(row)[place], values, strict=True))

        if settings.noise_source == "image_mean":
            whole: dict[int, float] = {}
            for place in range(len(self.groups(row))):
                whole.update(early(place))
            mean = average_images(whole, self.spans)
            return [mean[column] for column in columns]
        if settings.noise_source == "embedding":
            if self.embedded is None:
                raise ValueError("block 0 has not run")
            x = self.embedded
            likeness = [float(torch.cosine_similarity(x[row], x[column], dim=0).clamp_min(0)) for column in columns]
            return normalised(likeness)
        if settings.noise_source == "random":
            return normalised([self.noise_draw[column] for column in columns])
        return list(early(index).values())

    def finish(self, row: int) -> list[Anchored]:
        """Anchors of a row; with ``prefill`` those of the last prompt row for all later ones."""
        if self.settings.refresh == "prefill":
            row = min(row, self.prompt - 1)
        if row in self.known:
            return self.known[row]
        settings, found = self.settings, []
        for index, columns in enumerate(self.groups(row)):
            seen = self.maps[row, index]
            noise = self.noise(row, index, columns)
            middle = [sum(part) / len(settings.mid) for part in zip(*(seen[e] for e in settings.mid), strict=True)]
            rise = [0.0] * len(columns)
            if settings.mode != "contrast":
                first, last = settings.early[-1], settings.mid[-1]
                for layer in range(first + 1, last + 1):
                    for place in range(len(columns)):
                        step = max(seen[layer][place] - seen[layer - 1][place], 0.0)
                        rise[place] += step / (last - first)
            found.append(anchored(settings, columns, noise, middle, rise))
        self.known[row] = found
        return found

    def gate(self, known: Anchored, shares: list[list[float]], masses: list[float], full: list[list[float]]) -> float:
        """g of a row, group and layer; ``full`` are the maps edited at full strength."""
        if self.settings.gate == "none":
            return 1.0
        maps = shares if self.settings.gate_input == "raw" else full
        deep = pooled(maps, head_shares(self.settings, masses))
        return drift(deep, normalised(known.noise), normalised(known.middle))

    def chosen(self, masses: list[float]) -> list[bool]:
        """Heads that are edited."""
        mean = sum(masses) / len(masses)
        return [self.settings.heads == "all" or mass >= mean for mass in masses]

    def scores(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """Edit the scores of a deep layer."""
        settings = self.settings
        if settings.operator == "prob_mix" or layer not in settings.deep:
            return z
        edited, weights = z.clone(), torch.softmax(z, -1)
        for row in self.edited_rows(z.shape[1]):
            for known in self.finish(row):
                raw = weights[:, row, known.columns].tolist()
                shares, masses = [normalised(values) for values in raw], [sum(values) for values in raw]
                steps = [score_step(settings, values, known) for values in z[:, row, known.columns].tolist()]
                full = [
                    normalised([p * math.exp(step) for p, step in zip(share, head, strict=True)])
                    for share, head in zip(shares, steps, strict=True)
                ]
                gate = self.gate(known, shares, masses, full)
                for head, wanted in enumerate(self.chosen(masses)):
                    bias = [gate * step for step in steps[head]]
                    if settings.mass == "preserve":
                        grown = math.log(sum(p * math.exp(b) for p, b in zip(shares[head], bias, strict=True)))
                        bias = [b - grown for b in bias]
                    for column, value in zip(known.columns, bias, strict=True):
                        edited[head, row, column] += value if wanted else 0.0
        return edited

    def probs(self, layer: int, a: torch.Tensor) -> torch.Tensor:
        """Read the lower layers; edit the weights of a deep one (``prob_mix``)."""
        settings = self.settings
        if layer <= settings.mid[-1]:
            self.read(layer, a)
        if settings.operator != "prob_mix" or layer not in settings.deep:
            return a
        edited = a.clone()
        for row in self.edited_rows(a.shape[1]):
            for known in self.finish(row):
                raw = a[:, row, known.columns].tolist()
                shares, masses = [normalised(values) for values in raw], [sum(values) for values in raw]
                full = [mixture(settings, share, known, 1.0) for share in shares]
                gate = self.gate(known, shares, masses, full)
                for head, wanted in enumerate(self.chosen(masses)):
                    new = mixture(settings, shares[head], known, gate)
                    for column, value in zip(known.columns, new, strict=True):
                        edited[head, row, column] = masses[head] * value if wanted else a[head, row, column]
        return edited


def forward(
    model: LlavaForConditionalGeneration,
    ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    settings: Settings,
    spans: list[Span],
    prompt: int,
    *,
    noise_draw: dict[int, float] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Forward, Walk]:
    """Run the whole sequence once; return it and what was found on the way."""
    tokens = set((ids[0, :prompt] == model.config.image_token_id).nonzero().flatten().tolist())
    walk = Walk(settings, spans, tokens, prompt, noise_draw or {})
    out = full_forward(
        model,
        ids,
        pixel_values,
        scores_edit=walk.scores,
        probs_edit=walk.probs,
        hidden_edit=walk.hidden,
        dtype=dtype,
        collect=True,
    )
    return out, walk


def generate(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    settings: Settings,
    spans: list[Span],
    max_new_tokens: int,
    eos: Collection[int] = (),
    **options: Any,
) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding; returns the new tokens and the raw logits ``[T_new, V]`` that chose them.

    ``spans`` are columns of the unpadded prompt.
    """
    ids = strip(input_ids, attention_mask)
    prompt = ids.shape[1]
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        out, _walk = forward(model, ids, pixel_values, settings, spans, prompt, **options)
        steps.append(out.logits[-1])
        token = int(out.logits[-1].argmax())
        tokens.append(token)
        if token in eos:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, torch.stack(steps)
