"""Runs the command line in several processes at once, as a launcher would; prints what came of it as one line of JSON.

A program of its own: it loads the libraries once and forks the processes of every case.

    python -m tests.runner.ranks FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import mitigate.cli.running
from mitigate.cli import main
from mitigate.errors import DataError
from mitigate.records import sample_files
from mitigate.runner import compare, run
from mitigate.runner.processes import STOP
from tests.runner.fake_world import FakeLoaded, install, resolved

IMAGES = 6
PATIENCE = 60.0


def launch(world: int, folder: Path, job: Callable[[Any], None], environment: dict[str, str] | None = None) -> Any:
    """Run a job in ``world`` processes; returns exit codes, what each one printed, and the seconds it took."""
    port, started = _free_port(), time.monotonic()
    children = [_start(rank, world, port, folder, job, environment or {}) for rank in range(world)]
    codes = [_end(child, started) for child in children]
    said = [(folder / f"said.{rank}").read_text() for rank in range(world)]
    return {"codes": codes, "said": said, "seconds": time.monotonic() - started}


def _start(rank: int, world: int, port: int, folder: Path, job: Any, environment: dict[str, str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port} if world > 1 else {}
    os.environ.update({key: str(number) for key, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update({key: value.replace("RANK", str(rank)) for key, value in environment.items()})
    said = os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    mitigate.cli.running.run = lambda _, console: job(console) or 0  # type: ignore[assignment]
    code = 1
    try:
        code = main(["run"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(child: int, started: float) -> int:
    """Wait for a process, and say how it ended; 999 if it hangs."""
    while time.monotonic() - started < PATIENCE:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 999


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def job(folder: Path, world: int, *, fail: Callable[[int], None] | None = None, stack: str = "turned", **changes: Any):  # type: ignore[no-untyped-def]
    """Return a job that runs a stack; ``fail`` is called before every answer."""

    def start(console: Any) -> None:
        loaded = FakeLoaded(pause=0.002)
        plain = loaded.model.generate

        def generate(**kwargs: Any) -> Any:
            if fail is not None:
                fail(len(loaded.model.calls))
            return plain(**kwargs)

        loaded.model.generate = generate  # type: ignore[method-assign]
        install(setattr, loaded)
        shared = {"trainer__devices": world, "trainer__batch_size": 2, "images": IMAGES, **changes}
        record = run(resolved(stack, **shared), folder, console=console)
        console.print(f"{record.status} {record.samples} {record.failures}")

    return start


def lines(folder: Path) -> list[str]:
    """Return a run's records without times, by sample; one that was answered twice is there twice."""
    made = []
    for path in sample_files(folder):
        for line in path.read_text().splitlines():
            data = json.loads(line)
            del data["seconds"]
            for counters in data["telemetry"].values():
                counters.pop("seconds", None)
            made.append((data["id"], json.dumps(data, sort_keys=True)))
    return [line for _, line in sorted(made)]


def in_rank(rank: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Return what acts in one of the processes only, once that has recorded something."""

    def fail(calls: int) -> None:
        if os.environ.get("RANK") == str(rank) and calls >= 2:
            act()

    return fail


def after_the_flag(folder: Path, fail: Callable[[int], None]) -> Callable[[int], None]:
    """Let the first process wait, with most of its share before it, until it can know that another one has failed."""

    def wait(calls: int) -> None:
        fail(calls)
        until = time.monotonic() + PATIENCE / 2
        while os.environ.get("RANK") == "0" and calls >= 2 and time.monotonic() < until:
            if (folder / STOP).exists():
                break
            time.sleep(0.01)

    return wait


def broken() -> None:
    raise DataError("the disk is gone")


def odd() -> None:
    raise TypeError("no such thing")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def same(folder: Path) -> dict[str, Any]:
    """One process, two and three: the same records, whatever the batch size and way of decoding."""
    found = {}
    for name, changes, worlds in (
        ("batches of 4", {"trainer__batch_size": 4}, (1, 2)),
        ("batch of all", {"trainer__batch_size": 100}, (1, 3)),
        ("sampling", {"decoding__do_sample": True}, (1, 2)),
    ):
        for world in worlds:
            place = folder / name / str(world)
            seen = launch(world, folder / name / f"said-{world}", job(place, world, **changes))
            files = len(sample_files(place))
            found[f"{name}, {world}"] = {**seen, "lines": lines(place), "files": files}
    return found


def failing(folder: Path) -> dict[str, Any]:
    """A process fails: all end, the first one says why, and another number of processes goes on."""
    found = {}
    acts = {"broken": broken, "odd": odd, "killed": killed, "interrupted": interrupted}
    # who goes on: three processes, or one
    cases = [("broken", 1, 3), ("odd", 1, 1), ("killed", 1, 1), ("killed", 0, 3), ("interrupted", 1, 1)]
    for name, rank, world in cases:
        place = folder / f"{name} {rank}"
        fail = in_rank(rank, acts[name])
        if name == "broken":
            fail = after_the_flag(place, fail)
        seen = launch(2, folder / f"{name} {rank} said", job(place, 2, fail=fail))
        kept = lines(place)
        again = launch(world, folder / f"{name} {rank} again", job(place, world))
        left = sorted(path.name for path in place.glob(".*"))
        found[f"{name} {rank}"] = {**seen, "kept": kept, "again": again, "lines": lines(place), "left": left}
    return found


def skipping(folder: Path) -> dict[str, Any]:
    """A sample fails in one process: it is recorded, and all others are answered."""

    def fail(_: int) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name != "_answer":
            frame = frame.f_back  # type: ignore[assignment]
        if "img-3/caption" in frame.f_locals["ids"]:
            raise ValueError("img-3 is odd")

    return {
        str(world): {
            **launch(world, folder / f"said-{world}", job(folder / str(world), world, fail=fail, on_error="skip")),
            "lines": lines(folder / str(world)),
        }
        for world in (1, 2)
    }


def comparing(folder: Path) -> dict[str, Any]:
    """A comparison: one table, from the first process."""

    def start(console: Any) -> None:
        install(setattr, FakeLoaded())
        runs = [resolved(stack, trainer__devices=2, images=1) for stack in ("none", "turned")]
        compare(runs, folder / "c", console=console)

    return {**launch(2, folder / "said", start), "there": (folder / "c" / "comparison.json").exists()}


def slurm(folder: Path) -> dict[str, Any]:
    """A scheduler has started the processes: those that were asked for, or others."""
    given = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "77"}
    ranks = {"SLURM_PROCID": "RANK", "SLURM_LOCALID": "RANK", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}

    def start(devices: int, name: str) -> Callable[[Any], None]:
        def alone(console: Any) -> None:
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(key, None)
            job(folder / name, devices)(console)

        return alone

    one = {**given, **ranks, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    return {
        "wrong": launch(2, folder / "said", start(1, "wrong"), {**given, **ranks}),
        "two": {**launch(2, folder / "said-2", start(2, "two"), {**given, **ranks}), "lines": lines(folder / "two")},
        "one": {**launch(1, folder / "said-1", start(1, "one"), one), "lines": lines(folder / "one")},
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    install(setattr, FakeLoaded())
    run(resolved(), place / "warm", console=Console(quiet=True))  # loads everything once, before the first fork
    cases = {"same": same, "failing": failing, "skipping": skipping, "comparing": comparing, "slurm": slurm}
    chosen = sys.argv[2:] or list(cases)
    sys.stdout.write(json.dumps({name: cases[name](place / name) for name in chosen}) + "\n")
