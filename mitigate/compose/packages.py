"""What packages of configuration files bring, and which of their files nothing will ever read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from mitigate.compose.search_path import distribution_of
from mitigate.compose.session import FILE_GROUPS, TUNED, Session
from mitigate.discovery import BUILTIN_DISTRIBUTION

#: Files that W&B reads, not Hydra.
_SWEEPS = "sweep"


@dataclass(frozen=True)
class Brought:
    """The files of one package.

    Parameters
    ----------
    distribution
        Installed package.
    package
        Importable package of the files.
    files
        Those that are used, such as ``stack/NAME``.
    unused
        Those that are not, each with the reason.
    """

    distribution: str
    package: str
    files: list[str]
    unused: list[str]


def brought_files(hydra: Session) -> list[Brought]:
    """Return what every package on the search path brings, but for Hydra's own files, in Hydra's order."""
    found = []
    for source in hydra.sources():
        if source.provider == "hydra" or source.scheme() != "pkg":
            continue
        item = Brought(distribution_of(source.provider), source.path, [], [])
        for path in sorted(_walk(resources.files(source.path))):
            reason = _unused(hydra, path, item.distribution)
            stem = path.removesuffix(".yaml")
            item.files.append(stem) if reason is None else item.unused.append(f"{path}: {reason}")
        found.append(item)
    return found


def _unused(hydra: Session, path: str, distribution: str) -> str | None:
    """Return why nothing reads a file; ``None`` if something does."""
    group, _, option = path.rpartition("/")
    if not path.endswith(".yaml"):
        return "files end in .yaml"
    if not group:
        own = distribution == BUILTIN_DISTRIBUTION and path == "config.yaml"
        return None if own else f"files belong into a group: {', '.join((*FILE_GROUPS, TUNED))}"
    if group in FILE_GROUPS or group == _SWEEPS:
        return None
    if group != TUNED:
        return f"no such group; there are {', '.join((*FILE_GROUPS, TUNED))}"
    known = option.removesuffix(".yaml") in hydra.options("model")
    return None if known else "no model of that name (conf/model)"


def _walk(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for item in folder.iterdir():
        if item.is_dir():
            if item.name != "__pycache__":
                yield from _walk(item, f"{prefix}{item.name}/")
        elif item.name.endswith((".yaml", ".yml")):
            yield f"{prefix}{item.name}"
