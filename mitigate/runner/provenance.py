"""Where a number comes from: versions of the software and the state of its source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import mitigate
from mitigate.discovery import BUILTIN_DISTRIBUTION
from mitigate.registry import RUNTIME_DISTRIBUTION, Registry, benchmarks, methods, metrics
from mitigate.runner.fingerprint import code_hash

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun

CODE: Final = "code of "
"""What a key begins with under which `plugin_versions` tells the hash of a plugin's source."""

PACKAGES: Final = ("torch", "transformers", "tokenizers", "pytorch-lightning", "hydra-core", "numpy", "pillow", "wandb")


def versions(resolved: ResolvedRun) -> dict[str, str]:
    """Return the versions of the software, the benchmark and each method, without importing any package."""
    found = {
        "mitigate": mitigate.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in (*PACKAGES, *_packages_of_plugins(resolved)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | plugin_versions(resolved)


def _packages_of_plugins(resolved: ResolvedRun) -> list[str]:
    """Return the packages methods, benchmark and metrics come from, but for the project and what is registered here."""
    chosen: list[tuple[Registry[Any], str]] = [(methods(), method.name) for method in resolved.methods.values()]
    chosen += [(benchmarks(), resolved.benchmark.name)]
    chosen += [(metrics(), name) for name in resolved.benchmark.extra_metrics]
    origins = {claim.distribution for registry, name in chosen for claim in registry.claims().get(name, ())}
    return sorted(origins - {BUILTIN_DISTRIBUTION, RUNTIME_DISTRIBUTION})


def plugin_versions(resolved: ResolvedRun) -> dict[str, str]:
    """Return the declared versions of benchmark, methods and extra metrics, and a short hash of the code of each."""
    benchmark = resolved.benchmark
    plugins: list[tuple[str, Any]] = [("benchmark", benchmark)]
    plugins += [("method", method) for method in resolved.methods.values()]
    plugins += [("metric", metrics().get(name)) for name in benchmark.extra_metrics]
    declared = {f"{kind} {plugin.name}": str(plugin.version) for kind, plugin in plugins}
    return declared | {f"{CODE}{kind} {plugin.name}": code_hash(_class(plugin)) for kind, plugin in plugins}


def _class(plugin: Any) -> type:
    return plugin if isinstance(plugin, type) else type(plugin)


def git_state() -> dict[str, str | bool | None]:
    """Return ``sha`` and ``dirty`` of the checkout the package runs from.

    Both are ``None`` where git is missing, fails, or does not track the package (an installed package may lie in the
    folder of somebody else's repository). Untracked files count as dirty: a new method file is code that ran.
    """
    package = Path(mitigate.__file__).resolve().parent
    # A hook or a caller may point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments],
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=20,
            encoding="utf-8",
            errors="replace",
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"sha": None, "dirty": None}
