"""Published tables, run again with their own protocol and held against what was measured here.

A table is an experiment of ``conf/experiment`` whose ``reproduction`` node holds the published values and names the
protocols (experiments, too) under which they are measured. A published value never enters a run or its record.
"""

from __future__ import annotations

from mitigate.reproduction.tables import Cell, Column, Protocol, Published, Setting, read_protocol, read_tables

__all__ = ["Cell", "Column", "Protocol", "Published", "Setting", "read_protocol", "read_tables"]
