"""Several processes share one run: how they start, wait for each other, and what becomes of an error in one of them.

Every process loads the same weights and answers its share, so they have nothing to exchange but how it ended: gloo
serves on every device, and notices at once when another process is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from mitigate import errors
from mitigate.errors import ConfigError, DataError, MitigateError
from mitigate.processes import place

#: How long a process waits for the others: shares differ, and the first one may have a judge to ask in between.
PATIENCE: Final = timedelta(days=1)
#: Seconds between two looks whether the others are done.
PULSE: Final = 0.02
#: In the run's folder: a process has failed, and the others need not go on.
STOP: Final = ".stop"
_GONE = "another process of this run has ended unexpectedly (killed, or out of memory?)"


class _Stopped(Exception):
    """Another process has failed, so that there is no need to go on; nobody sees it."""


class Watch:
    """Tells a process between two batches that it should not go on.

    Parameters
    ----------
    folder
        The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._flag, self._parent = Path(folder) / STOP, os.getppid()
        self._terminated = False

    def listen(self) -> None:
        """Note a scheduler's SIGTERM; Lightning restores the former handler afterwards.

        Its own handler waits for a signal to every process, and for ever if one of them has done its share.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: object) -> None:
        self._terminated = True

    def clear(self) -> None:
        """Forget what an earlier run has left."""
        with suppress(OSError):
            self._flag.unlink(missing_ok=True)

    def stop(self) -> None:
        """Tell the others that this process has failed."""
        with suppress(OSError):
            self._flag.touch()

    def check(self, trainer: Any) -> None:
        """Raise if this process should not go on.

        Raises
        ------
        _Stopped
            If another process has failed.
        DataError
            If a process that this one has started is gone.
        KeyboardInterrupt
            On a scheduler's signal; if the process that has started this one is gone.
        """
        if self._terminated or trainer.received_sigterm:  # a scheduler expects the run to end
            raise KeyboardInterrupt
        if trainer.world_size == 1:
            return
        if trainer.global_rank and os.getppid() != self._parent:
            raise KeyboardInterrupt
        if self._flag.exists():
            raise _Stopped
        if any(child.poll() is not None for child in getattr(trainer.strategy.launcher, "procs", ())):
            raise DataError(f"{_GONE}; answers so far are kept, the same command goes on from there")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the ``trainer`` configuration into arguments of Lightning's Trainer.

    Raises
    ------
    ConfigError, ValueError
        If the scheduler has started other processes than the configuration asks for, or nobody those of other machines.
    """
    asked = {key: config[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
    several = config["devices"] != 1 or config["num_nodes"] != 1
    if config["strategy"] == "ddp" or (config["strategy"] == "auto" and several):
        asked["strategy"] = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # torchrun can be a task of srun
        _check_slurm()
        # Lightning's own way of requeueing would save a checkpoint; records need none.
        environment = SLURMEnvironment(auto_requeue=False)
        environment.validate_settings(num_devices=config["devices"], num_nodes=config["num_nodes"])
        asked["plugins"] = [environment]
        return asked
    _check_started(config)
    if config["num_nodes"] > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={config['num_nodes']}, but nothing says where the other machines are;"
            " put srun or torchrun before the command"
        )
    return asked


def _check_started(config: Mapping[str, Any]) -> None:
    """Refuse other processes than were asked for: each would do the whole work, and write into the same files."""
    world = os.environ.get("WORLD_SIZE", "1")
    asked = str(config["devices"] * config["num_nodes"])
    if config["devices"] > 0 and asked != world and (world != "1" or TorchElasticEnvironment.detect()):
        raise ConfigError(
            f"trainer.devices={config['devices']} and trainer.num_nodes={config['num_nodes']}, but WORLD_SIZE={world}"
            " processes were started; make trainer.devices the number per machine"
        )


def _check_slurm() -> None:
    """Refuse to wait for processes that nobody has started."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"SLURM has {tasks} tasks for this job, but one process was started; put srun before the command"
        )


def agree(failure: BaseException | None, trainer: Any, watch: Watch) -> None:
    """Wait until every process has done its share, and end all of them if one has failed: the first one tells why.

    Parameters
    ----------
    failure
        What ended this process's share early, if anything did.
    trainer
        The Trainer, after its work.
    watch
        Where the others see that there was a failure.

    Raises
    ------
    Exception
        In the first process, the failure: its own, else the first of another process.
    SystemExit
        In the others, if there is any; they say nothing.
    """
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        if failure is not None:
            raise failure
        return
    if failure is not None and not isinstance(failure, _Stopped):
        watch.stop()
    told: list[Any] = [None] * trainer.world_size
    try:
        waiting = torch.distributed.barrier(async_op=True)
        while not waiting.is_completed():
            time.sleep(PULSE)  # so that Ctrl-C is heard
        waiting.wait()
        torch.distributed.all_gather_object(told, _told(failure))
    except RuntimeError as error:
        leave()
        if trainer.global_rank:
            raise SystemExit(1) from error
        if failure is None or isinstance(failure, _Stopped):
            raise DataError(f"{_GONE}; answers so far are kept, the same command goes on from there") from error
        raise failure from None
    failed = [one for one in told if one is not None]
    if not trainer.global_rank:
        watch.clear()
    if not failed:
        return
    leave()
    if trainer.global_rank:
        raise SystemExit(0)
    if failure is not None and not isinstance(failure, _Stopped):
        raise failure
    raise _as_error(failed[0]) from failure


def leave() -> None:
    """Close the connections to other processes: their threads must not outlive the interpreter."""
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _told(failure: BaseException | None) -> dict[str, str] | None:
    """Return a failure as plain text; other processes may lack its class."""
    if failure is None or isinstance(failure, _Stopped):
        return None
    trace = "".join(traceback.format_exception(failure))
    return {"kind": type(failure).__name__, "message": str(failure), "place": place(), "trace": trace}


def _as_error(told: Mapping[str, str]) -> Exception:
    """Make an error of another process one of this process."""
    kind = getattr(errors, told["kind"], None)
    if isinstance(kind, type) and issubclass(kind, MitigateError) and kind is not errors.HookError:
        error: Exception = kind(told["message"])
        return error
    return RuntimeError(f"{told['place']} failed\n{told['trace']}")
