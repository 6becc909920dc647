"""How widely a token's attention to the picture is spread, layer by layer, and whether that tells hallucinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mitigate.core import AttentionProbs, Fidelity, Method, MethodState, ModelFacts, Point, Subscription, Tags
from mitigate.diagnostics.base import Context, Diagnostic, Findings, Measures, TokenRow
from mitigate.diagnostics.observe import note, noted, patches, per_step, predicting_rows, seen_patches
from mitigate.lazy import torch
from mitigate.ops.entropy import POOLS, key_mass, pooled_entropy


@dataclass(frozen=True, kw_only=True)
class EntropyObserver(Method):
    """Reads, per step and layer, the entropy and mass of the predicting row's attention to the picture.

    Parameters
    ----------
    pool
        How heads become one distribution (`mitigate.ops.entropy.pooled_entropy`).
    """

    name: ClassVar[str] = "observer"
    summary: ClassVar[str] = "reads the entropy and mass of the attention to the picture"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS}))

    pool: str = "mass_mean"

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Watch the predicting row in every layer."""
        return [predicting_rows(model)]

    def on_attention_probs(self, event: AttentionProbs, state: MethodState) -> None:
        """Keep entropy ``[B]``, mean mass ``[B]`` and the heads below the mean mass ``[B, H]``."""
        weights = event.probs[:, :, -1:].detach()
        keys = seen_patches(event, state)[:, None]
        weights = weights[..., : keys.shape[-1]]
        mass = key_mass(weights, keys)[..., 0]
        mean = mass.mean(1)
        entropy = pooled_entropy(weights, keys, pool=self.pool)[:, 0]
        tokens = patches(event.layout, state).sum(1).to(keys.device)
        entropy = torch.where((tokens > 0) & ~keys[:, 0].any(-1), torch.nan, entropy)  # nothing of the picture in sight
        note(state, event, entropy=entropy, mass=mean, low=mass < mean[:, None], image_tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Entropy(Diagnostic):
    """Layer image-attention entropy (LIAE) of every generated token.

    Parameters
    ----------
    pool
        How the heads of a layer become one distribution: ``mass_mean`` (heads count by their mass on the picture),
        ``renorm_mean``, ``max`` or ``mean_of_entropies``.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "entropy and mass of the attention to the picture per token and layer, abnormal heads"

    pool: str = "mass_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.pool in POOLS, "pool", f"be one of {', '.join(POOLS)}")

    def observer(self, facts: ModelFacts) -> Method:
        """Watch every layer."""
        return EntropyObserver(pool=self.pool)

    def measure(self, state: MethodState, row: int) -> list[Measures]:
        """Return entropy (nats), mean mass and number of abnormal heads per layer, and the number of image tokens."""
        steps: list[dict[str, Any]] = per_step(state, row, "entropy", "mass")
        abnormal = noted(state, "low")[:, row].sum(-1).tolist()
        tokens = int(noted(state, "image_tokens")[0, row, 0])
        return [
            {**values, "abnormal": heads, "image_tokens": tokens} for values, heads in zip(steps, abnormal, strict=True)
        ]

    def measure_sample(self, state: MethodState, row: int, context: Context) -> Measures:
        """Return how often each head was abnormal over the reply's tokens, ``[layers][heads]``."""
        low = noted(state, "low")[: len(context.pieces), row]
        return {"abnormal_heads": low.sum(0).tolist()}

    def analyse(self, rows: Sequence[TokenRow]) -> Findings:
        """See `mitigate.diagnostics.entropy_analysis`."""
        from mitigate.diagnostics.entropy_analysis import analyse

        return analyse(rows, resamples=self.resamples)

    def study(self, samples: Sequence[Any]) -> Findings:
        """Add how often each head was abnormal."""
        from mitigate.diagnostics.entropy_analysis import with_heads

        return with_heads(self.analyse([row for sample in samples for row in sample.rows]), samples)

    def draw(self, findings: Findings, folder: Path) -> list[Path]:
        """See `mitigate.diagnostics.entropy_figures`."""
        from mitigate.diagnostics.entropy_figures import draw

        return draw(findings, folder)
