"""SCR: spread the credit of the most attended image patches to their neighbours, before decoding starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionProbs,
    Event,
    Fidelity,
    HiddenStates,
    Method,
    MethodState,
    ModelFacts,
    Paper,
    Phase,
    Point,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.errors import UnsupportedModel
from mitigate.lazy import torch
from mitigate.ops.spatial import interior, neighbours

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import ImageSpan, TokenLayout


@dataclass(frozen=True)
class Edit:
    """What Eq. 1 touches in a batch.

    Parameters
    ----------
    sources
        ``[S, 2]`` request row and column of every source patch.
    owned
        ``[N, 2]`` row and column of every owned neighbour; no place occurs twice, and none is a source.
    owner
        ``[N]`` index into `sources`.
    span
        First and last column touched.
    """

    sources: Tensor
    owned: Tensor
    owner: Tensor
    span: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SCR(Method):
    """Spatial Credit Redistribution: two passes over the prompt.

    Attention is said to collapse on a few dominant patches, and what lies beside them is overlooked. A diagnostic pass
    ranks interior patches by the attention of the text after the picture; in the second pass each of the ``k_src``
    strongest patches s hands ``lam - 1`` of its hidden state to the neighbours it owns and is divided by ``lam``, after
    every early block (Eq. 1).

    Paper: arXiv 2602.22469 v1, Section 3 and Eq. 1; no code was found. Where v1 is silent the choice is a parameter.

    Parameters
    ----------
    lam
        Strength lambda. Paper: 1.10; 1 changes nothing.
    k_src
        Number of sources per image, at most the number of interior patches. Paper: 32, whatever the grid.
    layers
        Blocks whose output is edited. Paper: 0-11 for LLaVA-1.5-7B, others by table. ``auto``: the first 3/8 of the
        depth (the same share), not from the paper.
    diagnostic_layers
        Layers whose attention ranks the patches. Paper: 8-16 for every model; the default is the same share of the
        depth.
    text_queries
        Rows that vote: ``after_image`` (all text after the image) or ``last`` (the last prompt token).
    ownership
        ``topk_then_exclude``: the sources are fixed first and never receive; ``greedy_nms``: a patch claimed as
        neighbour can no longer be a source.
    neighbourhood
        ``8`` (paper), ``4`` or ``radius2``.
    source_selection
        ``attention`` or ``random`` (the paper's Uniform-Smooth control, drawn per sample).

    Examples
    --------
    >>> SCR(lam=1.2, k_src=16).k_src
    16
    """

    name: ClassVar[str] = "scr"
    summary: ClassVar[str] = "hands part of the most attended patches' hidden states to their neighbours"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    paper: ClassVar[Paper | None] = Paper(
        title="Beyond Dominant Patches: Spatial Credit Redistribution For Grounded Vision-Language Models",
        arxiv="2602.22469",
        where="Section 3, Eq. 1",
    )
    tags: ClassVar[Tags] = Tags(
        reads=frozenset({Point.SAMPLE_BEGIN, Point.ATTENTION_PROBS}),
        writes=frozenset({Point.HIDDEN_STATES}),
        spatial_grid=True,
        stochastic=True,
        forwards_per_sample=1.0,
    )

    lam: float = 1.10
    k_src: int = 32
    layers: str = "auto"
    diagnostic_layers: str = "0.25-0.5"
    text_queries: str = "after_image"
    ownership: str = "topk_then_exclude"
    neighbourhood: str = "8"
    source_selection: str = "attention"

    def __post_init__(self) -> None:
        self.require_finite("lam")
        self.require(self.lam >= 1.0, "lam", "be at least 1 (1 changes nothing)")
        self.require(self.k_src >= 1, "k_src", "be at least 1")
        self.require_option("text_queries", ("after_image", "last"))
        self.require_option("ownership", ("topk_then_exclude", "greedy_nms"))
        self.require_option("neighbourhood", ("8", "4", "radius2"))
        self.require_option("source_selection", ("attention", "random"))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Rank in a diagnostic pass, then edit whenever the picture's columns are computed."""
        early = f"0-{math.ceil(0.375 * model.layers) - 1}" if self.layers == "auto" else self.layers
        edited = parse_layers(early, model.layers, name=f"methods.{self.name}.layers")
        return [
            Subscription(point=Point.SAMPLE_BEGIN, where="asks for the diagnostic pass"),
            Subscription(
                point=Point.ATTENTION_PROBS,
                layers=self._ranking_layers(model),
                phases=frozenset({Phase.DIAGNOSTIC}),
                rows=self._queries,
                where="text after the image -> patches",
            ),
            Subscription(
                point=Point.HIDDEN_STATES,
                access=Access.WRITE,
                layers=edited,
                where=f"{self.k_src} source patches and their neighbours",
            ),
        ]

    def _ranking_layers(self, model: ModelFacts) -> tuple[int, ...]:
        return parse_layers(self.diagnostic_layers, model.layers, name=f"methods.{self.name}.diagnostic_layers")

    def _queries(self, layout: TokenLayout) -> Tensor:
        """Text rows that vote on some image, ``[B, L]``."""
        mask = torch.zeros_like(layout.valid)
        for row, spans in enumerate(layout.images):
            for span in spans:
                mask[row, self._voters(layout, row, span)] = True
        return mask

    def _voters(self, layout: TokenLayout, row: int, span: ImageSpan) -> Tensor:
        columns = layout.text_queries(row, span)
        return columns[-1:] if self.text_queries == "last" else columns

    # ------------------------------------------------------------------------------------------- pass 1: who dominates

    def on_sample_begin(self, event: Event, state: MethodState) -> None:
        """Rank the patches of every image (Section 3.2) and fix sources and owners once for all layers."""
        if self.lam == 1.0:
            return  # the identity costs no diagnostic pass
        state.attention = {}
        if self.source_selection == "attention":
            event.request.diagnose(state, last_layer=max(self._ranking_layers(event.request.facts)))
        sources: list[tuple[int, int]] = []
        owned: list[tuple[int, int]] = []
        owner: list[int] = []
        for row, spans in enumerate(event.layout.images):
            for span in spans:
                patches, owners = self._choose(event, state, row, span)
                columns = span.positions.tolist()
                place = {patch: len(sources) + index for index, patch in enumerate(patches)}
                sources += [(row, columns[patch]) for patch in patches]
                owned += [(row, columns[patch]) for patch in owners]
                owner += [place[patch] for patch in owners.values()]
        if sources:
            touched = [column for _, column in sources + owned]
            device = event.layout.roles.device
            places = torch.tensor(sources, device=device)
            state.edit = Edit(
                sources=places,
                owned=torch.tensor(owned, device=device).view(-1, 2),
                owner=torch.tensor(owner, device=device, dtype=torch.long),
                span=(min(touched), max(touched)),
            )
            state.count("sources", torch.bincount(places[:, 0], minlength=event.layout.rows))

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Sum A[h, t, v_i] over heads and voting text rows t, layer by layer (the mean has the same ranking)."""
        place = {int(position): index for index, position in enumerate(event.rows.tolist())}
        for row, spans in enumerate(event.layout.images):
            for span in spans:
                voters = [place[column] for column in self._voters(event.layout, row, span).tolist()]
                if not voters:
                    continue  # nothing was asked after this image: its ranking stays empty
                votes = event.probs[row][:, voters][:, :, span.positions].double().mean((0, 1))
                state.attention[row, span.image] = state.attention.get((row, span.image), 0.0) + votes

    def _choose(self, event: Event, state: MethodState, row: int, span: ImageSpan) -> tuple[list[int], dict[int, int]]:
        """Choose sources and owners on one image; none when no text follows it or its grid has no interior."""
        if span.grid is None:
            raise UnsupportedModel(f"{self.name} needs image tokens that form a grid")
        if self.source_selection == "random":
            rank = torch.rand(len(span.positions), generator=event.request.generators[row])
        elif (row, span.image) in state.attention:
            rank = state.attention[row, span.image]
        else:
            return [], {}
        return choose(rank.tolist(), span.grid, self.k_src, self.ownership, self.neighbourhood)

    # -------------------------------------------------------------------------------------------- pass 2: redistribute

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> Tensor | None:
        """x_n <- x_n + (lam - 1) x_s for owned neighbours, then x_s <- x_s / lam (Eq. 1)."""
        edit: Edit | None = state.get("edit")
        stop = event.start + event.hidden.shape[1]
        if edit is None or edit.span[1] < event.start or edit.span[0] >= stop:
            return None
        if edit.span[0] < event.start or edit.span[1] >= stop:
            raise UnsupportedModel(f"{self.name} needs all image tokens in one forward; leave prefill_chunk_size unset")
        hidden = event.hidden.clone()
        source, column = edit.sources[:, 0], edit.sources[:, 1] - event.start
        snapshot = event.hidden[source, column]
        hidden[edit.owned[:, 0], edit.owned[:, 1] - event.start] += (self.lam - 1.0) * snapshot[edit.owner]
        hidden[source, column] = snapshot / self.lam
        return hidden

    @classmethod
    def identity(cls) -> Self:
        """Lambda of 1."""
        return cls(lam=1.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return the main variants with few sources."""
        return [
            {"lam": 1.5, "k_src": 4},
            {"lam": 1.3, "k_src": 3, "ownership": "greedy_nms", "text_queries": "last", "diagnostic_layers": "all"},
            {"lam": 1.4, "k_src": 2, "source_selection": "random", "neighbourhood": "radius2", "layers": "all"},
        ]


def choose(
    rank: list[float], grid: tuple[int, int], k_src: int, ownership: str, neighbourhood: str
) -> tuple[list[int], dict[int, int]]:
    """Choose source patches and who owns which neighbour.

    Parameters
    ----------
    rank
        Attention per patch in raster order; ties go to the earlier patch.
    grid
        ``(rows, columns)``; border patches cannot be sources but can be neighbours.
    k_src
        Most sources to choose.
    ownership, neighbourhood
        See `SCR`.

    Returns
    -------
    tuple
        Sources by descending attention, and neighbour -> owning source.
    """
    order = sorted(interior(grid), key=lambda patch: -rank[patch])
    owners: dict[int, int] = {}
    sources: list[int] = []
    fixed = set(order[:k_src]) if ownership == "topk_then_exclude" else set()
    for patch in order:
        if len(sources) == k_src:
            break
        if patch in owners:
            continue
        sources.append(patch)
        for near in neighbours(patch, grid, neighbourhood):
            if near not in fixed and near not in sources:
                owners.setdefault(near, patch)
    return sources, owners
