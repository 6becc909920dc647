"""The events handlers receive: the only place where shapes are written.

Shapes: B request rows, H query heads, R rows asked for, Q rows of the forward, K keys, D width, V vocabulary, L columns
of the padded sequence.
Positions are columns of the left-padded sequence, so a key index of the cache is a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitigate.core.points import Access, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout
    from mitigate.core.request import Request


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
class TextInput(Event):
    """The prompts of a branch before it starts; ``layout`` is still that of the main stream.

    Parameters
    ----------
    ids
        One tensor ``[n]`` of token ids per request row, without padding, image placeholders included. The handler
        returns such a list; `Request.tokenize` makes tokens of words.
    """

    ids: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageInput(Event):
    """The images of a stream as the processor made them, before the model encodes them.

    Parameters
    ----------
    images
        One tensor of pixels per image (normalised; the family decides on its shape), in the order of
        ``layout.images``. The handler returns such a list.
    rows
        Request row of each image (the first of a sample's copies), for its random generator.
    """

    images: list[Tensor]
    rows: list[int]


@dataclass(frozen=True, kw_only=True)
class Vision(Event):
    """Output of a block of the vision tower; images are encoded once per request.

    Parameters
    ----------
    layer
        Zero-based block of the tower.
    hidden
        ``[images, N, D_v]`` with the tower's own extra tokens (class token), or the family's flat ``[N, D_v]``.
    """

    layer: int
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionMask(Event):
    """Which keys a layer may attend to; writing it costs a Q x K mask.

    Parameters
    ----------
    mask
        ``[B, 1, Q, K]`` additive, in the model's dtype: 0 where visible, the dtype's minimum where not. The handler
        returns the mask to use; a finite bias is possible.
    start
        Position of the first of the Q rows.
    """

    layer: int
    mask: Tensor
    start: int


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
    unseen
        ``[B, 1, R, K]`` True at keys that a row cannot see in this layer: padding, later ones, and those that a
        sliding window has let go. What is written there reaches nothing. ``None``: every row sees every key.
    """

    layer: int
    scores: Tensor
    rows: Tensor
    row_mask: Tensor
    unseen: Tensor | None = None


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
    row_mask, unseen
        As in `AttentionScores`.
    """

    layer: int
    probs: Tensor
    rows: Tensor
    row_mask: Tensor
    unseen: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ValueScale(Event):
    """The values a layer mixes: a gain per key weighs its attention after the softmax, without renormalising.

    Parameters
    ----------
    values
        ``[B, H_kv, K, d]``, cache included. The handler returns a gain ``[B, 1, K]`` or ``[B, H_kv, K]``; it acts on
        all rows of the forward and costs one multiplication.
    """

    layer: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadOutput(Event):
    """What each head read, before the output projection.

    Parameters
    ----------
    heads
        ``[B, H, Q, d]`` in the model's dtype.
    start
        Position of the first of the Q rows.
    """

    layer: int
    heads: Tensor
    start: int


@dataclass(frozen=True, kw_only=True)
class MlpOutput(Event):
    """Output of a block's MLP, before it is added to the residual stream.

    Parameters
    ----------
    mlp
        ``[B, Q, D]`` in the model's dtype.
    inputs
        ``[B, Q, D]`` what the MLP was given (the normed residual stream).
    start
        Position of the first of the Q rows.
    """

    layer: int
    mlp: Tensor
    inputs: Tensor
    start: int


@dataclass(frozen=True, kw_only=True)
class LogitLens(Event):
    """What the model would say after this block: its output through the final norm and the unembedding.

    Parameters
    ----------
    logits
        ``[B, V]`` of the row that predicts the next token, detached.
    """

    layer: int
    logits: Tensor


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
class Prediction(Event):
    """A moment at which the next token's logits are known, here and in the method's branches.

    Parameters
    ----------
    asker
        Key of the method this event is for.
    """

    asker: str

    def branch_logits(self, name: str) -> Tensor:
        """Return a branch's raw logits of the same step, ``[B, V]`` in the model's dtype.

        The branch is run up to this step when it is asked for; a branch nobody asks costs nothing.

        Parameters
        ----------
        name
            One of the method's branches.

        Raises
        ------
        HookError
            If the method has no such branch.
        """
        return self.request.branch_logits(self.asker, name)


@dataclass(frozen=True, kw_only=True)
class NextTokenLogits(Prediction):
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
class Step(Prediction):
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
