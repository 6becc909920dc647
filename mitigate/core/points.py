"""Intervention points, subscriptions and the events handlers receive: the only place where shapes are written.

Shapes: B request rows, H query heads, R rows asked for, K keys, D width, V vocabulary, L columns of the padded
sequence.
Positions are columns of the left-padded sequence, so a key index of the cache is a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout
    from mitigate.core.request import Request


class Point(StrEnum):
    """Where a method can act, in the order of a forward. A handler of a point is the method ``on_<value>``."""

    TEXT_INPUT = "text_input"
    IMAGE_INPUT = "image_input"
    VISION = "vision"
    VISUAL_EMBEDDINGS = "visual_embeddings"
    SAMPLE_BEGIN = "sample_begin"
    STEP_BEGIN = "step_begin"
    ATTENTION_MASK = "attention_mask"
    ATTENTION_SCORES = "attention_scores"
    ATTENTION_PROBS = "attention_probs"
    VALUE_SCALE = "value_scale"
    HEAD_OUTPUT = "head_output"
    MLP_OUTPUT = "mlp_output"
    HIDDEN_STATES = "hidden_states"
    LOGIT_LENS = "logit_lens"
    NEXT_TOKEN_LOGITS = "next_token_logits"
    PREFILL_END = "prefill_end"
    STEP_END = "step_end"
    SELECT_TOKEN = "select_token"
    TOKEN_CHOSEN = "token_chosen"
    DRIVE_DECODING = "drive_decoding"
    SAMPLE_END = "sample_end"


class Phase(StrEnum):
    """Which pass of the model an event belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"
    DIAGNOSTIC = "diagnostic"
    LOOKAHEAD = "lookahead"


class Rows(StrEnum):
    """Which query rows of a forward a subscription asks for.

    ``last``: the last row, which predicts the next token. ``predictors``: every row that predicts a generated token:
    the last prompt row and all generated ones (with a cache the same single row; without one, all of them).
    """

    LAST = "last"
    PREDICTORS = "predictors"
    ALL = "all"


class Access(StrEnum):
    """What a subscription does with the value.

    The last three read attention weights as all writers of the layer left them, whatever their place in the stack:
    ``observe`` reads only; ``gradient`` has d(scalar)/d(weights) too; ``direct`` approximates it without a graph, along
    the direct path from the head's output through the frozen final norm to the logits.
    """

    READ = "read"
    WRITE = "write"
    OBSERVE = "observe"
    GRADIENT = "gradient"
    DIRECT = "direct"


#: Accesses that see a layer's final attention weights.
FINAL = frozenset({Access.OBSERVE, Access.GRADIENT, Access.DIRECT})
#: Accesses that can ask for gradients of the logits.
DIFFERENTIATES = frozenset({Access.GRADIENT, Access.DIRECT})

#: A position set: given the layout, the rows wanted, as a mask ``[B, L]`` over the padded sequence.
PositionSet: TypeAlias = "Callable[[TokenLayout], Tensor]"

MAIN_PHASES = frozenset({Phase.PREFILL, Phase.DECODE})

#: Points the bus serves per decoder layer; a subscription to them needs layers.
LAYER_POINTS = frozenset(
    {
        Point.VISION,
        Point.ATTENTION_MASK,
        Point.ATTENTION_SCORES,
        Point.ATTENTION_PROBS,
        Point.VALUE_SCALE,
        Point.HEAD_OUTPUT,
        Point.MLP_OUTPUT,
        Point.HIDDEN_STATES,
        Point.LOGIT_LENS,
    }
)
#: Points inside an attention layer; a subscription to them says which query rows it needs.
ROW_POINTS = frozenset({Point.ATTENTION_SCORES, Point.ATTENTION_PROBS})


@dataclass(frozen=True, kw_only=True)
class Subscription:
    """A method's wish to be called at a point.

    Parameters
    ----------
    point
        Where.
    access
        Whether the handler reads, writes (may return a new value) or needs gradients.
    layers
        Zero-based decoder layers; empty for points that are not per layer.
    phases
        Passes in which the handler is called.
    rows
        For attention points: which query rows; a `Rows` value or a function from the layout to a mask ``[B, L]``.
    where
        One phrase for ``mitigate plan``: which part of the value the handler touches.
    """

    point: Point
    access: Access = Access.READ
    layers: tuple[int, ...] = ()
    phases: frozenset[Phase] = MAIN_PHASES
    rows: Rows | PositionSet = Rows.PREDICTORS
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What every handler learns: which pass, which step, and the request (layout, services).

    Parameters
    ----------
    phase
        Pass this event belongs to.
    step
        Number of tokens generated so far (0 until the first token is chosen).
    branch
        ``main`` or the name of an extra stream.
    request
        The running request: its layout, per-sample random generators and services.
    """

    phase: Phase
    step: int
    branch: str
    request: Request

    @property
    def layout(self) -> TokenLayout:
        """Token roles of every request row (B rows), current up to the keys of this forward."""
        return self.request.layout


@dataclass(frozen=True, kw_only=True)
class AttentionScores(Event):
    """Scaled scores before softmax, masked entries at the dtype's minimum.

    Parameters
    ----------
    scores
        ``[B, H, R, K]`` float32 (float64 for a float64 model).
    rows
        ``[R]`` positions of the query rows.
    row_mask
        ``[B, R]`` True where the row was asked for and belongs to an unfinished sample; other rows stay as they are.
    """

    layer: int
    scores: Tensor
    rows: Tensor
    row_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionProbs(Event):
    """Attention weights after softmax.

    Parameters
    ----------
    probs
        ``[B, H, R, K]``, dtype as in `AttentionScores`; rows sum to 1 unless an earlier method of the stack changed
        that.
    rows
        ``[R]`` positions of the query rows.
    row_mask
        ``[B, R]`` as in `AttentionScores`.
    """

    layer: int
    probs: Tensor
    rows: Tensor
    row_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Event):
    """Output of a decoder block (residual stream after its second addition).

    Parameters
    ----------
    hidden
        ``[B, Q, D]`` in the model's dtype.
    start
        Position of the first of the Q rows.
    """

    layer: int
    hidden: Tensor
    start: int


@dataclass(frozen=True, kw_only=True)
class VisualEmbeddings(Event):
    """Projected image features, before they are merged into the sequence.

    Parameters
    ----------
    features
        One ``[N, D]`` tensor per image, in the order of ``layout.images``.
    """

    features: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class NextTokenLogits(Event):
    """Raw logits of the next token, before logits processors and warpers.

    Parameters
    ----------
    logits
        ``[B, V]``.
    """

    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A method's choice: ``token`` ``[B]`` where ``chosen`` ``[B]`` is True; elsewhere the plain decoding decides."""

    token: Tensor
    chosen: Tensor


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """The end of a step: what the next token is, or was, chosen from.

    Parameters
    ----------
    logits
        ``[B, V]`` float32, raw (before processors), detached.
    scores
        ``[B, V]`` float32 after the caller's logits processors: what plain decoding would choose from.
    active
        ``[B]`` True for samples that are still being generated.
    differentiates
        Layers whose attention gradients the method asked for, and how.
    """

    logits: Tensor
    scores: Tensor
    active: Tensor
    differentiates: Mapping[int, Access]

    def attention_gradients(self, cotangent: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Gradient of ``(cotangent * logits).sum()`` with respect to the predictor row's attention weights.

        Every sample's row depends on its own logits only, so one call serves a whole batch. With access ``direct``
        the gradient is approximated (`Access`).

        Parameters
        ----------
        cotangent
            ``[B, V]``; rows of zeros for samples that need no gradient.

        Returns
        -------
        dict
            Layer -> ``(A, dA)``, each ``[B, H, K]``, for the layers the method subscribed to with
            ``access="gradient"`` or ``"direct"``.
        """
        return self.request.attention_gradients(self.differentiates, cotangent)


@dataclass(frozen=True, kw_only=True)
class SelectToken(Step):
    """The moment of choosing the next token."""


@dataclass(frozen=True, kw_only=True)
class TokenChosen(Step):
    """The next token is chosen; the step's graph is still there.

    Parameters
    ----------
    tokens
        ``[B]``; the padding token where a sample has finished.
    """

    tokens: Tensor
