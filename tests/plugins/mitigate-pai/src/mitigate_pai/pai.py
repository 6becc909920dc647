"""PAI: more attention to the picture, and less weight for what the text alone would say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    AttentionScores,
    Branch,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    NextTokenLogits,
    Paper,
    Point,
    Role,
    Rows,
    Subscription,
    Tags,
    parse_layers,
)
from mitigate.lazy import torch

if TYPE_CHECKING:
    from mitigate.core.layout import TokenLayout
    from torch import Tensor


def after_image(layout: TokenLayout) -> Tensor:
    """Rows of the text after a sample's last picture, generated ones included, ``[B, L]``."""
    columns = torch.arange(layout.length, device=layout.valid.device)
    return layout.valid & (columns >= layout.after_image[:, None])


@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Pay Attention to Image: raise the attention to the picture, then guide away from a text-only model.

    A model that goes on from its own words says much the same whether it sees the picture or not. PAI acts against
    this twice. Where a token is predicted, the scores on the picture's keys become ``s + alpha |s|`` (a negative score
    rises too). And the logits are moved away from those of the same text without the picture,
    ``l_u + gamma (l - l_u)``, among the tokens that the model finds plausible: ``l >= max l + ln(cut_off)``. The
    attention is edited in the stream with the picture only. Rows without a picture stay as they are.

    Paper: arXiv 2407.21771 (ECCV 2024). Values are those of the authors' repository, which contradicts itself:
    README.md of this package says how, and which preset stands for what.

    Parameters
    ----------
    alpha
        Gain of the scores on the picture's keys. Repository: 0.2; 0.5 in a third party's reproduction with long LLaVA
        captions. 0 leaves the attention alone.
    gamma
        Guidance scale. Repository: 1.1 in its README, 2 on its command line. 1 needs no second stream.
    cut_off
        Tokens less probable than this share of the most probable one are dropped. Repository: 0.1. 0 drops none.
    layers
        Decoder layers whose attention is edited: ``all``, ``2-``, ``9-14``, ``0.25-0.5``. Repository: 2 to the last.
    rows
        Query rows that are edited: ``predicting`` (the last prompt row and every generated one) or ``after_image`` (the
        question's rows too).
    guidance_on
        ``log_probs`` (repository) and ``logits`` give the same distribution; ``probs`` guides the probabilities, as the
        paper prints it.
    cut_off_from
        Distribution that decides on plausibility: the ``image`` stream's (repository) or the ``guided`` one.

    Examples
    --------
    >>> PAI(alpha=0.5).gamma
    1.1
    """

    name: ClassVar[str] = "pai"
    summary: ClassVar[str] = "more attention to the picture, guidance away from what the text alone would say"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    paper: ClassVar[Paper | None] = Paper(
        title="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        arxiv="2407.21771",
        where="attention and logit refinement; values of the authors' repository",
    )
    tags: ClassVar[Tags] = Tags(
        writes=frozenset({Point.ATTENTION_SCORES, Point.NEXT_TOKEN_LOGITS}), forwards_per_token=1
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "command_line": {"gamma": 2.0},
        "long_captions": {"alpha": 0.5},
        "as_printed": {"guidance_on": "probs"},
        "attention": {"gamma": 1.0, "cut_off": 0.0},
        "cut_off": {"alpha": 0.0, "gamma": 1.0},
    }
    preset_fidelity: ClassVar[dict[str, Fidelity]] = {
        "long_captions": Fidelity.RECONSTRUCTED,
        "as_printed": Fidelity.RECONSTRUCTED,
        "cut_off": Fidelity.CONTROL,
    }

    alpha: float = 0.2
    gamma: float = 1.1
    cut_off: float = 0.1
    layers: str = "2-"
    rows: str = "predicting"
    guidance_on: str = "log_probs"
    cut_off_from: str = "image"

    def __post_init__(self) -> None:
        self.require_finite("alpha", "gamma")
        self.require(self.alpha >= 0.0, "alpha", "not be negative")
        self.require(self.gamma >= 1.0, "gamma", "be at least 1 (1: no guidance)")
        self.require(0.0 <= self.cut_off <= 1.0, "cut_off", "be between 0 (nothing is dropped) and 1")
        self.require_option("rows", ("predicting", "after_image"))
        self.require_option("guidance_on", ("log_probs", "logits", "probs"))
        self.require_option("cut_off_from", ("image", "guided"))

    def branches(self) -> list[Branch]:
        """Ask for the same prompt without its pictures, unless there is nothing to guide."""
        return [] if self.gamma == 1.0 else [Branch(name="text", images=False)]

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Edit the scores of the layers, then the logits; both in the main stream."""
        wanted = []
        if self.alpha != 0.0:
            layers = parse_layers(self.layers, model.layers, name=f"methods.{self.name}.layers")
            rows = Rows.PREDICTORS if self.rows == "predicting" else after_image
            point, roles, where = Point.ATTENTION_SCORES, frozenset({Role.IMAGE}), "keys of images"
            wanted.append(
                Subscription(point=point, access=Access.WRITE, layers=layers, rows=rows, roles=roles, where=where)
            )
        if self.gamma != 1.0 or self.cut_off != 0.0:
            where = "samples with an image"
            wanted.append(Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE, where=where))
        return wanted

    def on_attention_scores(self, event: AttentionScores, state: MethodState) -> Tensor | None:
        """Set s <- s + alpha |s| on the picture's keys."""
        if not any(event.layout.images):
            return None
        keys = state.once("keys", event.rows, lambda: self._keys(event))
        raised = torch.where(keys, event.scores + self.alpha * event.scores.abs(), event.scores)
        if state.tracing:
            before, after = ((z.softmax(-1) * keys).sum(-1)[:, :, -1].mean(1) for z in (event.scores, raised))
            state.trace(event, image_mass_before=before, image_mass=after)
        return raised

    def _keys(self, event: AttentionScores) -> Tensor:
        """Keys of pictures that come before the query row, ``[B, 1, R, K]``."""
        rows = event.rows.to(event.scores.device)
        columns = torch.arange(event.scores.shape[-1], device=rows.device)
        images = event.layout.image_mask.to(rows.device)[:, None, : len(columns)]
        # a masked key must stay masked: s + alpha |s| would raise the minimum that stands for "not visible"
        return (images & (columns <= rows[:, None]))[:, None]

    def on_next_token_logits(self, event: NextTokenLogits, state: MethodState) -> Tensor | None:
        """Return l_u + gamma (l - l_u), and minus infinity for tokens that are not plausible."""
        if not any(event.layout.images):
            return None
        seen = torch.tensor([bool(spans) for spans in event.layout.images], device=event.logits.device)
        active = seen & ~event.request.finished.to(seen.device)
        logits = event.logits.to(torch.promote_types(event.logits.dtype, torch.float32))
        guided = logits if self.gamma == 1.0 else self._guided(logits, event.branch_logits("text").to(logits.dtype))
        if self.cut_off != 0.0:
            judge = logits if self.cut_off_from == "image" else guided
            dropped = judge < judge.amax(-1, keepdim=True) + math.log(self.cut_off)
            state.count("tokens_dropped", (dropped & guided.isfinite()).sum(-1), active)
            guided = guided.masked_fill(dropped, -math.inf)
        best, guided_best = logits.argmax(-1), guided.argmax(-1)
        state.count("argmax_changed", best != guided_best, active)
        if state.tracing:
            state.trace(event, plausible=guided.isfinite().sum(-1), argmax=best, guided_argmax=guided_best)
        return torch.where(seen[:, None], guided.to(event.logits.dtype), event.logits)

    def _guided(self, logits: Tensor, text: Tensor) -> Tensor:
        """Move away from the text-only stream, ``[B, V]``."""
        if self.guidance_on == "probs":
            probs = self.gamma * logits.softmax(-1) - (self.gamma - 1.0) * text.softmax(-1)
            return probs.clamp_min(0.0).log()
        if self.guidance_on == "log_probs":
            logits, text = logits.log_softmax(-1), text.log_softmax(-1)
        return text + self.gamma * (logits - text)

    @classmethod
    def identity(cls) -> Self:
        """Attention as it is, no guidance, nothing dropped: no second stream either."""
        return cls(alpha=0.0, gamma=1.0, cut_off=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return every switch once."""
        return [
            {"alpha": 0.5, "gamma": 2.0, "layers": "all"},
            {"alpha": 1.0, "layers": "1-2", "rows": "after_image", "guidance_on": "logits"},
            {"alpha": 0.5, "gamma": 1.5, "guidance_on": "probs", "cut_off": 0.3},
            {"gamma": 3.0, "cut_off": 0.01, "cut_off_from": "guided"},
        ]
