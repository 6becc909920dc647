"""Exit codes of the console script; an unexpected exception ends with Python's own 1, too, and its traceback."""

from __future__ import annotations

OK = 0
FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
