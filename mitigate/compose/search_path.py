"""Where Hydra looks for configuration files: the project's own, and those of installed packages."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from mitigate.discovery import BUILTIN_DISTRIBUTION
from mitigate.registry import config_packages

_PROVIDER = "mitigate:"


class MitigateSearchPath(SearchPathPlugin):
    """Add ``mitigate.conf`` and every package of the entry-point group ``mitigate.configs`` that can be imported."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append what the search path does not have yet."""
        present = {element.path for element in search_path.get_path()}
        brought = [(entry.distribution, entry.value) for entry in config_packages() if entry.broken is None]
        for distribution, package in [(BUILTIN_DISTRIBUTION, "mitigate.conf"), *brought]:
            if f"pkg://{package}" not in present:
                search_path.append(provider=f"{_PROVIDER}{distribution}", path=f"pkg://{package}")


def distribution_of(provider: str) -> str:
    """Return the package behind a provider of the search path; ``main`` is Hydra's word for the project's own files."""
    return provider.removeprefix(_PROVIDER) if provider.startswith(_PROVIDER) else BUILTIN_DISTRIBUTION
