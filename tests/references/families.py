"""Methods on any family by brute force: the model's own forward over whole sequences, its eager attention replaced.

One unpadded sample at a time, without a cache and without a stack. Where pictures stand is derived here once more, from
what the processors write.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

Edit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
Raster = tuple[list[int], tuple[int, int]]
"""Columns of a raster's patches, row by row, and its rows and columns."""

#: Marks around a picture that are text to the model, in order: opening ones do not belong to the text after a picture.
MARKS = {
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>"),
    "idefics3": ("<fake_token_around_image>",),
}


def pictures_of(tiny: Any, single: dict[str, Any]) -> list[list[Raster]]:
    """Rasters of every picture of one sample."""
    ids, config, family = single["input_ids"][0], tiny.model.config, tiny.family
    columns = (ids == config.image_token_id).nonzero().flatten().tolist()
    runs = [[c for _, c in run] for _, run in groupby(enumerate(columns), lambda pair: pair[1] - pair[0])]
    if family == "qwen2_5_vl":
        return [
            [(run, (h // 2, w // 2))] for run, (_, h, w) in zip(runs, single["image_grid_thw"].tolist(), strict=True)
        ]
    if family == "llava_next":
        return list(_with_line_breaks(tiny.model, single, columns))
    size = {"gemma3": 16, "idefics3": 9, "paligemma": 25}[family]
    rasters = [(columns[i : i + size], (math.isqrt(size),) * 2) for i in range(0, len(columns), size)]
    if family != "idefics3":
        return [[raster] for raster in rasters]
    found: list[list[Raster]] = [[]]
    for patches, grid in rasters:  # the whole picture is the last part of each
        found[-1].append((patches, grid))
        before = tiny.processor.tokenizer.decode(ids[max(0, patches[0] - 12) : patches[0]])
        if re.sub(r"\s", "", before).endswith("<global-img>"):
            found.append([])
    return found[:-1]


def _with_line_breaks(model: Any, single: dict[str, Any], columns: list[int]) -> Iterator[list[Raster]]:
    """LLaVA-NeXT: the features themselves say where a row of the tiled picture ends."""
    sizes = {"image_sizes": single["image_sizes"], "pixel_values": single["pixel_values"]}
    small = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    for features in model.model.get_image_features(**sizes).pooler_output:
        own, columns = columns[: len(features)], columns[len(features) :]
        rows: list[list[int]] = [[]]
        for column, feature in list(zip(own, features, strict=True))[small:]:
            if torch.equal(feature, model.model.image_newline):
                rows.append([])
            else:
                rows[-1].append(column)
        tiled = [column for row in rows for column in row]
        yield [(own[:small], (math.isqrt(small),) * 2), (tiled, (len(rows) - 1, len(rows[0])))]


class Sample:
    """One sample on a model of any family.

    Parameters
    ----------
    tiny
        The tiny model.
    single
        The processor's inputs of this sample alone.
    """

    def __init__(self, tiny: Any, single: dict[str, Any]) -> None:
        self.model, self.family, self.inputs = tiny.model, tiny.family, single
        self.layers = list(tiny.adapter.decoder_layers(tiny.model))
        self.length = single["input_ids"].shape[1]
        self.pictures = pictures_of(tiny, single)
        ids, words = single["input_ids"][0].tolist(), tiny.processor.tokenizer
        marks = {words.convert_tokens_to_ids(mark) for mark in MARKS.get(tiny.family, ())}
        image = tiny.model.config.image_token_id
        self.stops = []
        for picture in self.pictures:
            stop = max(patches[-1] for patches, _ in picture) + 1
            # a picture's last line break is a placeholder too, and so is the first token of one that follows directly
            stop += ids[stop] == image and self.family == "llava_next"
            while ids[stop] in marks:
                stop += 1
            self.stops.append(stop)
        self.text = [c for c in range(self.length) if ids[c] != image and ids[c] not in marks]
        if tiny.family == "idefics3":  # tiles are named in words
            self.text = [c for c in self.text if c >= self.stops[-1]]

    def forward(
        self, tokens: Sequence[int] = (), scores: Sequence[Edit] = (), probs: Sequence[Edit] = (), hidden: Any = None
    ) -> torch.Tensor:
        """Logits ``[T, V]`` of the prompt and the tokens; edits see ``[H, T, T]`` and what is visible ``[T, T]``."""
        inputs, fresh = dict(self.inputs), torch.tensor([list(tokens)], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], fresh], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name, value in (("mm_token_type_ids", 0), ("token_type_ids", int(self.family == "paligemma"))):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, fresh.shape[1]), value=value)
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = None
        with torch.no_grad(), self._eager(scores, probs, hidden):
            return self.model(**inputs, use_cache=False).logits[0]

    @contextmanager
    def _eager(self, scores: Sequence[Edit], probs: Sequence[Edit], hidden: Any) -> Iterator[None]:
        file = sys.modules[type(self.layers[0].self_attn).__module__]
        theirs: Any = file.eager_attention_forward
        places = {id(layer.self_attn): index for index, layer in enumerate(self.layers)}

        def attend(module: Any, q: Any, k: Any, v: Any, attention_mask: Any = None, **options: Any) -> Any:
            layer = places.get(id(module))
            if layer is None:  # the vision tower's
                return theirs(module, q, k, v, attention_mask, **options)
            copies = q.shape[1] // k.shape[1]
            k, v = (part[0].repeat_interleave(copies, 0) for part in (k, v))
            z = q[0] @ k.transpose(1, 2) * options["scaling"]
            seen = attention_mask[0, 0] > -1
            z = z.masked_fill(~seen, -torch.inf)
            for edit in scores:
                z = edit(layer, z, seen)
            a = z.softmax(-1)
            for edit in probs:
                a = edit(layer, a, seen)
            return (a @ v).transpose(0, 1)[None], None

        hooks = [
            layer.register_forward_hook(lambda _, args, out, index=index: hidden(index, out[0])[None])
            for index, layer in enumerate(self.layers if hidden is not None else ())
        ]
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        file.eager_attention_forward = attend  # type: ignore[attr-defined]
        try:
            yield
        finally:
            file.eager_attention_forward = theirs  # type: ignore[attr-defined]
            self.model.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()

    def by_row(self, change: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]) -> Edit:
        """An edit of the rows that predict a generated token: ``change(layer, row, [H, T], visible [T])``."""

        def edit(layer: int, matrix: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            rows = range(self.length - 1, matrix.shape[1])
            new = [change(layer, row, matrix[:, row], seen[row]) for row in rows]
            return torch.cat([matrix[:, : self.length - 1], torch.stack(new, 1)], 1)

        return edit

    @property
    def patches(self) -> list[int]:
        """Columns of all patches."""
        return [column for picture in self.pictures for raster, _ in picture for column in raster]


def locore(sample: Sample, beta: float, window: int) -> Edit:
    """Algorithm 2 on weights."""

    def change(layer: int, row: int, a: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        gain = torch.ones(a.shape[1])
        gain[max(sample.stops[-1], row - window) : row] = 1 + beta
        return a * gain

    return sample.by_row(change)


def dleaf(sample: Sample, gamma: float) -> Edit:
    """Entropy against the least so far; low heads are mixed with the best."""
    least: dict[int, float] = {}

    def change(layer: int, row: int, a: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        keys = [column for column in sample.patches if seen[column]]
        if not keys:
            return a
        focus, spread = a[:, keys].sum(1), a[:, keys].sum(0) / a[:, keys].sum()
        entropy = -float(torch.xlogy(spread, spread).sum())
        known = math.inf if layer == 0 else least.get(row, math.inf)
        least[row] = min(known, entropy)
        mixed = (1 - gamma) * a + gamma * a[focus.argmax()]
        return torch.where((focus < focus.mean())[:, None], mixed, a) if entropy > known else a

    return sample.by_row(change)


def clva(sample: Sample, alpha: float, beta: float, early: int, middle: int, deep: int) -> tuple[Edit, Edit]:
    """Edits of scores (deep) and of weights (which only reads); windows of one layer each, at most 8 anchors."""
    maps: dict[tuple[int, int], torch.Tensor] = {}

    def read(layer: int, row: int, a: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        seen_mass = a[:, sample.patches].sum(1, keepdim=True)
        maps[layer, row] = (a[:, sample.patches] / seen_mass).mean(0)  # not a number where nothing is seen
        return a

    def pull(layer: int, row: int, z: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        visible = seen[sample.patches]
        if layer != deep or not visible.any():
            return z
        noise, found = maps[early, row], maps[middle, row]
        if bool((noise + found).isnan().any()):
            return z
        rise = (found - noise).relu()
        anchors = torch.zeros_like(rise)
        best = rise.argsort(descending=True, stable=True)[:8]
        anchors[best] = rise[best] / rise.max()
        penalty = torch.where(anchors > 0, 0.0, (noise - found).relu() / (noise - found).max())
        columns = torch.tensor(sample.patches)[visible]
        unit = z[:, columns].abs().mean(1, keepdim=True)
        new = z.clone()
        new[:, columns] += unit * (alpha * anchors - beta * penalty)[visible]
        return new

    return sample.by_row(pull), sample.by_row(read)


def scr(sample: Sample, lam: float, k: int, ranking: Sequence[int], edited: Sequence[int]) -> Any:
    """Rank in an unedited pass, then Eq. 1 on the outputs of the edited blocks."""
    seen: dict[int, torch.Tensor] = {}
    sample.forward(probs=[lambda layer, a, _: seen.setdefault(layer, a)])
    owner: dict[int, int] = {}
    sources: list[int] = []
    for picture, stop in zip(sample.pictures, sample.stops, strict=True):
        voters = [column for column in sample.text if column >= stop]
        mass = sum(seen[layer][:, voters].double().mean((0, 1)) for layer in ranking)
        near: dict[int, list[int]] = {}
        for patches, (rows, columns) in picture:
            for y in range(1, rows - 1):
                for x in range(1, columns - 1):
                    around = [(y + dy) * columns + x + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                    near[patches[y * columns + x]] = [patches[place] for place in around]
        own = sorted(near, key=lambda column, mass=mass: (-float(mass[column]), column))[:k]  # type: ignore[index]
        for source in own:
            for column in near[source]:
                if column not in own:
                    owner.setdefault(column, source)
        sources += own

    def edit(layer: int, x: torch.Tensor) -> torch.Tensor:
        if layer not in edited:
            return x
        new = x.clone()
        for column, source in owner.items():
            new[column] = x[column] + (lam - 1) * x[source]
        new[sources] = x[sources] / lam
        return new

    return edit
