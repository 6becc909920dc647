"""A comparison that is killed at any moment loses no record, writes none twice, and ends with the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_lose_and_repeat_no_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.runner.killing", str(tmp_path), str(KILLS), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["wrong"] == []
    assert seen["kills"] >= KILLS
    assert seen["in_the_middle"] >= KILLS // 5  # not only before the first record and after the last
