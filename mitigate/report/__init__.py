"""The report: one self-contained HTML page per comparison."""

from __future__ import annotations

from mitigate.report.examples import Example, choose_examples
from mitigate.report.writing import write_report

__all__ = ["Example", "choose_examples", "write_report"]
