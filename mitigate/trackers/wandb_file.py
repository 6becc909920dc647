"""Whether an offline W&B run is whole: its file is written by another process, which tells nobody that it failed.

The file is a log of protobuf records in LevelDB's format: blocks of 32 KiB, in which every piece of a record has a
header of seven bytes (checksum, length, kind), and records that do not fit go on in the next block.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAGIC: Final = b":W&B"
_FILE_HEADER: Final = 7
_BLOCK: Final = 32768
_PIECE: Final = struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4
#: How long the other process may take after a run has ended.
PATIENCE_SECONDS = 20.0


def is_whole(folder: Path) -> bool:
    """Say whether the folder of an offline run that has ended holds everything, up to the record of its end."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _has_end(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _has_end(folder: Path) -> bool:
    from wandb.proto import wandb_internal_pb2

    for path in folder.glob("*.wandb"):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "exit":
                return True
    return False


def records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log; what is cut off at its end is left out."""
    if log[: len(_MAGIC)] != _MAGIC:
        return
    position, pieces = _FILE_HEADER, b""
    while position + _PIECE.size <= len(log):
        left = _BLOCK - position % _BLOCK
        if left < _PIECE.size:  # padding
            position += left
            continue
        _, length, kind = _PIECE.unpack_from(log, position)
        position += _PIECE.size
        if position + length > len(log):
            return
        pieces += log[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield pieces
            pieces = b""
