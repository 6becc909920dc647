"""Where Hydra looks for configuration files: the project's own, and those of installed packages."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from mitigate.registry import config_packages


class MitigateSearchPath(SearchPathPlugin):
    """Add ``mitigate.conf`` and every package of the entry-point group ``mitigate.configs``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append what the search path does not have yet."""
        present = {element.path for element in search_path.get_path()}
        for distribution, package in {"mitigate": "mitigate.conf", **config_packages()}.items():
            if f"pkg://{package}" not in present:
                search_path.append(provider=f"mitigate:{distribution}", path=f"pkg://{package}")
