"""Lightning's part of a run: devices, processes, the order of batches; only `processes` beside it knows Lightning."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytorch_lightning as lightning
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from mitigate.errors import ConfigError, MitigateError, UnsupportedModel, described
from mitigate.processes import is_first_process
from mitigate.records import RecordWriter, SampleRecord
from mitigate.runner.devices import is_out_of_memory, place, release, synchronize
from mitigate.runner.processes import Watch, agree, leave, settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.adapters import LoadedModel
    from mitigate.benchmarks.base import Benchmark, Sample
    from mitigate.core.stack import Stack
    from mitigate.records import Telemetry
    from mitigate.runner.batches import Batch

WARM_UP_TOKENS = 2
SEED_STRIDE = 1_000_003


#: Pictures of one sample, or why there are none.
Pictures: TypeAlias = "list[Image] | str"


class BatchData(Dataset[tuple["Batch", list[Pictures]]]):
    """Batches with their pictures, drawn or read in the loader's processes.

    Parameters
    ----------
    benchmark
        Where pictures come from.
    batches
        The batches of this process.
    skip
        Whether a picture that cannot be had is told instead of raised.
    """

    def __init__(self, benchmark: Benchmark, batches: Sequence[Batch], *, skip: bool = False) -> None:
        self.benchmark, self.batches, self.skip = benchmark, list(batches), skip

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Batch, list[Pictures]]:
        """Return a batch and, per sample, its pictures."""
        batch = self.batches[index]
        return batch, [self._pictures(sample) for sample in batch.samples]

    def _pictures(self, sample: Sample) -> Pictures:
        try:
            return self.benchmark.images(sample)
        except Exception as error:
            if not self.skip:
                raise
            return _reason(error)


class BatchDataModule(lightning.LightningDataModule):
    """Deals the fixed batches out to the processes.

    Process ``r`` of ``w`` takes the batches ``r, r + w, ...`` of the *full* list and then leaves out those that are
    recorded: the share of a process does not depend on how far another one has come.

    Parameters
    ----------
    benchmark
        Where pictures come from.
    batches
        All batches of the run.
    done
        Ids of recorded samples.
    workers
        Processes that prepare pictures.
    skip
        As for `BatchData`.
    """

    def __init__(
        self, benchmark: Benchmark, batches: Sequence[Batch], done: Collection[str], workers: int, *, skip: bool = False
    ) -> None:
        super().__init__()
        self.benchmark, self.batches, self.done, self.workers = benchmark, batches, done, workers
        self.skip = skip
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than batches are left

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's unfinished batches."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = [batch for batch in self.batches[rank::world] if batch.missing(self.done)]
        data = BatchData(self.benchmark, mine, skip=self.skip)
        return DataLoader(data, batch_size=None, shuffle=False, num_workers=self.workers, collate_fn=_same)


class StackModule(lightning.LightningModule):
    """Generates the answers of one batch under a stack and writes their records.

    Parameters
    ----------
    loaded
        Model, processor and adapter.
    stack
        Methods to attach while predicting.
    arguments
        Arguments of ``generate`` besides ``max_new_tokens``.
    seed
        Seed of every random draw; together with the sample's id it fixes a sample's numbers.
    run_dir
        Where records go.
    done
        Ids of recorded samples; their records are not written twice.
    advance
        Called with the number of new records after each batch.
    skip
        Whether a sample that fails is recorded as failed, and the others go on.
    """

    def __init__(
        self,
        *,
        loaded: LoadedModel,
        stack: Stack,
        arguments: Mapping[str, Any],
        seed: int,
        run_dir: Path,
        done: Collection[str],
        advance: Callable[[int], None],
        skip: bool = False,
    ) -> None:
        super().__init__()
        # No submodule: Lightning would move it, copy it from process to process, and take it off the device again.
        self.loaded, self.stack, self.arguments, self.seed = loaded, stack, dict(arguments), seed
        self.run_dir, self.done, self.advance, self.skip = run_dir, done, advance, skip
        self.watch = Watch(run_dir)
        self._open = ExitStack()
        self._handle: Any = None
        self._writer: Any = None
        self._warm = False

    def on_predict_start(self) -> None:
        """Put the model on its device and attach the stack."""
        self.watch.listen()
        place(self.loaded.model, self.device)
        self._handle = self._open.enter_context(self.stack.attach(self.loaded.model, self.loaded.processor))
        self._writer = self._open.enter_context(RecordWriter(self.run_dir, self.trainer.global_rank))
        self._warm = False

    def on_predict_end(self) -> None:
        """Detach the stack."""
        self.close()

    def close(self) -> None:
        """Detach the stack if it is attached."""
        self._handle = self._writer = None
        self._open.close()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: the adapter puts its tensors on the model's device."""
        return batch

    def predict_step(self, data: tuple[Batch, list[Pictures]], batch_idx: int) -> None:
        """Generate one batch and append the records that are missing."""
        self.watch.check(self.trainer)
        batch, pictures = data
        pairs = list(zip(batch.samples, pictures, strict=True))
        records = [_failed(sample, reason) for sample, reason in pairs if isinstance(reason, str)]
        shown = [(sample, images) for sample, images in pairs if not isinstance(images, str)]
        records += self._answers(batch, shown) if shown else []
        records = [record for record in records if record.id not in self.done]
        self._writer.extend(records)
        self.advance(len(records) * self.trainer.world_size)

    def _answers(self, batch: Batch, shown: Sequence[tuple[Sample, list[Image]]]) -> list[SampleRecord]:
        """Answer samples together; where failures are skipped and this fails, one by one to find the culprit."""
        try:
            return self._answer(batch, shown)
        except (ConfigError, UnsupportedModel):
            raise  # no sample's fault: every other one would fail too
        except Exception as error:
            if not self.skip:
                if is_out_of_memory(error):
                    raise _too_large(len(shown)) from error
                raise
            if len(shown) == 1:
                return [_failed(shown[0][0], _reason(error))]
        release(self.loaded.model)  # after the exception is gone, and with it what its frames held
        return [record for one in shown for record in self._answers(batch, [one])]

    def _answer(self, batch: Batch, shown: Sequence[tuple[Sample, list[Image]]]) -> list[SampleRecord]:
        inputs = self.loaded.inputs([sample.prompt for sample, _ in shown], [images for _, images in shown])
        ids = [sample.id for sample, _ in shown]
        if not self._warm:  # lazy initialisation must not be charged to whichever stack comes first
            self._generate(inputs, ids, min(WARM_UP_TOKENS, batch.max_new_tokens))
            self._warm = True
        # transformers samples from the global generator: a batch draws the same whatever ran before it.
        torch.manual_seed(self.seed * SEED_STRIDE + batch.index)
        synchronize(self.loaded.model)
        started = time.perf_counter()
        sequences = self._generate(inputs, ids, batch.max_new_tokens)
        synchronize(self.loaded.model)
        seconds = (time.perf_counter() - started) / len(ids)
        generated = _sequences(sequences)[:, inputs["input_ids"].shape[1] :].tolist()
        rows = zip([sample for sample, _ in shown], generated, self._handle.telemetry(), strict=True)
        return [self._record(*row, seconds) for row in rows]

    def _generate(self, inputs: Mapping[str, Any], ids: list[str], limit: int) -> Any:
        return self._handle.generate(**inputs, **self.arguments, seed=self.seed, sample_ids=ids, max_new_tokens=limit)

    def _record(self, sample: Sample, tokens: list[int], telemetry: Telemetry, seconds: float) -> SampleRecord:
        tokens, finished = cut_at_end(tokens, self._end_tokens())
        return SampleRecord(
            id=sample.id,
            image_id=sample.image_id,
            task=sample.task,
            prompt=sample.prompt,
            text=self.loaded.processor.decode(tokens, skip_special_tokens=True).strip(),
            tokens=len(tokens),
            finished=finished,
            meta=dict(sample.meta),
            telemetry=telemetry,
            seconds=seconds,
        )

    def _end_tokens(self) -> frozenset[int]:
        end = self.loaded.model.generation_config.eos_token_id
        return frozenset() if end is None else frozenset(end if isinstance(end, list | tuple) else [end])


def predict(
    module: StackModule, data: BatchDataModule, trainer_config: Mapping[str, Any], *, gradients: bool, folder: Path
) -> None:
    """Drive a module over its batches with a Lightning Trainer.

    Parameters
    ----------
    module, data
        What to do, on what.
    trainer_config
        ``accelerator``, ``devices``, ``num_nodes`` and ``strategy``.
    gradients
        Whether the stack needs them: Lightning's inference mode would silently give none.
    folder
        Lightning's root folder; nothing is written there.

    Raises
    ------
    ConfigError
        If the machine, or the scheduler's job, has no such devices.
    KeyboardInterrupt
        On Ctrl-C, after everything is detached and closed.
    SystemExit
        In a process other than the first, if the run has failed: the first one tells why.
    """
    interrupt, failure = _Interrupt(), None
    with _quiet_lightning():
        trainer = _trainer(trainer_config, inference_mode=not gradients, callbacks=[interrupt], folder=folder)
        if is_first_process():
            module.watch.clear()
        try:
            trainer.predict(module, datamodule=data, return_predictions=False)
        except SystemExit:
            if not interrupt.seen:
                raise
            leave()
            raise KeyboardInterrupt from None  # Lightning would end the process; here the caller decides
        except Exception as error:
            failure = error
        finally:
            module.close()
    agree(failure, trainer, module.watch)


def _trainer(config: Mapping[str, Any], *, inference_mode: bool, callbacks: list[Any], folder: Path) -> Any:
    try:
        return lightning.Trainer(
            **settings(config),
            inference_mode=inference_mode,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
            default_root_dir=str(folder),
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        asked = ", ".join(f"trainer.{key}={config[key]}" for key in ("accelerator", "devices", "num_nodes", "strategy"))
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{asked}: {reason}\nuse trainer=cpu, or ask for devices this machine has") from error


def cut_at_end(tokens: list[int], end_tokens: Collection[int]) -> tuple[list[int], bool]:
    """Drop the padding of a finished row: keep tokens up to and with the first end token, and say if there is one."""
    for index, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: index + 1], True
    return tokens, False


class _Interrupt(lightning.Callback):
    """Remembers that the user pressed Ctrl-C: Lightning turns it into an exit."""

    def __init__(self) -> None:
        self.seen = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.seen = isinstance(exception, KeyboardInterrupt)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's banners and advice to itself; its errors are exceptions."""
    loggers = [
        logging.getLogger(f"{name}{part}")
        for name in ("pytorch_lightning", "lightning", "lightning_fabric")
        for part in ("", ".utilities.rank_zero")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sequences(output: Any) -> torch.Tensor:
    """Return the token ids of either form of ``generate``'s answer."""
    tokens: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
    return tokens


def _too_large(samples: int) -> ConfigError:
    """Return the error for a batch that does not fit into memory."""
    if samples == 1:
        return ConfigError(
            "out of memory with a single sample; answers so far are kept\n"
            "use a device with more memory, model.dtype=bfloat16, or a smaller decoding.max_new_tokens"
        )
    return ConfigError(
        f"out of memory with {samples} samples at once; answers so far are kept\n"
        f"the same command with on_error=skip answers such batches one by one; a smaller trainer.batch_size begins anew"
    )


def _failed(sample: Sample, reason: str) -> SampleRecord:
    """Return the record of a sample that could not be answered."""
    asked = {name: getattr(sample, name) for name in ("id", "image_id", "task", "prompt")}
    return SampleRecord(**asked, meta=dict(sample.meta), text="", tokens=0, finished=False, error=reason)


def _reason(error: Exception) -> str:
    """Return why a sample failed: the project's own messages say everything, others need their place."""
    return " ".join(str(error).split()) if isinstance(error, MitigateError) else described(error)


def _same(item: Any) -> Any:
    """Return a batch as it is: the data set already makes whole batches."""
    return item
