"""Positive control: a linear probe on the visual tokens corrects the logits of object words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    Fidelity,
    Method,
    MethodState,
    ModelFacts,
    NextTokenLogits,
    Point,
    Subscription,
    Tags,
    VisualEmbeddings,
)
from mitigate.errors import ConfigError
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.testbed.probe import Probe


@dataclass(frozen=True, kw_only=True)
class ControlProbe(Method):
    """Adds a probe's log-odds that an object is in the picture to the logits of that object's word.

    The probe was fitted on the testbed's validation pictures and knows which objects there are, so this control is no
    mitigation method: it shows how far hallucination falls on the testbed when the evidence in the visual tokens is
    used, and that the comparison can see it.

    Parameters
    ----------
    scale
        Factor on the log-odds.

    Examples
    --------
    >>> ControlProbe(scale=0.5).scale
    0.5
    """

    name: ClassVar[str] = "control_probe"
    summary: ClassVar[str] = "positive control: a probe on the visual tokens corrects the logits of object words"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.VISUAL_EMBEDDINGS}), writes=frozenset({Point.NEXT_TOKEN_LOGITS}))

    scale: float = 0.5

    def __post_init__(self) -> None:
        self.require_finite("scale")
        self.require(self.scale >= 0.0, "scale", "not be negative")

    def check_model(self, model_name_or_path: str, facts: ModelFacts | None) -> None:
        """Accept the packaged testbed only: the probe was fitted on its visual tokens."""
        if model_name_or_path != "testbed":
            raise ConfigError(
                f"{self.name} works on model=testbed only, where its probe was fitted, not on {model_name_or_path}; "
                f"choose model=testbed or leave {self.name} out"
            )

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Read the pictures once, correct every step."""
        return [
            Subscription(point=Point.VISUAL_EMBEDDINGS, where="probe's log-odds per object"),
            Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE, where="object words"),
        ]

    def on_visual_embeddings(self, event: VisualEmbeddings, state: MethodState) -> None:
        """Ask the probe about every picture."""
        from mitigate.testbed.probe import load_probe

        probe: Probe = load_probe()
        state.words = torch.tensor(probe.token_ids, device=event.features[0].device)
        state.log_odds = probe.log_odds(torch.stack(event.features))

    def on_next_token_logits(self, event: NextTokenLogits, state: MethodState) -> Tensor | None:
        """Logit of an object's word + scale x log-odds, strongest picture of the sample."""
        if self.scale == 0.0 or state.get("log_odds") is None:
            return None
        bias = torch.zeros_like(event.logits)
        for row, spans in enumerate(event.layout.images):
            if spans:
                seen = state.log_odds[[span.image for span in spans]].amax(0)
                bias[row, state.words] = (self.scale * seen).to(bias.dtype)
        return event.logits + bias

    @classmethod
    def identity(cls) -> Self:
        """No correction."""
        return cls(scale=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return two strengths."""
        return [{"scale": 0.25}, {"scale": 1.0}]
