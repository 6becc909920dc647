"""Weights & Biases: one run per stack, all stacks of a comparison in one group.

Offline unless configured otherwise; ``wandb sync <folder>`` uploads an offline run later.
"""

from __future__ import annotations

import netrc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

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
        If the mode is not one of W&B's, or nobody is logged in where runs would go online.
    """

    name: ClassVar[str] = "wandb"
    summary: ClassVar[str] = "Weights & Biases, offline by default"
    modes: ClassVar[tuple[str, ...]] = MODES

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        super().__init__(config, directory)
        self._run: Any = None
        mode = config.get("mode")
        if mode is not None and mode not in MODES:
            raise ConfigError(f"tracker.mode={mode!r} must be one of {', '.join(MODES)}, or null for your W&B settings")
        if mode not in ("offline", "disabled") and not _can_log_in(mode):
            raise ConfigError(
                "tracker=wandb logs online, but W&B knows no key on this machine; "
                "run `wandb login` first, or keep the runs here with tracker=offline"
            )

    def start(self, run: TrackedRun) -> None:
        """Open a W&B run named after the stack."""
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        self._forget(run.id)
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
            id=run.id or None,
            name=run.name,
            notes=run.notes,
            tags=[*self.config.get("tags", ()), *run.tags],
            mode=self.config.get("mode"),
            config=dict(run.config),
            dir=str(self.directory),
            reinit="create_new",
            settings=settings,
        )

    def _forget(self, run_id: str) -> None:
        """Remove the offline folders of an earlier try: killed while logging, or with older numbers."""
        for folder in (self.directory / "wandb").glob(f"offline-run-*-{run_id}") if run_id else ():
            shutil.rmtree(folder, ignore_errors=True)

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


def _can_log_in(mode: str | None) -> bool:
    """Say whether W&B would go online with credentials it has, or not go online at all; nothing is asked or sent."""
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    if mode is None and settings.mode in ("offline", "disabled", "dryrun"):
        return True
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
    return False


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
