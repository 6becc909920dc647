"""SCR: spread the credit of the most attended image patches to their neighbours, before decoding starts."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

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
    Role,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.errors import ConfigError, UnsupportedModel
from mitigate.lazy import torch
from mitigate.ops import spatial

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout
    from mitigate.core.request import Request

_DIAGNOSTIC = frozenset({Phase.DIAGNOSTIC})


@dataclass(frozen=True, kw_only=True)
class SCR(Method):
    """Spatial Credit Redistribution: two passes over the prompt.

    Attention is said to collapse on a few dominant patches; what lies beside them is overlooked. A diagnostic pass
    ranks interior patches by the attention of the text after the picture. Each of the ``k_src`` strongest then hands
    ``lam - 1`` of its hidden state to the neighbours it owns and is divided by ``lam``, after each early block (Eq. 1).

    Paper: arXiv 2602.22469 v1, Section 3 and Eq. 1; no code was found. Where v1 is silent the choice is a parameter.

    Parameters
    ----------
    lam
        Strength lambda. Paper: 1.10; 1 changes nothing.
    k_src
        Number of sources per image, at most the number of candidates. Paper: 32, whatever the grid.
    layers
        Blocks whose output is edited. Paper: 0-11 for LLaVA-1.5-7B, others by table. ``auto``: the first 3/8 of the
        depth (the same share), not from the paper.
    schedule
        ``every_layer`` of `layers`, or only the first of them (``once``). The norms the paper reports need the former.
    diagnostic_layers
        Layers whose attention ranks the patches. Paper: 8-16 for every model; the default is the same share of the
        depth. Numbers beyond the depth stand for the last layer.
    text_queries
        Rows that vote: ``after_image`` (all text after the image), ``last`` (the last of them) or ``question_only``
        (the user's words; needs the processor). The paper says "text query positions".
    head_fraction
        Share of the heads whose attention is averaged: in every layer those that look at the image most. Paper: all; an
        ablation acts on 20 % and does not say how, this reading is ours.
    source_selection
        ``attention`` or ``random`` (the paper's Uniform-Smooth control, drawn per sample).
    exclude_border
        Whether patches on the border cannot be sources (paper); neighbours they may be.
    neighbourhood
        ``8`` (paper), ``4`` or ``radius2``.
    ownership
        ``topk_then_exclude``: the sources are fixed first and never receive; ``greedy_nms``: a patch claimed as
        neighbour can no longer be a source.
    injection
        What neighbours receive: ``neighbour_copy`` (Eq. 1) or ``gaussian_noise`` of the same norm (the paper's control;
        drawn per sample, layer and neighbour).
    tile_mode
        For models that cut a picture into tiles: ``pooled`` (tiles are rasters of their own, ranked together),
        ``per_tile_k`` (`k_src` in each tile), ``stitched`` (one raster across the seams) or ``thumbnail_only``. Not in
        the paper.
    multi_image
        Several images in a prompt: ``independent`` (`k_src` for each) or ``pooled`` (`k_src` for all together); the
        same with ``per_tile_k``. Not in the paper.
    cache_per_image
        Reuse an image's first ranking for other questions about it: saves passes, but results then depend on the order
        of the questions. Not in the paper.
    truncate_pass1
        End the diagnostic pass after the last layer that is read; the result is the same.
    entropy
        Which entropy over the patches is traced: ``attention`` (of A; always counted) or ``norm`` (of the mean norms in
        the edited layers during the diagnostic pass; counted as well).

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
        reads=frozenset({Point.SAMPLE_BEGIN, Point.ATTENTION_PROBS, Point.HIDDEN_STATES}),
        writes=frozenset({Point.HIDDEN_STATES}),
        spatial_grid=True,
        stochastic=True,
        forwards_per_sample=1.0,
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "absolute_layers": {"diagnostic_layers": "8-16"},
        "uniform_smooth": {"source_selection": "random"},
        "gaussian_noise": {"injection": "gaussian_noise"},
        "four_connected": {"neighbourhood": "4"},
        "radius2": {"neighbourhood": "radius2"},
        "head_selective": {"head_fraction": 0.2},
    }
    preset_fidelity: ClassVar[Mapping[str, Fidelity]] = {
        "uniform_smooth": Fidelity.CONTROL,
        "gaussian_noise": Fidelity.CONTROL,
        "head_selective": Fidelity.RECONSTRUCTED,
    }

    lam: float = 1.10
    k_src: int = 32
    layers: str = "auto"
    schedule: str = "every_layer"
    diagnostic_layers: str = "0.25-0.5"
    text_queries: str = "after_image"
    head_fraction: float = 1.0
    source_selection: str = "attention"
    exclude_border: bool = True
    neighbourhood: str = "8"
    ownership: str = "topk_then_exclude"
    injection: str = "neighbour_copy"
    tile_mode: Annotated[str, "not seen on tiny models"] = "pooled"
    multi_image: str = "independent"
    cache_per_image: bool = False
    truncate_pass1: bool = True
    entropy: str = "attention"

    def __post_init__(self) -> None:
        self.require_finite("lam", "head_fraction")
        self.require(self.lam >= 1.0, "lam", "be at least 1 (1 changes nothing)")
        self.require(self.k_src >= 1, "k_src", "be at least 1")
        self.require(0.0 < self.head_fraction <= 1.0, "head_fraction", "be above 0 and at most 1")
        self.require_option("schedule", ("every_layer", "once"))
        self.require_option("text_queries", ("after_image", "last", "question_only"))
        self.require_option("source_selection", ("attention", "random"))
        self.require_option("neighbourhood", tuple(spatial.NEIGHBOURHOODS))
        self.require_option("ownership", spatial.OWNERSHIPS)
        self.require_option("injection", ("neighbour_copy", "gaussian_noise"))
        self.require_option("tile_mode", spatial.TILE_MODES)
        self.require_option("multi_image", ("independent", "pooled"))
        self.require_option("entropy", ("attention", "norm"))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Rank in a diagnostic pass, then edit whenever the picture's columns are computed."""
        ranking, edited = self._ranking_layers(model), self._edited_layers(model)
        rows, target = "text after the image -> patches", f"{self.k_src} source patches and their neighbours"
        attention, hidden = Point.ATTENTION_PROBS, Point.HIDDEN_STATES
        wanted = [
            Subscription(point=Point.SAMPLE_BEGIN, where="chooses the sources"),
            Subscription(point=attention, layers=ranking, phases=_DIAGNOSTIC, rows=self._queries, where=rows),
            Subscription(point=hidden, access=Access.WRITE, layers=edited, where=target, roles=frozenset({Role.IMAGE})),
        ]
        if self.entropy == "norm":
            wanted.append(Subscription(point=hidden, layers=edited, phases=_DIAGNOSTIC, where="norms of the patches"))
        return wanted

    def _edited_layers(self, model: ModelFacts) -> tuple[int, ...]:
        early = f"0-{math.ceil(0.375 * model.layers) - 1}" if self.layers == "auto" else self.layers
        edited = parse_layers(early, model.layers, name=f"methods.{self.name}.layers")
        return edited[:1] if self.schedule == "once" else edited

    def _ranking_layers(self, model: ModelFacts) -> tuple[int, ...]:
        def clamped(number: re.Match[str]) -> str:
            return str(min(int(number[0]), model.layers - 1))

        text = re.sub(r"(?<![\d.])\d+(?![\d.])", clamped, self.diagnostic_layers)
        return parse_layers(text, model.layers, name=f"methods.{self.name}.diagnostic_layers")

    def _queries(self, layout: TokenLayout) -> Tensor:
        """Text rows that vote on some image, ``[B, L]``."""
        mask = torch.zeros_like(layout.valid)
        for row in range(layout.rows):
            for picture in spatial.Picture.all_of(layout, row):
                mask[row, self._voters(layout, picture)] = True
        return mask

    def _voters(self, layout: TokenLayout, picture: spatial.Picture) -> Tensor:
        """Columns of the text that votes on an image: it follows the image's last token, ``[n]``."""
        row = picture.place[0]
        columns = layout.text_queries(row, max(picture.spans, key=lambda span: span.stop))
        if self.text_queries == "question_only":
            if layout.question is None:
                raise ConfigError(
                    f"methods.{self.name}.text_queries=question_only needs to know the user's words: attach with the"
                    " processor and use its chat template, or choose after_image"
                )
            columns = columns[layout.question[row, columns]]
        return columns[-1:] if self.text_queries == "last" else columns

    # ------------------------------------------------------------------------------------------- pass 1: who dominates

    def on_sample_begin(self, event: Event, state: MethodState) -> None:
        """Rank the patches of every image (Section 3.2) and fix sources and owners once for all layers."""
        if self.lam == 1.0:
            return  # the identity costs no diagnostic pass
        layout, request = event.layout, event.request
        copies = layout.rows // request.samples
        samples = [spatial.Picture.all_of(layout, row) for row in range(0, layout.rows, copies)]
        state.pictures = [picture for pictures in samples for picture in pictures]
        if self.source_selection == "random":
            for picture in state.pictures:
                picture.rank = torch.rand(len(picture.columns), generator=request.generators[picture.place[0]])
        else:
            self._rank(event, state)
        roles = [each for pictures in samples for each in [self._choose(request, pictures)] * copies]
        if self.injection == "gaussian_noise":
            seeds = [int(torch.randint(2**62, (), generator=own)) for own in request.generators[::copies]]
            state.noise = [(seeds[row // copies], len(owners)) for row, (_, owners) in enumerate(roles)]
        state.transfer = spatial.Transfer.of(roles, layout.roles.device)
        state.count("sources", torch.tensor([len(sources) for sources, _ in roles]))
        state.count("neighbours", torch.tensor([len(owners) for _, owners in roles]))
        entropy = self._count_entropy(samples, copies, state)
        if state.tracing:
            sources, owned = zip(*roles, strict=True)
            owners = [list(each.values()) for each in owned]
            state.trace(event, sources=list(sources), neighbours=[*map(list, owned)], owners=owners, entropy=entropy)

    def _rank(self, event: Event, state: MethodState) -> None:
        """A_i of every image some text asks about: the mean over layers, heads and voters (Section 3.2)."""
        request, facts = event.request, event.request.facts
        ranking, edited = self._ranking_layers(facts), self._edited_layers(facts)
        last = max((*ranking, *edited) if self.entropy == "norm" else ranking)
        state.voters = [(each, rows) for each in state.pictures if len(rows := self._voters(event.layout, each))]
        state.maps, state.norms = {}, {}
        rows = torch.tensor([each.place[0] for each, _ in state.voters], dtype=torch.long)
        asked = torch.bincount(rows, minlength=event.layout.rows) > 0
        diagnose = partial(request.diagnose, state, last_layer=last if self.truncate_pass1 else None, where=asked)
        if state.voters and not self.cache_per_image:
            diagnose()

        def measured(picture: spatial.Picture) -> tuple[Tensor, Tensor | None]:
            if not state.maps:
                diagnose()  # one pass measures the whole batch
            norms = state.norms.get(picture.place)
            attention: Tensor = state.maps[picture.place]
            return attention.cpu() / len(ranking), None if norms is None else norms.cpu() / len(edited)

        settings = (self.name, ranking, edited, self.text_queries, self.head_fraction, self.entropy)
        for picture, _ in state.voters:
            if self.cache_per_image:
                key = (*settings, request.image_key(picture.place[1]))
                picture.rank, picture.norms = request.shared(key, partial(measured, picture))
            else:
                picture.rank, picture.norms = measured(picture)

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Sum A[h, t, v_i] over layers, averaged over heads and voting text rows t; ``heads`` is ``[H, N]``."""
        for picture, voters in state.voters:
            rows = torch.searchsorted(event.rows, voters.to(event.rows.device)).to(event.probs.device)
            heads = event.probs[picture.place[0]][:, rows][:, :, picture.columns.to(rows.device)].double().mean(1)
            if self.head_fraction < 1.0:
                kept = math.ceil(self.head_fraction * len(heads))
                heads = heads[heads.sum(-1).sort(descending=True, stable=True).indices[:kept]]
            state.maps[picture.place] = state.maps.get(picture.place, 0.0) + heads.mean(0).to(picture.columns.device)

    def _choose(self, request: Request, pictures: Sequence[spatial.Picture]) -> spatial.Roles:
        """Choose a sample's sources by descending A, and who owns which neighbour; patches are columns."""
        rank: dict[int, float] = {}
        groups: list[list[spatial.Raster]] = []
        for picture in pictures:
            if picture.rank is not None:
                rank.update(zip(picture.columns.tolist(), picture.rank.tolist(), strict=True))
                groups += picture.arranged(self.tile_mode)
        if any(raster.degenerate for group in groups for raster in group):
            text = f"{self.name} leaves images of fewer than 3 rows or columns of patches alone"
            request.shared((self.name, "thin"), lambda: warnings.warn(text, stacklevel=2))  # once per attached stack
        if self.multi_image == "pooled" and self.tile_mode != "per_tile_k":
            groups = [[raster for group in groups for raster in group]]
        sources: list[int] = []
        owners: dict[int, int] = {}
        for group in groups:
            some, owned = spatial.choose(
                rank, group, self.k_src, self.ownership, self.neighbourhood, exclude_border=self.exclude_border
            )
            sources, owners = sources + some, owners | owned
        return sources, dict(sorted(owners.items()))

    # -------------------------------------------------------------------------------------------- pass 2: redistribute

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> Tensor | None:
        """x_n <- x_n + (lam - 1) x_s for owned neighbours, then x_s <- x_s / lam (Eq. 1)."""
        if event.phase is Phase.DIAGNOSTIC:
            self._add_norms(event, state)
            return None
        transfer: spatial.Transfer | None = state.get("transfer")
        stop = event.start + event.hidden.shape[1]
        if transfer is None or transfer.span[1] < event.start or transfer.span[0] >= stop:
            return None
        if transfer.span[0] < event.start or transfer.span[1] >= stop:
            raise UnsupportedModel(f"{self.name} needs all image tokens in one forward; leave prefill_chunk_size unset")
        hidden, transfer = event.hidden.clone(), transfer.to(event.hidden.device)
        source, column = transfer.givers[:, 0], transfer.givers[:, 1] - event.start
        snapshot = event.hidden[source, column]
        given = (self.lam - 1.0) * snapshot[transfer.giver]
        if self.injection == "gaussian_noise":
            given = spatial.noise_like(given, state.noise, event.layer)
        hidden[transfer.takers[:, 0], transfer.takers[:, 1] - event.start] += given
        hidden[source, column] = snapshot / self.lam
        if event.phase is Phase.PREFILL:
            self._count_growth(event, hidden, state)
        return hidden

    # ------------------------------------------------------------------------------------------------------- reporting

    def _add_norms(self, event: HiddenStates, state: MethodState) -> None:
        """Sum the norms of the unedited patches over the layers that will be edited."""
        for picture, _ in state.voters:
            norms = spatial.norms(event.hidden[picture.place[0]]).to(picture.columns.device)
            state.norms[picture.place] = state.norms.get(picture.place, 0.0) + norms[picture.columns - event.start]

    def _count_entropy(self, samples: Sequence[Sequence[spatial.Picture]], copies: int, state: MethodState) -> Tensor:
        """Count entropies over an image's patches, averaged over a sample's ranked images; return the last, ``[B]``."""
        found = torch.full((len(samples) * copies,), math.nan)
        if self.source_selection == "random":
            return found
        ranked = [[picture for picture in pictures if picture.rank is not None] for pictures in samples]
        for kind in ("attention", "norm") if self.entropy == "norm" else ("attention",):
            weights = [[each.rank if kind == "attention" else each.norms for each in pictures] for pictures in ranked]
            means = torch.tensor([_mean_entropy(maps) for maps in weights], dtype=torch.float64)
            found = means.repeat_interleave(copies)
            state.count(f"{kind}_entropy", found.nan_to_num(0.0) / copies)  # a sample's, not the sum of its copies'
        state.count("images_ranked", torch.tensor([len(each) / copies for each in ranked]).repeat_interleave(copies))
        return found

    def _count_growth(self, event: HiddenStates, hidden: Tensor, state: MethodState) -> None:
        """Count by how much the edits multiply the summed norms of what they touch, and of all patches, ``[B]``.

        The ratio after / before an edit, multiplied over the edited layers.
        """
        transfer, stop = state.transfer, event.start + hidden.shape[1]
        places = state.once("places", transfer, lambda: spatial.patch_places(event.layout, event.start, stop))
        touched = torch.cat((transfer.givers, transfer.takers))
        before, after = (spatial.norm_sums(states, touched, event.start) for states in (event.hidden, hidden))
        patches = spatial.norm_sums(event.hidden, places, event.start)
        ratios = torch.stack((after / before, (patches + after - before) / patches))
        state.growth = ratios * state.get("growth", 1.0)
        if event.layer == self._edited_layers(event.request.facts)[-1]:
            growth = torch.where(before > 0, state.growth, 0.0) * event.request.samples / event.layout.rows
            state.count("norm_growth", growth[0])
            state.count("norm_growth_visual", growth[1])

    # -------------------------------------------------------------------------------------------------------- variants

    @classmethod
    def identity(cls) -> Self:
        """Lambda of 1."""
        return cls(lam=1.0)

    def ablations(self, telemetry: Mapping[str, float]) -> dict[str, Method]:
        """Return the paper's ablations: two other neighbourhoods, random sources, noise instead of neighbours."""
        return {
            "4-connected": dataclasses.replace(self, neighbourhood="4"),
            "radius2": dataclasses.replace(self, neighbourhood="radius2"),
            "uniform-smooth": dataclasses.replace(self, source_selection="random"),
            "gaussian-noise": dataclasses.replace(self, injection="gaussian_noise"),
        }

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return the main variants."""
        return [
            {"lam": 1.5, "k_src": 4, "schedule": "once", "entropy": "norm", "truncate_pass1": False},
            {"ownership": "greedy_nms", "text_queries": "last", "diagnostic_layers": "all", "multi_image": "pooled"},
            {"source_selection": "random", "neighbourhood": "radius2", "layers": "all", "tile_mode": "stitched"},
            {"injection": "gaussian_noise", "head_fraction": 0.5, "exclude_border": False, "cache_per_image": True},
        ]


def _mean_entropy(maps: Sequence[Tensor | None]) -> float:
    """Entropy in nats of each map of weights, renormalised to sum 1; the mean, NaN without maps."""
    shares = [weights.double() / weights.double().sum().clamp_min(1e-300) for weights in maps if weights is not None]
    return sum(float(torch.special.entr(share).sum()) for share in shares) / len(shares) if shares else math.nan
