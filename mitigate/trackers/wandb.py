"""Weights & Biases: one run per stack, all stacks of a comparison in one group.

Offline unless configured otherwise; ``wandb sync <folder>`` uploads an offline run later, ``mitigate upload`` any
record. Started by an agent of a W&B sweep, everything belongs to the agent's run.
"""

from __future__ import annotations

import netrc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from mitigate.errors import ConfigError, DataError
from mitigate.trackers.base import TrackedRun, Tracker
from mitigate.trackers.wandb_file import is_whole

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("offline", "online", "disabled", "shared")
#: Pictures with more pixels than this along a side are photographs: logged as JPEG, and no larger than `MOST_PIXELS`.
_SMALL_PIXELS = 256
MOST_PIXELS = 512


class WandbTracker(Tracker):
    """One W&B run at a time, written below the comparison's folder (or ``WANDB_DIR``).

    Parameters
    ----------
    config
        ``mode`` (``None`` leaves it to the user's own W&B settings), ``project``, ``entity``, ``tags``.
    directory
        Folder of the comparison.

    Raises
    ------
    ConfigError
        If the mode is not one of W&B's, nobody is logged in where runs would go online, or the trial of a sweep would
        stay offline.
    """

    name: ClassVar[str] = "wandb"
    summary: ClassVar[str] = "Weights & Biases, offline by default"
    modes: ClassVar[tuple[str, ...]] = MODES

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        super().__init__(config, Path(os.environ.get("WANDB_DIR") or directory))
        self._run: Any = None
        self._staged = self.directory / "wandb" / "staged"
        mode = config.get("mode")
        if mode is not None and mode not in MODES:
            raise ConfigError(f"tracker.mode={mode!r} must be one of {', '.join(MODES)}, or null for your W&B settings")
        if self.trial and mode in ("offline", "disabled"):
            raise ConfigError(
                f"this is a trial of the W&B sweep {os.environ['WANDB_SWEEP_ID']}, but tracker.mode={mode} would keep "
                "its result from the sweep; add tracker=wandb to the sweep's command"
            )
        if mode not in ("offline", "disabled") and not _can_log_in(mode):
            raise ConfigError(
                "tracker=wandb logs online, but W&B knows no key on this machine; "
                "run `wandb login` first, or keep the runs here with tracker=offline"
            )

    @property
    def destination(self) -> str:
        """Mode and project, the entity if one is named, and in a sweep the agent's run."""
        parts = [self.name, self._mode, self.config.get("project"), self.config.get("entity")]
        if self.trial:
            parts = [self.name, self._mode, "sweep", os.environ["WANDB_SWEEP_ID"], os.environ.get("WANDB_RUN_ID")]
        return " ".join(str(part) for part in parts if part)

    @property
    def trial(self) -> bool:
        """Whether an agent of a W&B sweep started this process."""
        return bool(os.environ.get("WANDB_SWEEP_ID"))

    @property
    def _mode(self) -> str:
        from wandb.sdk import wandb_setup

        return str(self.config.get("mode") or wandb_setup.singleton().settings.mode)

    def start(self, run: TrackedRun) -> None:
        """Open a W&B run named after the stack, or the agent's run in a sweep."""
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        run_id = os.environ.get("WANDB_RUN_ID", "") if self.trial else run.id
        if self._mode == "offline":
            self._forget(run_id)
        self._staged = self._staged.with_name(f"staged-{run_id}")
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
        own = not self.trial  # of a sweep's runs, the sweep has chosen project, id and name
        self._run = wandb.init(
            project=(self.config.get("project") or "mitigate") if own else None,
            entity=self.config.get("entity") if own else None,
            group=run.group,
            id=run.id or None if own else None,
            name=run.name if own else None,
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
        for pattern in (f"offline-run-*-{run_id}", f"staged-{run_id}") if run_id else ():
            for folder in (self.directory / "wandb").glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write the run's summary; in a sweep also its history, which is where a sweep looks for its metric."""
        if self.trial:
            self._run.log(dict(metrics))
        self._run.summary.update(dict(metrics))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, pictures as W&B images."""
        import wandb
        from PIL import Image

        pictures = {id(cell): cell for row in rows for cell in row if isinstance(cell, Image.Image)}
        made = {key: _picture(picture) for key, picture in pictures.items()}  # several rows may show one picture
        cells = [[made.get(id(cell), cell) for cell in row] for row in rows]
        with _staging(self._staged):
            self._run.log({name: wandb.Table(columns=list(columns), data=cells)})

    def artifact(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        """Log files as a W&B artifact; unchanged ones make no new version."""
        import wandb

        made = wandb.Artifact(name, type=kind)
        with _staging(self._staged):
            for inside, path in files.items():
                made.add_file(str(path), name=inside)
            self._run.log_artifact(made)

    def finish(self, *, failed: bool = False) -> str | None:
        """Close the run; an offline one is found in the returned folder.

        Raises
        ------
        DataError
            If the folder of an offline run is not complete: W&B itself tells nobody that a disk is full.
        """
        run, self._run = self._run, None
        if run is None:
            return None
        where = None if run.disabled else str(run.settings.sync_dir) if run.offline else run.url
        with _staging(self._staged):
            run.finish(exit_code=1 if failed else 0)
        if run.offline and not failed and not run.disabled and not is_whole(Path(str(where))):
            raise DataError(f"W&B could not write all of {where}; is the disk full?")
        return where


def _picture(picture: Image) -> Any:
    """Return a picture as W&B takes it: small ones as they are, photographs as JPEG."""
    import wandb

    if max(picture.size) <= _SMALL_PIXELS:
        return wandb.Image(picture)
    shown = picture.convert("RGB")
    shown.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return wandb.Image(shown, file_type="jpg")


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
    """Let W&B stage pictures and files beside its offline runs, so that they are there for as long as the runs are."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
