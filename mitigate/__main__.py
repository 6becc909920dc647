"""``python -m mitigate`` is the console script."""

from __future__ import annotations

import sys

from mitigate.cli import main

if __name__ == "__main__":
    sys.exit(main())
