"""Weights & Biases: one run per stack, all stacks of a comparison in one group.

Offline unless configured otherwise; ``wandb sync <folder>`` uploads an offline run later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from mitigate.errors import ConfigError
from mitigate.trackers.base import TrackedRun, Tracker

MODES = ("offline", "online", "disabled", "shared")


class WandbTracker(Tracker):
    """One W&B run at a time, written below the comparison's folder.

    Parameters
    ----------
    config
        ``mode`` (``None`` leaves it to the user's own W&B settings), ``project``, ``entity``, ``tags``.
    directory
        Folder of the comparison.

    Raises
    ------
    ConfigError
        If the mode is not one of W&B's.
    """

    name: ClassVar[str] = "wandb"
    summary: ClassVar[str] = "Weights & Biases, offline by default"

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        super().__init__(config, directory)
        self._run: Any = None
        mode = config.get("mode")
        if mode is not None and mode not in MODES:
            raise ConfigError(f"tracker.mode={mode!r} must be one of {', '.join(MODES)}, or null for your W&B settings")

    def start(self, run: TrackedRun) -> None:
        """Open a W&B run named after the stack."""
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        # A comparison lasts minutes and records its own versions: what W&B collects by itself only costs time.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=self.config.get("project") or "mitigate",
            entity=self.config.get("entity"),
            group=run.group,
            name=run.name,
            notes=run.notes,
            tags=[*self.config.get("tags", ()), *run.tags],
            mode=self.config.get("mode"),
            config=dict(run.config),
            dir=str(self.directory),
            reinit="create_new",
            settings=settings,
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write the run's summary."""
        self._run.summary.update(dict(metrics))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, pictures as W&B images."""
        import wandb
        from PIL import Image

        cells = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
        with _staging(self.directory / "wandb"):
            self._run.log({name: wandb.Table(columns=list(columns), data=cells)})

    def finish(self, *, failed: bool = False) -> str | None:
        """Close the run; an offline one is found in the returned folder."""
        run, self._run = self._run, None
        if run is None:
            return None
        where = None if run.disabled else str(run.settings.sync_dir) if run.offline else run.url
        with _staging(self.directory / "wandb"):
            run.finish(exit_code=1 if failed else 0)
        return where


@contextmanager
def _staging(directory: Path) -> Iterator[None]:
    """Let W&B stage a table's pictures beside its offline runs, so that the folder can be moved and synced later."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
