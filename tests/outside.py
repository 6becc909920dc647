"""Packages that seem installed: a folder with modules and metadata, as an installer leaves it on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from mitigate import discovery, registry

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from mitigate.core import Access, Fidelity, Method, Point, Subscription, Tags


@dataclass(frozen=True, kw_only=True)
class Foo(Method):
    """Does nothing.

    Parameters
    ----------
    gain
        Strength.
    layers
        Range.
    """

    name: ClassVar[str] = "NAME"
    summary: ClassVar[str] = "from outside"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.HIDDEN_STATES}))

    gain: float = 1.0
    layers: str = "all"

    def subscriptions(self, model):
        return [Subscription(point=Point.HIDDEN_STATES, access=Access.WRITE, layers=(model.layers - 1,))]

    def on_hidden_states(self, event, state):
        return None
'''


def method(name: str = "foo") -> str:
    """Return the source of a method plugin with the class ``Foo``."""
    return METHOD.replace("NAME", name)


def install(
    site: Path,
    distribution: str,
    files: Mapping[str, str],
    points: Mapping[str, Mapping[str, str]],
    *,
    version: str = "0.1",
) -> Path:
    """Put a package on a folder of Python's path, as an installer does, and return the folder of its modules.

    Parameters
    ----------
    site
        The folder.
    distribution
        Name of the package; its modules are in a folder of that name with underscores.
    files
        Path below that folder -> content. Every folder becomes a package.
    points
        Entry-point group without ``mitigate.`` -> name -> value; ``{}`` stands for the name of the package.
    """
    package = site / distribution.lower().replace("-", "_").replace(".", "_")
    for path, text in {"__init__.py": "", **files}.items():
        file = package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for folder in file.relative_to(package).parents:
            if path.startswith("conf/") and str(folder) in (".", "conf"):
                (package / folder / "__init__.py").touch()
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = []
    for group, named in points.items():
        lines.append(f"[mitigate.{group}]")
        lines += [f"{name} = {value.format(package.name)}" for name, value in named.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return package


@contextmanager
def visible(monkeypatch: pytest.MonkeyPatch, *sites: Path) -> Iterator[None]:
    """Let this process find the packages of some folders, and no others, for the length of a block."""
    before = set(sys.modules)
    for site in reversed(sites):
        monkeypatch.syspath_prepend(site)
    names = {
        line.partition(": ")[2]
        for site in sites
        for file in site.glob("*.dist-info/METADATA")
        for line in file.read_text().splitlines()
        if line.startswith("Name: ")
    }
    monkeypatch.setenv("MITIGATE_PLUGINS", ",".join(sorted(names)) or "none")
    forget()
    yield
    forget()
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and any(Path(file).is_relative_to(site) for site in sites):
            del sys.modules[name]


def forget() -> None:
    """Forget what was found: registries and configuration packages are looked for once a process."""
    registry._registry.cache_clear()
    discovery.config_packages.cache_clear()
