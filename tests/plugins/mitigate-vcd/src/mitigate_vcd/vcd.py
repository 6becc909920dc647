"""VCD: what the model says about the picture, against what it would say about a noised one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mitigate.core import (
    Access,
    Branch,
    Fidelity,
    ImageInput,
    Method,
    MethodState,
    ModelFacts,
    NextTokenLogits,
    Paper,
    Point,
    Subscription,
    Tags,
)
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: The diffusion process: number of steps, and the range of beta_t.
STEPS, BETA_MIN, BETA_MAX = 1000, 1e-5, 5e-3


@cache
def signal_level(step: int) -> float:
    """Return alpha_bar of a diffusion step: the share of the picture's variance that is left after it.

    Parameters
    ----------
    step
        Zero-based step. beta_t follows a sigmoid from -6 to 6 between its least and its greatest value.
    """
    left = 1.0
    for t in range(step + 1):
        rise = 1.0 / (1.0 + math.exp(6.0 - 12.0 * t / (STEPS - 1)))
        left *= 1.0 - (BETA_MIN + (BETA_MAX - BETA_MIN) * rise)
    return left


@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Visual Contrastive Decoding: a second stream sees the picture through noise, and its logits are subtracted.

    What a model says about a picture it can hardly see comes from its priors: from what often occurs together, and
    from the words so far. VCD subtracts it, ``(1 + alpha) l - alpha l'``, among the tokens that the model finds
    plausible: ``l >= max l + ln(beta)``. The noise is that of a diffusion process, drawn once per sample on the
    normalised pixels from the sample's own generator, so a sample's noise depends on the seed and its name only. Rows
    without a picture stay as they are.

    Paper: arXiv 2311.16922 (CVPR 2024). Files of the authors' repository disagree about alpha and beta: README.md of
    this package says how, and which preset stands for what.

    Parameters
    ----------
    alpha
        Weight of the contrast. Paper and command line: 1; the repository's sampling function falls back on 0.5. 0 needs
        no second stream.
    beta
        Tokens less probable than this share of the most probable one are dropped. Command line: 0.1; 0.2 in the script
        for LLaVA on POPE. 0 drops none.
    noise_step
        Step of the diffusion process, 0 to 999, at which the second stream sees the picture. Repository: 500.
    cut_off_from
        Distribution that decides on plausibility: the ``clean`` stream's (paper) or the ``contrast``.

    Examples
    --------
    >>> VCD(noise_step=999).alpha
    1.0
    """

    name: ClassVar[str] = "vcd"
    summary: ClassVar[str] = "contrast with what the model would say about a noised picture"
    fidelity: ClassVar[Fidelity] = Fidelity.PAPER
    paper: ClassVar[Paper | None] = Paper(
        title="Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
        arxiv="2311.16922",
        where="contrastive distribution and plausibility constraint; schedule of the authors' repository",
    )
    tags: ClassVar[Tags] = Tags(
        writes=frozenset({Point.IMAGE_INPUT, Point.NEXT_TOKEN_LOGITS}), stochastic=True, forwards_per_token=1
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "fallback": {"alpha": 0.5},
        "pope_script": {"beta": 0.2},
        "uncut": {"beta": 0.0},
        "cut_off": {"alpha": 0.0},
    }
    preset_fidelity: ClassVar[dict[str, Fidelity]] = {
        "uncut": Fidelity.RECONSTRUCTED,
        "cut_off": Fidelity.CONTROL,
    }

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    cut_off_from: str = "clean"

    def __post_init__(self) -> None:
        self.require_finite("alpha")
        self.require(self.alpha >= 0.0, "alpha", "not be negative")
        self.require(0.0 <= self.beta <= 1.0, "beta", "be between 0 (nothing is dropped) and 1")
        self.require(0 <= self.noise_step < STEPS, "noise_step", f"be between 0 and {STEPS - 1}")
        self.require_option("cut_off_from", ("clean", "contrast"))

    def branches(self) -> list[Branch]:
        """Ask for a stream of its own, unless there is nothing to contrast."""
        return [] if self.alpha == 0.0 else [Branch(name="noised")]

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        """Noise the pictures of the branch, contrast the logits of the main stream."""
        wanted = []
        if self.alpha != 0.0:
            branch, where = frozenset({"noised"}), f"noise of step {self.noise_step}"
            wanted.append(Subscription(point=Point.IMAGE_INPUT, access=Access.WRITE, branches=branch, where=where))
        if self.alpha != 0.0 or self.beta != 0.0:
            wanted.append(
                Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE, where="samples with an image")
            )
        return wanted

    def on_image_input(self, event: ImageInput, state: MethodState) -> list[Tensor]:
        """Return v' = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) noise, one draw per picture and request."""
        if state.get("noise") is None:  # a stream that starts over sees the same noise
            # drawn on the CPU in float32: the same on every device and in every precision
            generators = [event.request.generators[row] for row in event.rows]
            drawn = zip(event.images, generators, strict=True)
            state.noise = [torch.randn(image.shape, generator=generator) for image, generator in drawn]
        level = signal_level(self.noise_step)
        noised: list[Tensor] = []
        for image, noise in zip(event.images, state.noise, strict=True):
            exact = torch.promote_types(image.dtype, torch.float32)
            mixed = math.sqrt(level) * image.to(exact) + math.sqrt(1.0 - level) * noise.to(image.device, exact)
            noised.append(mixed.to(image.dtype))
        return noised

    def on_next_token_logits(self, event: NextTokenLogits, state: MethodState) -> Tensor | None:
        """Return (1 + alpha) l - alpha l', and minus infinity for tokens that are not plausible."""
        if not any(event.layout.images):
            return None
        seen = torch.tensor([bool(spans) for spans in event.layout.images], device=event.logits.device)
        active = seen & ~event.request.finished.to(seen.device)
        logits = event.logits.to(torch.promote_types(event.logits.dtype, torch.float32))
        contrast = logits
        if self.alpha != 0.0:
            noised = event.branch_logits("noised").to(logits.dtype)
            contrast = (1.0 + self.alpha) * logits - self.alpha * noised
        if self.beta != 0.0:
            judge = logits if self.cut_off_from == "clean" else contrast
            dropped = judge < judge.amax(-1, keepdim=True) + math.log(self.beta)
            state.count("tokens_dropped", (dropped & contrast.isfinite()).sum(-1), active)
            contrast = contrast.masked_fill(dropped, -math.inf)
        best, contrast_best = logits.argmax(-1), contrast.argmax(-1)
        state.count("argmax_changed", best != contrast_best, active)
        if state.tracing:
            state.trace(event, plausible=contrast.isfinite().sum(-1), argmax=best, contrast_argmax=contrast_best)
        return torch.where(seen[:, None], contrast.to(event.logits.dtype), event.logits)

    @classmethod
    def identity(cls) -> Self:
        """No contrast and nothing dropped: no second stream either."""
        return cls(alpha=0.0, beta=0.0)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return every parameter away from its default."""
        return [
            {"alpha": 0.5, "beta": 0.2},
            {"alpha": 2.0, "beta": 0.01, "noise_step": 999},
            {"alpha": 1.0, "beta": 0.05, "cut_off_from": "contrast", "noise_step": 300},
        ]
