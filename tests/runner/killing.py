"""Kills a comparison at random moments again and again; prints what it saw as one line of JSON.

What the runner counted as written must be there afterwards, whatever the moment, and is never written again.

A program of its own: it loads the libraries once and forks a fresh process for every try.

    python -m tests.runner.killing FOLDER KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from mitigate.records import read_samples, sample_files
from mitigate.runner import compare
from mitigate.runner.progress import StackProgress
from tests.runner.fake_world import FakeLoaded, install, resolved

STACKS = ("none", "turned")
IMAGES = 6
#: Beside the comparison's folder: a byte for each record that the runner has counted as written.
COUNTED = "counted"


def once(folder: Path) -> None:
    """Run the comparison, or go on with it."""
    install(setattr, FakeLoaded(pause=0.01))
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / COUNTED).open("ab", buffering=0) as counted:
        advance = StackProgress.advance

        def count(self: StackProgress, records: int) -> None:
            counted.write(b"." * records)
            advance(self, records)

        with patch.object(StackProgress, "advance", count):
            _compare(folder)


def _compare(folder: Path) -> None:
    runs = [resolved(stack, images=IMAGES, trainer__batch_size=2, runs_dir=str(folder.parent)) for stack in STACKS]
    compare(runs, folder, console=Console(quiet=True))


def killed(folder: Path, wait: float) -> bool:
    """Start the comparison in a process of its own and kill it; say whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            once(folder)
        except BaseException as error:
            (folder.parent / "error.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)  # no effect on one that has ended: it is not reaped yet
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"the comparison failed: {(folder.parent / 'error.txt').read_text()}")
    return os.WIFSIGNALED(status)


def answers(folder: Path) -> dict[str, Any]:
    """Return what is recorded, and how often each sample is."""
    found: dict[str, Any] = {}
    for stack in STACKS:
        lines = [line for path in sample_files(folder / stack) for line in path.read_bytes().split(b"\n")[:-1]]
        ids = [json.loads(line)["id"] for line in lines]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        records = {record.id: list(record.answer) for record in read_samples(folder / stack)}
        found[stack] = {"repeated": repeated, "records": records}
    return found


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until ``kills`` processes died while they were at work; every comparison is brought to its end."""
    draw = random.Random(seed)
    undisturbed = folder / "undisturbed" / "c"
    once(folder / "warm" / "c")
    started = time.monotonic()
    once(undisturbed)
    whole = time.monotonic() - started
    expected = answers(undisturbed)
    seen: dict[str, Any] = {"kills": 0, "in_the_middle": 0, "comparisons": 0, "wrong": []}
    while seen["kills"] < kills:
        place = folder / f"killed-{seen['comparisons']}" / "c"
        done, before = 0, -1
        while killed(place, draw.uniform(0, whole)):
            seen["kills"] += 1
            before, done = done, sum(len(each["records"]) for each in answers(place).values())
            seen["in_the_middle"] += 0 < done < 2 * len(expected["none"]["records"])
            counted = (place.parent / COUNTED).stat().st_size if (place.parent / COUNTED).exists() else 0
            if done < max(before, counted):
                seen["wrong"].append(f"{done} records of {max(before, counted)} are left")
        seen["comparisons"] += 1
        if answers(place) != expected:
            seen["wrong"].append(f"{place} differs from the undisturbed comparison")
        first, other = (json.loads((each / "comparison.json").read_text()) for each in (undisturbed, place))
        for key in ("n_samples", "n_images", "data_hash"):
            if first[key] != other[key]:
                seen["wrong"].append(f"{place}: {key} is {other[key]}, not {first[key]}")
        for stack in STACKS:
            for key in ("metrics", "differences", "mcnemar"):
                if first["stacks"][stack][key] != other["stacks"][stack][key]:
                    seen["wrong"].append(f"{place}: {key} of {stack} differ")
    return seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
