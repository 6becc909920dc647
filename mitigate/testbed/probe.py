"""The linear probe on the projected visual tokens: what the decoder could know about the objects in a picture.

It is the artefact of the positive control: a reader that is nearly always right about what is in the picture, so that
a method which follows it must lower hallucination, if hallucination can be lowered here at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mitigate.testbed.batches import EMPTY_CLASS, Packer
from mitigate.testbed.model import checkpoint_path, checksum
from mitigate.testbed.world import OBJECTS, WORLD_SEED, Scene, scenes

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PROBE_FILE: Final = "probe.safetensors"
PROBE_VERSION: Final = 1
CEILING: Final = 6.0
"""Largest log-odds: a calibration on a few hundred pictures cannot vouch for more."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes
    ----------
    objects
        Class names, in the order of the log-odds.
    token_ids
        Token id of each object's word.
    weight, bias
        The linear classifier of a single token, `[n_objects + 1, D]` and `[n_objects + 1]`; the last class is empty.
    slope, offset
        Calibration per object, `[n_objects]` each.
    model_sha256
        Checksum of the weights it was fitted on.
    world_seed, images
        Seed of the world and number of validation scenes it was fitted on.
    version
        Version of the procedure.
    """

    objects: tuple[str, ...]
    token_ids: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    slope: Tensor
    offset: Tensor
    model_sha256: str
    world_seed: int
    images: int
    version: int = PROBE_VERSION

    def log_odds(self, features: Tensor) -> Tensor:
        """Log-odds that each object is in the picture.

        Parameters
        ----------
        features
            Projected visual tokens, `[n_images, N, D]`.

        Returns
        -------
        Tensor
            `[n_images, n_objects]`, natural logarithm, within -6..6, on the device of `features`.
        """
        weight, bias, slope, offset = (
            tensor.to(features.device) for tensor in (self.weight, self.bias, self.slope, self.offset)
        )
        evidence = _evidence(features.float() @ weight.T + bias)
        return (evidence * slope + offset).clamp(-CEILING, CEILING)

    def save(self, folder: Path) -> Path:
        """Write the probe into a checkpoint's folder and return the file."""
        path = folder / PROBE_FILE
        meta = {
            "objects": json.dumps(self.objects),
            "token_ids": json.dumps(self.token_ids),
            "model_sha256": self.model_sha256,
            "world_seed": str(self.world_seed),
            "images": str(self.images),
            "version": str(self.version),
        }
        tensors = {name: getattr(self, name).contiguous() for name in ("weight", "bias", "slope", "offset")}
        save_file(tensors, path, metadata=meta)
        return path


def _evidence(logits: Tensor) -> Tensor:
    """Token logits `[n_images, N, n_objects + 1]` -> evidence per object `[n_images, n_objects]`.

    The log-odds of a class at a token against all other classes, softly maximised over the tokens.
    """
    log_p = logits.log_softmax(-1)[..., :-1]
    # 1 - p is taken through log1p, floored where p rounds to 1.
    rest = torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
    return (log_p - rest).logsumexp(1)


def load_probe(folder: Path | None = None) -> Probe:
    """Read the probe of a checkpoint folder; that of the packaged checkpoint by default.

    Raises
    ------
    FileNotFoundError
        If the folder holds no probe.
    ValueError
        If the probe was fitted on other weights, or with another version of the procedure.
    """
    folder = folder or checkpoint_path()
    path = folder / PROBE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no probe in {folder}; make one with: mitigate testbed train")
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    weights = folder / "model.safetensors"
    if weights.is_file() and checksum(weights) != meta["model_sha256"]:
        raise ValueError(f"the probe in {folder} was fitted on other weights; fit it again")
    if int(meta["version"]) != PROBE_VERSION:
        raise ValueError(f"the probe in {folder} is of version {meta['version']}, wanted is {PROBE_VERSION}")
    return Probe(
        objects=tuple(json.loads(meta["objects"])),
        token_ids=tuple(json.loads(meta["token_ids"])),
        model_sha256=meta["model_sha256"],
        world_seed=int(meta["world_seed"]),
        images=int(meta["images"]),
        **tensors,
    )


@torch.inference_mode()
def visual_features(
    model: LlavaForConditionalGeneration, packer: Packer, pictures: list[Scene], *, batch_size: int = 100
) -> Tensor:
    """Projected visual tokens of scenes, `[n_images, N, D]`."""
    parts = []
    for start in range(0, len(pictures), batch_size):
        pixels = packer.pixels(pictures[start : start + batch_size]).to(model.device, model.dtype)
        parts.append(torch.stack(list(model.get_image_features(pixels).pooler_output)).float().cpu())
    # Cloned, so that the probe can be fitted on it with gradients.
    return torch.cat(parts).clone()


def presence(pictures: list[Scene]) -> Tensor:
    """Ground truth `[n_images, n_objects]`, 1.0 where the object is in the scene."""
    return torch.tensor([[float(name in made.objects) for name in OBJECTS] for made in pictures])


def fit_probe(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    model_sha256: str,
    images: int = 1000,
    seed: int = WORLD_SEED,
) -> Probe:
    """Fit the probe on the validation split.

    Parameters
    ----------
    model, processor
        Model in 32 bit, and its processor.
    model_sha256
        Checksum of the saved weights.
    images
        Validation scenes: four fifths for the classifier of single tokens, the rest for the calibration.
    seed
        Seed of the world.
    """
    patch_size = int(processor.patch_size)
    packer = Packer(processor, questions=1, patch_size=patch_size)
    pictures = list(scenes("validation", images, seed=seed))
    features = visual_features(model, packer, pictures)
    labels = torch.tensor([packer.dense_labels(made)[0] for made in pictures])
    cut = images * 4 // 5
    weight, bias = _fit_tokens(features[:cut].flatten(0, 1), labels[:cut].flatten())
    evidence = _evidence(features[cut:] @ weight.T + bias)
    slope, offset = _fit_calibration(evidence, presence(pictures[cut:]))
    tokens = [processor.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in OBJECTS]
    return Probe(OBJECTS, tuple(tokens), weight, bias, slope, offset, model_sha256, seed, images)


def _fit_tokens(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with a light ridge, full batch."""
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.zeros(EMPTY_CLASS + 1, features.shape[-1], requires_grad=True)
        bias = torch.zeros(EMPTY_CLASS + 1, requires_grad=True)
        mean, std = features.mean(0), features.std(0) + 1e-6
        scaled = (features - mean) / std
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(scaled @ weight.T + bias, labels) + 1e-4 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        folded = weight.detach() / std
        return folded, bias.detach() - folded @ mean


def _fit_calibration(evidence: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Platt scaling per object, held near one common slope and offset: some objects are rare."""
    with torch.inference_mode(False), torch.enable_grad():
        common = torch.tensor([1.0, 0.0], requires_grad=True)
        own = torch.zeros(2, evidence.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([common, own], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = evidence * (common[0] + own[0]) + common[1] + own[1]
            loss = functional.binary_cross_entropy_with_logits(logits, truth) + 1e-3 * own.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return (common[0] + own[0]).detach(), (common[1] + own[1]).detach()
