"""The files benchmarks need: where they come from, where they lie, and how they are read."""

from __future__ import annotations

from mitigate.data.reading import open_image, parse_rows, read_document, read_lines, read_rows
from mitigate.data.sources import Source, data_folder, data_root, require_file

__all__ = [
    "Source",
    "data_folder",
    "data_root",
    "open_image",
    "parse_rows",
    "read_document",
    "read_lines",
    "read_rows",
    "require_file",
]
