"""Maps of one token: attention and saliency of every query row, from one pass over the whole text with a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from mitigate.core import AttentionScores, Fidelity, Method, MethodState, ModelFacts, Point, Rows, Subscription, Tags
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.diagnostics.base import SampleRows, TokenRow
from mitigate.diagnostics.labels import Label
from mitigate.errors import ConfigError
from mitigate.metrics.base import Array
from mitigate.ops.saliency import cotangent, normalised

if TYPE_CHECKING:
    from mitigate.adapters import LoadedModel
    from mitigate.compose import ResolvedRun
    from mitigate.diagnostics.saliency import Saliency
    from mitigate.runner.single import ModelCache


#: Examples are chosen after this many generated tokens, where a reply has such words.
_SOME_TEXT: Final = 8


@dataclass(frozen=True)
class TokenMap:
    """Maps over the text columns of one sequence, for the token that its last row predicts.

    Parameters
    ----------
    attention, saliency
        ``[t, t]`` query rows x key columns, pictures and their frames left out; lower triangular.
    texts
        The t tokens.
    groups
        Per text column ``system``, ``prompt`` or ``output``.
    last
        Share of the last row on every group, the picture included: ``attention`` and ``saliency`` -> group -> share.
    """

    attention: Array
    saliency: Array
    texts: Sequence[str]
    groups: Sequence[str]
    last: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class ScoreReader(Method):
    """Keeps the scores before the softmax, ``[B, H, T, T]`` per layer."""

    name: ClassVar[str] = "scores"
    summary: ClassVar[str] = "reads attention scores of all rows"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_SCORES}))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Read all rows of all layers."""
        layers = tuple(range(model.layers))
        return [Subscription(point=Point.ATTENTION_SCORES, layers=layers, rows=Rows.ALL, where="all rows")]

    def on_attention_scores(self, event: AttentionScores, state: MethodState) -> None:
        """Keep a layer's scores."""
        kept = state.get("scores", {})
        state.scores = {**kept, event.layer: event.scores.detach()}


def forced(inputs: Mapping[str, Any], written: Sequence[int]) -> dict[str, Any]:
    """Return the inputs of a prompt with generated tokens after it, one sample."""
    ids = inputs["input_ids"]
    fresh = torch.tensor([list(written)], dtype=ids.dtype, device=ids.device)
    whole = {**inputs, "input_ids": torch.cat([ids, fresh], 1)}
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"]
        whole["attention_mask"] = torch.cat([mask, mask.new_ones(fresh.shape)], 1)
    if inputs.get("mm_token_type_ids") is not None:  # positions are computed from these; what was written is text
        kinds = inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(fresh.shape)], 1)
    return whole


def attention_and_gradients(
    loaded: LoadedModel, inputs: Mapping[str, Any], target: int, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return layer -> ``(A, dA)``, ``[H, T, T]`` each, for the loss of ``target`` at the last row (Eq. 1-3).

    The plain model computes it in one pass without a cache; no parameter is differentiated.
    """
    model, decoder = loaded.model, loaded.adapter.decoder_layers(loaded.model)
    needing = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def start(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].detach().requires_grad_(True), *args[1:])

    hook = decoder[min(layers)].register_forward_pre_hook(start)
    try:
        for parameter in needing:
            parameter.requires_grad_(False)
        with _eager(loaded), torch.enable_grad():
            out = model(**inputs, use_cache=False, output_attentions=True, return_dict=True)
            logits = out.logits[:, -1].float()
            direction = cotangent(logits.detach(), torch.tensor([target], device=logits.device))
            wanted = [out.attentions[layer] for layer in layers]
            gradients = torch.autograd.grad((direction * logits).sum(), wanted)
    finally:
        hook.remove()
        for parameter in needing:
            parameter.requires_grad_(True)
    found = zip(layers, wanted, gradients, strict=True)
    return {layer: (a.detach()[0].float(), g[0].float()) for layer, a, g in found}


@contextmanager
def _eager(loaded: LoadedModel) -> Iterator[None]:
    """Let the text decoder compute whole attention matrices."""
    config = loaded.adapter.decoder_config(loaded.model)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def paper_map(parts: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Sum ``|A * dA|`` over heads, divide every row by its length, mean over layers (Eq. 4-5): ``[T, T]``."""
    return torch.stack([normalised((a * g).abs().sum(0).tril(), "row_l2") for a, g in parts.values()]).mean(0)


def legacy_map(scores: Mapping[int, Tensor], first: tuple[Tensor, Tensor], keep: Tensor) -> Tensor:
    """Mix the masked scores of every layer with the first layer's ``A * dA``, as the demo scripts do: ``[T, T]``.

    Parameters
    ----------
    scores
        Layer -> scores before the softmax ``[H, T, T]``, masked entries finite.
    first
        ``(A, dA)`` of layer 0.
    keep
        ``[t]`` text columns: the scripts scale over what is shown only.

    Returns
    -------
    Tensor
        ``[t, t]``: per layer the head mean scaled to 0..1, summed, log(1 + x), scaled to 0..1.
    """
    product = first[0] * first[1]
    total = sum(_unit((layer * product).abs().mean(0)[keep][:, keep]) for layer in scores.values())
    return _unit(torch.log1p(torch.as_tensor(total)))


def _unit(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


def token_map(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    written: Sequence[int],
    target: int,
    layers: Sequence[int],
    kind: str,
    methods: Mapping[str, Method] | None = None,
) -> TokenMap:
    """Compute the maps of the token ``target`` that follows ``written``, one sample; with methods: under them."""
    from mitigate.diagnostics.saliency_stack_maps import under_stack

    whole = forced(inputs, written)
    asked = sorted({*layers, 0}) if kind == "legacy_demo" else list(layers)
    if methods:
        parts = under_stack(loaded, inputs, written, target, asked, methods)
    else:
        parts = attention_and_gradients(loaded, whole, target, asked)
    mask = inputs.get("attention_mask")
    layout = loaded.adapter.layout(loaded.model, inputs["input_ids"], mask, inputs, loaded.processor)
    roles = layout.grown(whole["input_ids"].shape[1]).roles[0]
    names = {Role.SYSTEM: "system", Role.PROMPT: "prompt", Role.GENERATED: "output"}
    keep = torch.isin(roles, torch.tensor(list(names), device=roles.device)).nonzero().flatten()
    own = {layer: parts[layer] for layer in layers}
    attention = torch.stack([a.mean(0) for a, _ in own.values()]).mean(0)
    saliency = paper_map(own)
    last = {
        name: {role.name.lower(): float(row[roles == role].sum() / row.sum()) for role in Role if role is not Role.PAD}
        for name, row in (("attention", attention[-1]), ("saliency", saliency[-1]))
    }
    legacy = kind == "legacy_demo"
    shown = legacy_map(_scores(loaded, whole), parts[0], keep) if legacy else saliency[keep][:, keep]
    ids = whole["input_ids"][0, keep].tolist()
    return TokenMap(
        attention[keep][:, keep].cpu().numpy(),
        shown.cpu().numpy(),
        [str(loaded.processor.decode([item])) for item in ids],
        [names[Role(int(role))] for role in roles[keep]],
        last,
    )


def _scores(loaded: LoadedModel, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    with Stack([ScoreReader()]).attach(loaded.model, loaded.processor) as handle, torch.no_grad():
        loaded.model(**inputs, use_cache=False, return_dict=True)
        request = handle.bus.last_request or handle.bus.request if handle.bus else None
        state = request.state("scores") if request is not None else MethodState("scores", 1)
        return {layer: scores[0].float() for layer, scores in state.get("scores", {}).items()}


def choose(diagnostic: Saliency, samples: Sequence[SampleRows]) -> list[tuple[SampleRows, TokenRow]]:
    """Return the words whose maps are drawn: the asked one, or the first of each kind, one per sample and kind.

    Raises
    ------
    ConfigError
        If the asked one does not exist.
    """
    if diagnostic.sample:
        sample = next((item for item in samples if item.id == diagnostic.sample), None)
        if sample is None:
            raise ConfigError(f"diagnostic.sample={diagnostic.sample} was not answered in this run")
        if diagnostic.token >= len(sample.rows):
            raise ConfigError(f"diagnostic.token={diagnostic.token}: {sample.id} has {len(sample.rows)} tokens")
        return [(sample, sample.rows[diagnostic.token])]
    found = []
    for kind in (Label.HALLUCINATED, Label.GROUNDED):
        fitting = ((item, _fitting(item, kind)) for item in samples)
        found += [(item, row) for item, row in fitting if row is not None][: diagnostic.examples]
    return found


def _fitting(sample: SampleRows, kind: Label) -> TokenRow | None:
    """Return the first word of a kind with some text before it, if possible."""
    words = [row for row in sample.rows if row.first and row.label is kind and row.position > 0]
    return next((row for row in words if row.position >= _SOME_TEXT), words[0] if words else None)


def draw_examples(
    diagnostic: Saliency, resolved: ResolvedRun, samples: Sequence[SampleRows], folder: Path, *, models: ModelCache
) -> tuple[list[Path], list[str]]:
    """Draw the maps of example words over the recorded text, without and with the stack; return PNGs and notes."""
    from mitigate.core import parse_layers
    from mitigate.diagnostics.saliency_figures import draw_map
    from mitigate.diagnostics.saliency_stack_maps import acting

    chosen = choose(diagnostic, samples)
    for stale in (*folder.glob("map-*.png"), *folder.glob("map-*.svg")):
        stale.unlink()
    if not chosen:
        return [], []
    loaded = models.get(resolved.config["model"])
    layers = parse_layers(diagnostic.layers, loaded.facts.layers, name="diagnostic.layers")
    known = {sample.id: sample for sample in resolved.benchmark.samples()}
    legacy = diagnostic.maps != "paper"
    stack, choosing = acting(resolved.methods, loaded.facts)
    # the demo scripts mix in scores before the softmax, which most methods never touch
    kinds: dict[str, Mapping[str, Method]] = {"": {}, "-with-stack": stack} if stack and not legacy else {"": {}}
    figures = []
    for number, (item, row) in enumerate(chosen, start=1):
        sample = known[item.id]
        inputs = loaded.inputs([sample.prompt], [resolved.benchmark.images(sample)])
        written = [earlier.token for earlier in item.rows[: row.position]]
        title = f"{item.id}, token {row.position}: {row.text.strip() or 'end'!r} ({row.label.value})"
        for suffix, methods in kinds.items():
            found = token_map(loaded, inputs, written, row.token, layers, diagnostic.maps, methods)
            shown = f"{title}, with {' + '.join(methods) or 'no method'}" if resolved.methods else title
            name = f"map-{number:02d}-{row.label.value}{suffix}"
            figures.append(draw_map(found, shown, folder, name, legacy=legacy))
    return figures, _map_notes(legacy, stack, choosing)


def _map_notes(legacy: bool, stack: Mapping[str, Method], choosing: Sequence[str]) -> list[str]:
    notes = []
    if choosing:
        notes.append(f"Maps are without {', '.join(choosing)}: choosing tokens changes no attention to a given text.")
    if legacy:
        notes.append("maps=legacy_demo mixes layer 0's gradients with all layers' scores: for comparing pictures only.")
    if legacy and stack:
        notes.append("maps=legacy_demo shows the model without the stack, reading the text that the stack wrote.")
    return notes


def strip(values: Array) -> Array:
    """Return the last row scaled to its largest value."""
    top = float(np.max(values[-1], initial=0.0))
    row: Array = values[-1] / (top or 1.0)
    return row
