"""``mitigate upload``: show runs that lie on disk in a tracker, whenever they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from mitigate.cli.exits import FAILED, OK, USER_ERROR
from mitigate.cli.flags import read_flags, wants_help
from mitigate.errors import ConfigError, DataError
from mitigate.jsonfiles import read_object, write_json
from mitigate.registry import suggestion

if TYPE_CHECKING:
    from mitigate.runner.stored import StoredRun
    from mitigate.trackers.base import Tracker

HELP = """\
Usage: mitigate upload RUN... [--group NAME] [--force] [tracker.KEY=VALUE ...]

Log finished runs that lie on disk to Weights & Biases: one run per stack, all stacks of a comparison in one group, with
numbers, intervals, telemetry, sample tables, records and report. Nothing is run.

  RUN              folder of a comparison (all its stacks), of one stack in it, of a single run, or of a sweep
  --group NAME     put all of them into one group and compare them: runs of one stack with several seeds become one W&B
                   run with the pooled numbers. The comparison is written beside the first RUN, as NAME
  --force          log again what was logged before; it replaces what is there
  -h, --help       this text

Keys
  tracker.mode=MODE        online, offline, ...; default: your W&B settings (WANDB_MODE), online without any
  tracker.project=NAME     default: as in the run's configuration
  tracker.entity=NAME      default: as in the run's configuration, else your W&B default
  tracker.tags=[A,B]       labels
  tracker.name=NAME        another tracker (`mitigate list trackers`); default wandb

Examples
  mitigate upload runs/NAME
  mitigate upload runs/NAME tracker.mode=online tracker.project=mine tracker.entity=team
  mitigate upload runs/seed-0 runs/seed-1 runs/seed-2 --group three-seeds

What was logged where is remembered in the folder's tracked.json, and a run's id is always the same: started again after
an interruption or a failure, the command goes on with the stack that is missing.
"""

_FLAGS: Final = {"--group": True, "--force": False}


@dataclass(frozen=True)
class Target:
    """What is logged as one group.

    Parameters
    ----------
    directory
        Folder that remembers what was logged.
    runs, comparison
        All its runs, and what their comparison says.
    stacks
        Those to log; ``None``: all.
    """

    directory: Path
    runs: Sequence[StoredRun]
    comparison: Mapping[str, Any]
    stacks: Sequence[str] | None = None


def upload(arguments: Sequence[str], console: Console) -> int:
    """Log stored runs; everything is read and checked before the first is logged."""
    if not arguments or wants_help(arguments):
        _say(console, HELP, end="")
        return OK if arguments else USER_ERROR
    words, flags = read_flags("upload", arguments, _FLAGS)
    asked = [word for word in words if word.startswith("tracker.")]
    paths = [Path(word) for word in words if word not in asked]
    if odd := next((path for path in paths if "=" in str(path) and not path.exists()), None):
        raise ConfigError(f"mitigate upload takes folders and tracker.KEY=VALUE; {odd} is neither")
    if not paths:
        raise ConfigError("mitigate upload needs the folder of a run or comparison: mitigate upload runs/NAME")
    values = _values(asked)
    targets = [_together(paths, flags["--group"])] if "--group" in flags else _targets(paths)
    trackers = [_tracker(target, values) for target in targets]
    from mitigate.runner.folder import claim
    from mitigate.runner.tracking import track

    complete, force = True, "--force" in flags
    for target, tracker in zip(targets, trackers, strict=True):
        with claim(target.directory, given=True):
            done = track(
                tracker,
                target.comparison,
                target.runs,
                target.directory,
                stacks=target.stacks,
                force=force,
                report=lambda stack, place: _say(console, f"{stack}: {place}"),
            )
        complete = complete and done.complete
        nothing = f"{target.directory}: nothing new for {tracker.destination}; --force logs it again"
        for line in done.lines or [nothing]:
            _say(console, line)
    return OK if complete else FAILED


def _values(asked: Sequence[str]) -> dict[str, Any]:
    """Read ``tracker.KEY=VALUE``, typed as in a configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from mitigate.compose.schema import TrackerConfig

    node: Any = OmegaConf.structured(TrackerConfig)
    keys = []
    for text in asked:
        key, given, _ = text.removeprefix("tracker.").partition("=")
        if key not in node:
            raise ConfigError(f"{text}: a tracker has no key {key!r}{suggestion(key, list(node))}")
        try:
            override = OverridesParser.create().parse_override(text) if given else None
            if override is None or override.is_sweep_override():
                raise ConfigError(f"{text} must be tracker.KEY=VALUE with one value")
            node[key] = override.value()
        except (HydraException, OmegaConfBaseException):
            raise ConfigError(f"{text}: this value cannot be read; quote brackets for the shell") from None
        keys.append(key)
    read: Any = OmegaConf.to_container(node)
    return {key: read[key] for key in keys}


def _tracker(target: Target, values: Mapping[str, Any]) -> Tracker:
    """Build the tracker for a folder: by default W&B with the user's own settings, and the project of the run."""
    from mitigate.registry import trackers

    if values.get("name") == "none":
        raise ConfigError("tracker.name=none logs nowhere; leave it out, or name another tracker")
    recorded = target.runs[0].config["tracker"]
    config = {**recorded, **values}
    if config["name"] in ("none", "wandb"):
        config |= {"name": "wandb", "mode": values.get("mode")}
    made: Tracker = trackers().get(config["name"])(config, target.directory)
    return made


def _targets(paths: Sequence[Path]) -> list[Target]:
    """Return what the folders hold: comparisons as a whole, parts of comparisons, single runs."""
    from mitigate.runner.stored import find_runs

    targets: list[Target] = []
    for path in paths:
        runs = find_runs([path])
        if (path / "comparison.json").exists():
            targets.append(Target(path, runs, _comparison(path, runs)))
        else:
            targets += [_single(run) for run in runs]
    return targets


def _single(run: StoredRun) -> Target:
    """Return a run by itself, or as the stack of a comparison that it is."""
    from mitigate.runner.stored import find_runs

    whole = run.directory.resolve().parent
    if not (whole / "comparison.json").exists():
        return Target(run.directory, [run], _comparison(run.directory, [run]))
    above = run.directory.parent if run.directory.name else whole
    runs = find_runs([above])
    return Target(above, runs, _comparison(above, runs), [run.stack])


def _comparison(directory: Path, runs: Sequence[StoredRun]) -> Mapping[str, Any]:
    """Return the comparison of a folder as it was written, or made anew where it is not of these runs."""
    from mitigate.runner.comparable import check_comparable
    from mitigate.runner.results import FORMAT, summarise
    from mitigate.runner.standalone import notes_of

    path = directory / "comparison.json"
    if path.exists():
        found = read_object(path)
        made = {run.stack: run.record.created_at for run in runs}
        if found.get("format") == FORMAT and made == {
            stack: data["record"]["created_at"] for stack, data in found["stacks"].items()
        }:
            return found
    check_comparable(runs)
    return summarise(directory.resolve().name, runs, notes=notes_of(runs))


def _together(paths: Sequence[Path], name: str) -> Target:
    """Compare all runs as one group, and write what comes out beside the first one."""
    from mitigate.report import write_report
    from mitigate.runner.comparable import check_comparable
    from mitigate.runner.results import summarise
    from mitigate.runner.standalone import notes_of
    from mitigate.runner.stored import find_runs

    if Path(name).name != name:
        raise ConfigError(f"--group {name} must be a plain name, without /")
    runs = find_runs(paths)
    check_comparable(runs)
    folder = paths[0].resolve().parent / name
    if (folder / "record.json").exists() or any(folder.glob("*/record.json")):
        raise DataError(f"{folder} holds runs already; give the group another name")
    comparison = summarise(name, runs, notes=notes_of(runs))
    folder.mkdir(exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    write_report(folder, comparison, runs)
    return Target(folder, runs, comparison)


def _say(console: Console, text: str, *, end: str = "\n") -> None:
    console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)
