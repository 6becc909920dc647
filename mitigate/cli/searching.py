"""``--info searchpath``: where configuration files are looked for, and who brings them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_search_path(console: Console) -> int:
    """Print Hydra's search path of this installation: what stands first wins."""
    from mitigate.compose.session import session
    from mitigate.registry import config_packages

    table = Table("provider", "search path", "folder", title="Config search path", title_justify="left")
    with session() as hydra:
        for place in hydra.search_path():
            table.add_row(Text(place.provider), Text(place.path), Text(place.folder))
    for entry in config_packages():
        if entry.broken is not None:
            row = (f"mitigate:{entry.distribution}", f"pkg://{entry.value}", f"left out: {entry.broken}")
            table.add_row(*(Text(cell, style="red") for cell in row))
    console.print(table)
    return 0
