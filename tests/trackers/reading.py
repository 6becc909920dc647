"""Read back what an offline W&B run holds, from its file: a LevelDB log of protobuf records in blocks of 32 KiB."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def read_back(run_dir: Path) -> list[Any]:
    """Read the records of a finished offline run; W&B's own process may still be writing the last ones."""
    (path,) = run_dir.glob("*.wandb")
    deadline = time.monotonic() + 20
    while True:
        records = parse(path.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parse(data: bytes) -> list[Any]:
    """Read a ``.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"
    records, position, parts = [], 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


@dataclass
class Logged:
    """An offline run."""

    folder: Path
    run: Any
    config: dict[str, Any]
    summary: dict[str, Any]
    history: dict[str, Any]
    artifacts: dict[str, Any]
    exits: list[int]

    @property
    def numbers(self) -> dict[str, float]:
        """The summary without what W&B adds."""
        own = {key: value for key, value in self.summary.items() if not key.startswith(("_", "samples."))}
        return {key: float(value) for key, value in own.items()}

    def table(self, name: str = "samples") -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table."""
        files = self.artifact("run_table", name)
        data = json.loads(files[f"{name}.table.json"].read_bytes())
        return data["columns"], data["data"]

    def artifact(self, kind: str, part: str = "") -> dict[str, Path]:
        """Name -> file of the only artifact of a kind."""
        (found,) = [item for item in self.artifacts.values() if item.type == kind and part in item.name]
        return {item.path: Path(item.local_path) for item in found.manifest.contents}


def read_run(folder: Path) -> Logged:
    """Read an offline run."""
    records = read_back(folder)
    of = {kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind] for kind in KINDS}
    return Logged(
        folder=folder,
        run=of["run"][0],
        config={item.key: json.loads(item.value_json) for item in of["run"][0].config.update},
        summary=_items(item for record in of["summary"] for item in record.update),
        history=_items(item for record in of["history"] for item in record.item),
        artifacts={record.name: record for record in of["artifact"]},
        exits=[record.exit_code for record in of["exit"]],
    )


KINDS = ("run", "summary", "history", "artifact", "exit")


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_group(directory: Path) -> dict[str, Logged]:
    """Read all offline runs below a folder, by name."""
    found = [read_run(folder) for folder in sorted((directory / "wandb").glob("offline-run-*"))]
    runs = {logged.run.display_name: logged for logged in found}
    assert len(runs) == len(found)
    return runs
