"""The report: one self-contained HTML page per comparison."""

from __future__ import annotations

from mitigate.report.writing import write_report

__all__ = ["write_report"]
