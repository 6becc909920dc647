"""Throw-away environments with mitigate and the outside packages in them: editable, or from wheels.

Nothing is fetched and torch is not installed again: what the packages need comes from the running environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ("mitigate-pai", "mitigate-vcd")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
LITTER = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")


@dataclass(frozen=True)
class Environment:
    """A virtual environment in ``folder``; commands run in ``work``; ``origins`` is what pip installed, by name."""

    folder: Path
    sources: Path
    work: Path
    origins: dict[str, list[str]]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *arguments: str, plugins: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run its interpreter, as somebody would who has never heard of this repository."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MITIGATE_PLUGINS")}
        kept |= {"PYTHONNOUSERSITE": "1", **({} if plugins is None else {"MITIGATE_PLUGINS": plugins})}
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.work, env=kept, capture_output=True, text=True)

    def mitigate(self, *arguments: str, plugins: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run("-m", "mitigate", *arguments, plugins=plugins)

    def install(self, *names: str) -> None:
        """Install packages; what the running environment has of the same names is not this one's to replace."""
        words = [word for name in names for word in self.origins[name]]
        self.pip("install", "--ignore-installed", *OFFLINE, *words)

    def pip(self, *arguments: str) -> None:
        """Run pip on it."""
        checked([sys.executable, "-m", "pip", "--python", str(self.python), *arguments])


def checked(command: list[str]) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def copied(folder: Path) -> dict[str, Path]:
    """Copy the sources of mitigate and the packages, so that building leaves nothing behind in this repository."""
    home = folder / "mitigate"
    home.mkdir(parents=True)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, home)
    for part in ("mitigate", "conf"):
        shutil.copytree(ROOT / part, home / part, ignore=LITTER)
    for package in PACKAGES:
        shutil.copytree(HERE / package, folder / package, ignore=LITTER)
    return {name: folder / name for name in ("mitigate", *PACKAGES)}


def make(folder: Path, *, editable: bool) -> Environment:
    """Make an environment and install mitigate and the packages into it."""
    venv, sources, wheels = folder / "venv", folder / "sources", folder / "wheels"
    copies = copied(sources)
    if editable:
        origins = {name: ["--editable", str(source)] for name, source in copies.items()}
    else:
        checked(
            [sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", str(wheels), *map(str, copies.values())]
        )
        origins = {name: list(map(str, wheels.glob(f"{name.replace('-', '_')}-*.whl"))) for name in copies}
    checked([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    lent = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    environment = Environment(venv, sources, folder / "work", origins)
    environment.work.mkdir()
    environment.install(*origins)
    return environment
