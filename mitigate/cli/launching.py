"""``-m hydra/launcher=NAME``: the jobs of a sweep are handed to a launcher of Hydra, such as submitit's for SLURM."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.cli.exits import FAILED, OK
from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_GROUP, _KEY = "hydra/launcher=", "hydra.launcher."
_REMEDY = "pip install 'mitigate[slurm]' brings submitit_slurm and submitit_local"
_SETTINGS = "take it out or correct it; with --dry-run, the command without it prints all settings of the launcher"


def split_launcher(overrides: Sequence[str], *, sweep: bool) -> tuple[list[str], list[str]]:
    """Separate the overrides of the jobs from those of the launcher.

    Raises
    ------
    ConfigError
        If the launcher's are given without ``-m``, or without the launcher's name.
    """
    mine = [token for token in overrides if token.startswith((_GROUP, _KEY))]
    if mine and not sweep:
        raise ConfigError(f"{mine[0]}: a launcher starts the jobs of -m; add -m, also for a single job")
    if mine and not any(token.startswith(_GROUP) for token in mine):
        raise ConfigError(f"{mine[0]}: name the launcher, too, such as hydra/launcher=submitit_slurm")
    return [token for token in overrides if token not in mine], mine


@dataclass(frozen=True)
class Commands:
    """What the launcher calls once for every job, wherever that runs: the command, in a process of its own.

    Parameters
    ----------
    commands
        Arguments of ``mitigate`` per job.
    folder
        Where the commands were given.
    """

    commands: Sequence[Sequence[str]]
    folder: str

    def __call__(self, config: Any) -> int:
        """Run the job that the launcher has numbered; an error is its own, the others go on."""
        command = [sys.executable, "-m", "mitigate", *self.commands[int(config.number)]]
        done = subprocess.run(command, cwd=self.folder, env=os.environ, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with exit code {done.returncode}")
        return 0


def job_command(command: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments that run one job of a sweep by itself, in the folder it has in the sweep."""
    folder = folder.resolve()
    kept = [token for token in overrides if not token.startswith(("name=", "runs_dir="))]
    return [command, *kept, f'runs_dir="{folder.parent}"', f'name="{folder.name}"']


def launch(settings: Sequence[str], commands: Sequence[Sequence[str]], console: Console, *, dry: bool) -> int:
    """Start the jobs with a launcher and wait for them; or only show what would be started.

    Parameters
    ----------
    settings
        Overrides of the launcher.
    commands
        Arguments of ``mitigate`` per job.
    console
        Where to show it.
    dry
        Whether to start nothing.

    Raises
    ------
    ConfigError
        If there is no such launcher, it has no such setting, or it cannot start anything on this machine.
    """
    from hydra import compose, initialize
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobStatus
    from hydra.errors import HydraException
    from hydra.types import HydraContext
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    sweep = [f"hydra.sweep.dir={Path.cwd() / 'runs' / '.launcher'}", "hydra.sweep.subdir=${hydra.job.num}"]
    fixed = [
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.job.name=mitigate",
    ]
    with initialize(config_path=None, job_name="mitigate", version_base="1.3"):
        try:
            config = compose(None, [*sweep, *fixed, *settings], return_hydra_config=True)
            shown = OmegaConf.to_yaml(config.hydra.launcher)
        except (HydraException, OmegaConfBaseException) as error:
            reason, *_ = str(error).splitlines()
            remedy = _REMEDY if "Could not find" in reason else _SETTINGS
            raise ConfigError(f"{' '.join(settings)}: {reason}\n{remedy}") from error
        text = "\n".join([f"# {settings[0]}", shown, *(shlex.join(["mitigate", *command]) for command in commands), ""])
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        if dry:
            return OK
        with open_dict(config):
            config.hydra.job.config_name = None
        hydra: Any = GlobalHydra.instance().hydra
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        task = Commands([list(command) for command in commands], str(Path.cwd()))
        try:
            launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
            done = launcher.launch([[f"+number={number}"] for number in range(len(commands))], 0)
        except (RuntimeError, SystemExit) as error:
            raise ConfigError(f"{settings[0]}: {str(error).splitlines()[0]}") from error
    failed = [job for job in done if job.status is not JobStatus.COMPLETED]
    for job in failed:
        text = f"Job {done.index(job) + 1} failed: {job._return_value}\nThe same command runs what is missing."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return FAILED if failed else OK
