"""The hook bus and its vocabulary. This package's names are what a method file imports."""

from mitigate.core.facts import ModelFacts
from mitigate.core.layers import parse_layers
from mitigate.core.method import Fidelity, Method, Paper, Tags
from mitigate.core.points import (
    Access,
    AttentionProbs,
    AttentionScores,
    Event,
    HiddenStates,
    NextTokenLogits,
    Phase,
    Point,
    Rows,
    Selection,
    SelectToken,
    Subscription,
    TokenChosen,
    VisualEmbeddings,
)
from mitigate.core.state import MethodState

__all__ = [
    "Access",
    "AttentionProbs",
    "AttentionScores",
    "Event",
    "Fidelity",
    "HiddenStates",
    "Method",
    "MethodState",
    "ModelFacts",
    "NextTokenLogits",
    "Paper",
    "Phase",
    "Point",
    "Rows",
    "SelectToken",
    "Selection",
    "Subscription",
    "Tags",
    "TokenChosen",
    "VisualEmbeddings",
    "parse_layers",
]
