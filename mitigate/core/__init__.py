"""The hook bus and its vocabulary. This package's names are what a method file imports."""

from mitigate.core.events import (
    AttentionMask,
    AttentionProbs,
    AttentionScores,
    Event,
    HeadOutput,
    HiddenStates,
    ImageInput,
    LogitLens,
    MlpOutput,
    NextTokenLogits,
    Selection,
    SelectToken,
    TextInput,
    TokenChosen,
    ValueScale,
    Vision,
    VisualEmbeddings,
)
from mitigate.core.facts import ModelFacts
from mitigate.core.layers import parse_layers
from mitigate.core.method import Fidelity, Method, Paper, Tags
from mitigate.core.points import Access, Branch, Phase, Point, Rows, Subscription
from mitigate.core.roles import Role
from mitigate.core.state import MethodState

__all__ = [
    "Access",
    "AttentionMask",
    "AttentionProbs",
    "AttentionScores",
    "Branch",
    "Event",
    "Fidelity",
    "HeadOutput",
    "HiddenStates",
    "ImageInput",
    "LogitLens",
    "Method",
    "MethodState",
    "MlpOutput",
    "ModelFacts",
    "NextTokenLogits",
    "Paper",
    "Phase",
    "Point",
    "Role",
    "Rows",
    "SelectToken",
    "Selection",
    "Subscription",
    "Tags",
    "TextInput",
    "TokenChosen",
    "ValueScale",
    "Vision",
    "VisualEmbeddings",
    "parse_layers",
]
