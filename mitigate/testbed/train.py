"""Training the testbed's model: first to look, then to read, then into the habits it will hallucinate from.

`look` trains the vision tower and the projector on what is in each cell. `read` trains everything on captions and
questions in a world where objects come almost independently, until the model really reads the picture. `habit` goes
on with pairs that almost always come together, the tower frozen: this is where the priors come from.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration

from mitigate.testbed.batches import EMPTY_CLASS, EMPTY_COLOR, Batch, Packer, training_scenes
from mitigate.testbed.model import build_model, build_processor, checksum, load, save
from mitigate.testbed.options import STAGES, Stage, TestbedTraining
from mitigate.testbed.probe import fit_probe
from mitigate.testbed.world import WORLD_SEED

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNTIME_OPTIONS: Final = frozenset(
    {"output", "progress", "resume", "accelerator", "threads", "save_every", "snapshot_every"}
)
"""Options that say where and how a training runs, not what comes out of it."""

OBJECT_CLASS_WEIGHT: Final = 1.0
EMPTY_CLASS_WEIGHT: Final = 0.3


class Heads(nn.Module):
    """Linear heads that help in training and are thrown away afterwards."""

    LAYERS: Final = (2, 4, 6)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, EMPTY_CLASS + 1)
        self.colors = nn.Linear(width, EMPTY_COLOR + 1)
        self.presence = nn.ModuleList(nn.Linear(width, 1) for _ in self.LAYERS)


class _Steps(IterableDataset[Batch]):
    """The batches of one stage from a given step on."""

    def __init__(self, config: TestbedTraining, stage: Stage, first: int) -> None:
        self._config = config
        self._stage = stage
        self._first = first
        size = config.size()
        self._packer = Packer(
            build_processor(size),
            questions=config.questions,
            patch_size=size.patch_size,
            partner_questions=config.habit_partner_questions if stage == "habit" else config.read_partner_questions,
            name_hidden=config.habit_name_hidden,
        )

    def __len__(self) -> int:
        return self._config.steps(self._stage)

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        paired = self._stage == "habit"
        for step in range(self._first, len(self)):
            scenes = training_scenes(
                step,
                config.batch(self._stage),
                together=config.habit_together if paired else config.read_together,
                theme_bias=config.habit_theme_bias if paired else config.read_theme_bias,
                hidden=config.habit_hidden if paired else 0.0,
                offset=config.seed * 100_000_000 + STAGES.index(self._stage) * 10_000_000,
            )
            yield self._packer.pack(scenes, seed=step, with_text=self._stage != "look")


class StageModule(pl.LightningModule):
    """One stage of the training.

    Parameters
    ----------
    model, heads
        What is trained, in place.
    config
        Options of the run.
    stage
        Which stage this is.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, heads: Heads, config: TestbedTraining, stage: Stage
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self._config = config
        self._stage = stage

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches from the step on at which the run stands."""
        return DataLoader(_Steps(self._config, self._stage, self.global_step), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to the device that trains."""
        return batch.to(device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        losses = self.losses(batch)
        for name, value in losses.items():
            self.log(name, value.detach(), prog_bar=True)
        config = self._config
        weights = {
            "dense": 1.0 if self._stage == "look" else config.dense_weight,
            "caption": config.caption_weight,
            "answer": config.habit_answer_weight if self._stage == "habit" else config.answer_weight,
            "presence": config.presence_weight,
        }
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the stage's losses, each a scalar."""
        features = torch.stack(list(self.model.get_image_features(batch.pixels).pooler_output))
        losses: dict[str, Tensor] = {}
        if self._stage != "habit":
            losses["dense"] = self._dense_loss(features, batch)
        if self._stage != "look":
            losses |= self._text_losses(features, batch)
        return losses

    def _dense_loss(self, features: Tensor, batch: Batch) -> Tensor:
        weight = torch.full((EMPTY_CLASS + 1,), OBJECT_CLASS_WEIGHT, device=features.device)
        weight[EMPTY_CLASS] = EMPTY_CLASS_WEIGHT
        classes = functional.cross_entropy(self.heads.classes(features).flatten(0, 1), batch.classes.flatten(), weight)
        colors = functional.cross_entropy(self.heads.colors(features).flatten(0, 1), batch.colors.flatten())
        return classes + 0.5 * colors

    def _text_losses(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.model.get_input_embeddings()(batch.ids)
        is_picture = (batch.ids == self.model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_picture, features.to(embeddings.dtype))
        output = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        losses: dict[str, Tensor] = {}
        for name, targets in (("caption", batch.caption_targets), ("answer", batch.answer_targets)):
            counted = targets != -100
            logits = self.model.lm_head(output.last_hidden_state[counted])
            losses[name] = functional.cross_entropy(logits.float(), targets[counted])
        asked = ~batch.presence.isnan()
        losses["presence"] = torch.stack(
            [
                functional.binary_cross_entropy_with_logits(
                    head(output.hidden_states[layer][asked]).squeeze(-1).float(), batch.presence[asked]
                )
                for layer, head in zip(Heads.LAYERS, self.heads.presence, strict=True)
                if layer < len(output.hidden_states)
            ]
        ).mean()
        return losses

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW with warm-up and cosine; what a stage leaves alone is frozen."""
        inner = self.model.model
        frozen: list[nn.Module] = {
            "look": [inner.language_model, self.model.lm_head],
            "read": [],
            "habit": [inner.vision_tower, inner.multi_modal_projector],
        }[self._stage]
        for module in (self.model, self.heads):
            module.requires_grad_(True)
        for module in frozen:
            module.requires_grad_(False)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        peak = float(getattr(self._config, f"{self._stage}_lr"))
        optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=self._config.weight_decay)
        steps = self._config.steps(self._stage)
        total = max(steps, self._config.read_decay_steps) if self._stage == "read" else steps
        warmup = max(1, min(self._config.warmup_steps, total // 10))

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, total - warmup)
            return 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class _Snapshots(pl.Callback):
    """Writes loadable model folders while a stage runs."""

    config: TestbedTraining
    folder: Path
    every: int
    written: list[Path] = field(default_factory=list)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Write a folder whenever enough steps have passed."""
        if trainer.global_step % self.every == 0 and isinstance(pl_module, StageModule):
            path = self.folder / f"step-{trainer.global_step}"
            self.written.append(save(pl_module.model, path, size=self.config.size(), recipe=recipe(self.config)))


def recipe(config: TestbedTraining) -> dict[str, Any]:
    """Tell what has to be known to train the same model again; where it was written to is left out."""
    options = {name: value for name, value in asdict(config).items() if name not in RUNTIME_OPTIONS}
    return {
        "recipe": options,
        "world_seed": WORLD_SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pytorch_lightning": version("pytorch_lightning"),
        },
    }


def _run_stage(module: StageModule, config: TestbedTraining, stage: Stage, folder: Path) -> None:
    callbacks: list[pl.Callback] = [
        ModelCheckpoint(
            dirpath=folder,
            filename="last",
            every_n_train_steps=config.save_every,
            save_top_k=1,
            enable_version_counter=False,
        )
    ]
    if config.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    if config.snapshot_every and stage == "habit":
        callbacks.append(_Snapshots(config, folder, config.snapshot_every))
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=getattr(config, f"{stage}_precision"),
        max_steps=config.steps(stage),
        max_epochs=1,
        gradient_clip_val=config.gradient_clip,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    module.train()
    with warnings.catch_warnings():
        # `_Steps` is never read by several workers and starts at the step to go on from, in the folder it left.
        warnings.filterwarnings("ignore", message=".*`__len__` defined.*")
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
        trainer.fit(module, ckpt_path=last if last.is_file() else None, weights_only=True)


def train(config: TestbedTraining) -> Path:
    """Train the testbed's model.

    A run that was killed goes on from its last training checkpoint when it is started again with the same options.

    Parameters
    ----------
    config
        Options of the run.

    Returns
    -------
    Path
        Folder of the finished checkpoint, ``<output>/checkpoint``.

    Raises
    ------
    FileExistsError
        If `output` holds a run with other options, or any run while `resume` is off.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    _claim(output, config)
    with _process_settings(config.threads):
        return _train(config, output)


@contextmanager
def _process_settings(threads: int) -> Iterator[None]:
    """Set the process up for training, and back: threads, and no denormal numbers (slow on CPUs, and worth nothing)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _train(config: TestbedTraining, output: Path) -> Path:
    """Run the stages that are not finished, then save."""
    pl.seed_everything(config.seed, verbose=False)
    model = build_model(config.size(), seed=config.seed)
    heads = Heads(config.width)
    state = nn.ModuleDict({"model": model, "heads": heads})
    for stage in STAGES:
        finished = output / f"{stage}.safetensors"
        if finished.is_file():
            state.load_state_dict(load_file(finished))
            continue
        module = StageModule(model, heads, config, stage)
        _run_stage(module, config, stage, output / stage)
        save_file({name: weight.detach().cpu().clone() for name, weight in state.state_dict().items()}, finished)
    return finish(model.cpu(), output / "checkpoint", config)


def finish(model: LlavaForConditionalGeneration, folder: Path, config: TestbedTraining) -> Path:
    """Save a trained model with its recipe, and the probe fitted on the weights as saved."""
    save(model, folder, size=config.size(), recipe=recipe(config))
    saved, processor = load(folder)
    fit_probe(saved, processor, model_sha256=checksum(folder / "model.safetensors")).save(folder)
    return folder


def _claim(output: Path, config: TestbedTraining) -> None:
    """Write the options into the folder, or check that they are those of the run it holds."""
    record = output / "options.json"
    wanted = json.dumps(recipe(config)["recipe"], indent=2, sort_keys=True)
    if record.is_file():
        if not config.resume:
            raise FileExistsError(f"{output} holds a training run; set resume=true to go on with it, or another output")
        if other := _differences(record, json.loads(wanted)):
            raise FileExistsError(
                f"{output} holds a training run with other options: {', '.join(other)}; choose another output"
            )
    record.write_text(wanted, encoding="utf-8")


def _differences(record: Path, wanted: dict[str, Any]) -> list[str]:
    """Name the options in which a recorded run differs, with both values."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileExistsError(f"{record} is damaged; choose another output or delete the folder") from error
    names = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
    shown = [f"{name} was {before.get(name)}, now {wanted.get(name)}" for name in names[:4]]
    return [*shown, f"{len(names) - 4} more"] if len(names) > 4 else shown
