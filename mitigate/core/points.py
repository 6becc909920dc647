"""Where methods can act, and how they say that they want to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from mitigate.core.roles import Role

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout


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

#: The stream that is generated; every other one is a branch.
MAIN = "main"

#: Points the bus serves per layer; a subscription to them needs layers (``vision``: none means every block).
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
#: Points that pictures pass while they are encoded.
PICTURE_POINTS = (Point.IMAGE_INPUT, Point.VISION, Point.VISUAL_EMBEDDINGS)
#: Points that also exist in a branch.
BRANCH_POINTS = LAYER_POINTS | {Point.TEXT_INPUT, Point.IMAGE_INPUT, Point.VISUAL_EMBEDDINGS}
#: Points served by the project's attention function.
ATTENTION_POINTS = frozenset({Point.ATTENTION_MASK, Point.ATTENTION_SCORES, Point.ATTENTION_PROBS, Point.VALUE_SCALE})
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
        Zero-based decoder layers (``vision``: blocks of the vision tower, none for all of them); empty for points that
        are not per layer.
    phases
        Passes in which the handler is called.
    rows
        For attention points: which query rows; a `Rows` value or a function from the layout to a mask ``[B, L]``.
    where
        One phrase for ``mitigate plan``: which part of the value the handler touches.
    branches
        Streams in which the handler is called: ``main``, and names of the method's own `Branch` es.
    roles
        Tokens an edit may touch: keys of attention, positions of hidden states and outputs. ``None``: any.
    normalised
        For attention weights: whether a row sums to the same after the edit.
    """

    point: Point
    access: Access = Access.READ
    layers: tuple[int, ...] = ()
    phases: frozenset[Phase] = MAIN_PHASES
    rows: Rows | PositionSet = Rows.PREDICTORS
    where: str = ""
    branches: frozenset[str] = frozenset({MAIN})
    roles: frozenset[Role] | None = None
    normalised: bool = True


@dataclass(frozen=True, kw_only=True)
class Branch:
    """An extra stream of the same model that follows the tokens of the main one, with a cache of its own.

    A method reads it with ``event.branch_logits(name)``; it runs when it is asked for. No method edits a branch but the
    one that asks for it, and only through subscriptions that name it. A branch its method does not edit is *plain*, and
    equal plain branches of several methods are run once for all of them.

    Parameters
    ----------
    name
        Name within the method; becomes ``event.branch`` of the events in it.
    images
        Whether the prompt keeps its images; without, their tokens are cut out of it.
    """

    name: str
    images: bool = True
