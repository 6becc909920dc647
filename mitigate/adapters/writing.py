"""How a processor writes pictures into a prompt: it is asked to write a few, and the answer must follow a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from mitigate.core.layout import ImageSpan
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from mitigate.adapters.spans import Batch

#: Width and height of the pictures a processor is asked about: whoever cuts pictures into tiles does so with some.
SIZES = ((900, 300), (300, 900), (700, 700), (120, 90))
#: Names under which configurations keep by how much features are pooled along a side; a share stands for its inverse.
POOLING = ("downsample_factor", "downsample_ratio", "scale_factor", "pixel_shuffle_ratio", "spatial_merge_size")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A rule by which pictures can be read off a prompt.

    Parameters
    ----------
    kind
        ``fixed``: every picture is the same tokens. ``grids``: as many as its ``image_grid_thw`` says. ``rows``: rows
        as its ``image_sizes`` says, with a mark between them or none. ``tiles``: several runs of one length between two
        marks.
    placeholder
        Id of the token in whose place the model puts features.
    before, after
        What every picture begins and ends with.
    between
        ``rows``: the mark between rows.
    size
        ``fixed``, ``tiles``: placeholders in a run.
    grid
        ``fixed``: rows and columns of the raster, if it is known to be one.
    merge
        ``grids``, ``rows``: pixels (``rows``) or patches (``grids``) along a side of a token.
    marks
        Added tokens of the tokenizer that stand in place of pictures besides the placeholder.
    told_by
        Which input has one entry per picture.
    per_picture, undivided
        Image inputs that have one entry per picture; those, besides ``pixel_values``, that have not, or are pixels too.
    nested
        Whether the processor wants one list of pictures per prompt.
    """

    kind: str
    placeholder: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    size: int = 0
    grid: tuple[int, int] | None = None
    merge: int = 1
    marks: frozenset[int] = frozenset()
    told_by: str = "pixel_values"
    per_picture: frozenset[str] = frozenset()
    undivided: frozenset[str] = frozenset()
    nested: bool = False

    @property
    def raster(self) -> bool:
        """Whether every picture is a raster."""
        return self.kind in ("grids", "rows") or self.grid is not None

    def written(self, fact: Any) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        """Return the tokens of a picture of which the processor said this, and its raster (not for ``tiles``)."""
        if self.kind == "fixed":
            return (*self.before, *[self.placeholder] * self.size, *self.after), self.grid
        if fact is None:
            raise LayoutError(f"the prompt holds image tokens, but the inputs lack {self.told_by}")
        steps, high, broad = fact if self.kind == "grids" else (1, *fact)
        if steps != 1 or high % self.merge or broad % self.merge:
            raise LayoutError(f"{self.told_by} of {list(fact)} is not that of a picture")
        rows, columns = high // self.merge, broad // self.merge
        line = [self.placeholder] * columns
        inner = [*([*line, *self.between] * (rows - 1)), *line]
        return (*self.before, *inner, *self.after), (rows, columns)

    def read(self, row: Sequence[int], batch: Batch) -> list[ImageSpan]:
        """Return the pictures of a row of token ids, which must be written as the processor writes them."""
        if self.kind == "tiles":
            return self._tiles(row, batch)
        spans, column = [], 0
        while (found := _next(row, self.placeholder, column)) is not None:
            index, fact = batch.picture()
            tokens, grid = self.written(fact)
            start = found - len(self.before)
            if start < column or tuple(row[start : start + len(tokens)]) != tokens:
                raise LayoutError(
                    "a picture's tokens are not those that the processor writes for it;"
                    " was the prompt made by this model's processor, together with the pixels?"
                )
            column = start + len(tokens)
            places = [start + place for place, token in enumerate(tokens) if token == self.placeholder]
            spans.append(ImageSpan(index, torch.tensor(places), grid, column))
        return spans

    def _tiles(self, row: Sequence[int], batch: Batch) -> list[ImageSpan]:
        spans, column = [], 0
        while (start := _next(row, self.before[0], column)) is not None:
            end = _next(row, self.after[-1], start)
            if end is None or self.before[0] in row[start + 1 : end]:
                raise LayoutError("a picture begins in the prompt, but does not end")
            column = end + 1
            index, _ = batch.picture()
            tiles = _runs(row[start:column], self.placeholder)
            for number, (first, length) in enumerate(tiles, 1):
                if length != self.size:
                    raise LayoutError(f"{length} image tokens in a row, but each tile has {self.size}")
                first += start
                stop = column if number == len(tiles) else first + length
                spans.append(ImageSpan(index, torch.arange(first, first + length), None, stop))
        return spans

    def start(self, row: Sequence[int], first: int) -> int:
        """Return the column with which a picture begins whose first placeholder is in column ``first``."""
        if self.kind != "tiles":
            return first - len(self.before)
        return next(column for column in range(first, -1, -1) if row[column] == self.before[0])


def learn(config: Any, processor: ProcessorMixin, remedy: str) -> Writing:
    """Let a processor write pictures of several sizes and find the rule it follows.

    Parameters
    ----------
    config
        The model's configuration.
    processor
        Its processor.
    remedy
        Last line of a refusal.

    Raises
    ------
    UnsupportedModel
        If it follows none of those that `Writing` knows.
    """
    made, blocks, nested = _asked(processor, str(config.model_type), remedy)
    token = int(config.image_token_id)
    rule = None
    if all(token in block for block in blocks):
        rule = (
            _grids(config, processor, token, made, blocks)
            or _fixed(config, token, made, blocks)
            or _rows(config, token, made, blocks)
            or _tiled(token, made, blocks)
        )
    if rule is None:
        counts = ", ".join(
            f"{width} x {height}: {block.count(token)} image tokens"
            for (width, height), block in zip(SIZES, blocks, strict=True)
        )
        raise UnsupportedModel(
            f"no adapter for model type {config.model_type!r}, and its processor writes pictures by a rule that is not"
            f" known ({counts})\n{remedy}"
        )
    tensors = {name for name, value in made.items() if isinstance(value, torch.Tensor)}
    tensors = {name for name in tensors if made[name].shape != made["input_ids"].shape}  # those say something of tokens
    single = frozenset(name for name in tensors if len(made[name]) == len(SIZES))
    other_pixels = {name for name in tensors if made[name].is_floating_point() and made[name].dim() > 2}
    rest = (frozenset(tensors) - single | other_pixels) - {"pixel_values"}
    words: Any = processor.tokenizer
    text = {token, words.bos_token_id, words.eos_token_id, words.pad_token_id, words.unk_token_id}
    marks = frozenset(mark for block in blocks for mark in block if mark in words.added_tokens_decoder) - text
    return Writing(**rule, placeholder=token, marks=marks, per_picture=single, undivided=rest, nested=nested)


def _asked(processor: Any, family: str, remedy: str) -> tuple[Any, list[tuple[int, ...]], bool]:
    """Return the inputs made of the pictures, the tokens written for each, and whether they came in lists."""
    from PIL import Image

    word = getattr(processor, "image_token", None)
    if not isinstance(word, str) or getattr(processor, "tokenizer", None) is None:
        raise UnsupportedModel(f"no adapter for model type {family!r}, and its processor has no image_token\n{remedy}")
    pictures = [Image.new("RGB", size, (90, 120, 150)) for size in SIZES]
    problem: Exception | None = None
    for nested in (False, True):
        try:
            made = processor(
                text=[word] * len(SIZES),
                images=[[picture] for picture in pictures] if nested else pictures,
                return_tensors="pt",
                padding=True,
                return_text_replacement_offsets=True,
            )
            texts = [[part["replacement"] for part in parts] for parts in made["text_replacement_offsets"]]
        except Exception as error:  # whatever a processor does not like about it
            problem = problem or error
            continue
        if all(len(parts) == 1 for parts in texts):
            tokenizer = processor.tokenizer
            blocks = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for (text,) in texts]
            if all(_within(block, row.tolist()) for block, row in zip(blocks, made["input_ids"], strict=True)):
                return made, blocks, nested
    reason = "" if problem is None else f" ({type(problem).__name__}: {str(problem).splitlines()[0][:120]})"
    raise UnsupportedModel(
        f"no adapter for model type {family!r}, and its processor does not tell what it writes for a picture{reason}\n"
        f"{remedy}"
    )


def _grids(
    config: Any, processor: Any, token: int, made: Any, blocks: Sequence[tuple[int, ...]]
) -> dict[str, Any] | None:
    grids = made.get("image_grid_thw")
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    merge = merge or getattr(getattr(processor, "image_processor", None), "merge_size", None)
    if grids is None or not isinstance(merge, int) or tuple(grids.shape) != (len(SIZES), 3):
        return None
    return _explained(
        {"kind": "grids", "merge": merge, "told_by": "image_grid_thw"}, token, blocks, grids.tolist(), between=()
    )


def _rows(config: Any, token: int, made: Any, blocks: Sequence[tuple[int, ...]]) -> dict[str, Any] | None:
    sizes, runs = made.get("image_sizes"), _runs(blocks[0], token)
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if sizes is None or not isinstance(patch, int) or tuple(sizes.shape) != (len(SIZES), 2):
        return None
    between = blocks[0][sum(runs[0]) : runs[1][0]] if len(runs) > 1 else ()
    merge = patch * int(getattr(config, "spatial_merge_size", 1))
    return _explained(
        {"kind": "rows", "merge": merge, "told_by": "image_sizes"}, token, blocks, sizes.tolist(), between=between
    )


def _explained(
    rule: dict[str, Any],
    token: int,
    blocks: Sequence[tuple[int, ...]],
    facts: Sequence[Any],
    *,
    between: tuple[int, ...],
) -> dict[str, Any] | None:
    """Return the rule, completed, if it gives exactly the tokens the processor wrote."""
    first, last = _frame(blocks[0], token)
    rule = {**rule, "before": first, "after": last, "between": between}
    writing = Writing(**rule, placeholder=token)
    try:
        written = [writing.written(fact)[0] for fact in facts]
    except LayoutError:
        return None
    return rule if written == list(blocks) else None


def _fixed(config: Any, token: int, made: Any, blocks: Sequence[tuple[int, ...]]) -> dict[str, Any] | None:
    pixels, runs = made.get("pixel_values"), _runs(blocks[0], token)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != len(SIZES):
        return None
    if len(set(blocks)) > 1 or len(runs) > 1:
        return None
    (_, size), (first, last) = runs[0], _frame(blocks[0], token)
    grid = _raster(config, size, pixels.shape[-2:])
    return {"kind": "fixed", "size": size, "before": first, "after": last, "grid": grid}


def _tiled(token: int, made: Any, blocks: Sequence[tuple[int, ...]]) -> dict[str, Any] | None:
    pixels = made.get("pixel_values")
    runs = [length for block in blocks for _, length in _runs(block, token)]
    ends = {(block[0], block[-1]) for block in blocks}
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != len(runs) or len(set(runs)) > 1:
        return None
    first, last = next(iter(ends))
    if len(ends) > 1 or first == last or any(block.count(end) > 1 for block in blocks for end in (first, last)):
        return None
    return None if token in (first, last) else {"kind": "tiles", "size": runs[0], "before": (first,), "after": (last,)}


def _raster(config: Any, size: int, pixels: Sequence[int]) -> tuple[int, int] | None:
    """Return rows and columns if the patches of square pixels, pooled as the configuration says, are that many."""
    vision = getattr(config, "vision_config", None)
    side, patch = (_one(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if not side or not patch or side % patch or tuple(pixels) != (side, side):
        return None
    values = [getattr(part, name, None) for part in (config, vision) for name in POOLING]
    pooled = {1} | {round(max(value, 1 / value)) for value in values if isinstance(value, int | float) and value > 0}
    for factor in pooled:
        rows, rest = divmod(side // patch, factor)
        if not rest and rows * rows == size:
            return rows, rows
    return None


def _one(value: Any) -> int | None:
    """Return a side that is written as one number or as two equal ones."""
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else None


def _runs(tokens: Sequence[int], token: int) -> list[tuple[int, int]]:
    """Return first column and length of every run of a token."""
    found, column = [], 0
    for same, group in groupby(tokens, lambda item: item == token):
        length = len(list(group))
        found += [(column, length)] if same else []
        column += length
    return found


def _frame(block: tuple[int, ...], token: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what a block has before its first and after its last placeholder."""
    runs = _runs(block, token)
    return block[: runs[0][0]], block[sum(runs[-1]) :]


def _next(row: Sequence[int], token: int, start: int) -> int | None:
    return next((column for column in range(start, len(row)) if row[column] == token), None)


def _within(block: tuple[int, ...], row: list[int]) -> bool:
    return any(tuple(row[start : start + len(block)]) == block for start in range(len(row) - len(block) + 1))
