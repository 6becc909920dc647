"""A benchmark in files, three questions about two pictures, in the formats of official ones; and a server for them."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from mitigate.benchmarks.base import Benchmark, Sample
from mitigate.data import Source, data_folder, read_rows, require_file
from mitigate.metrics.base import Metric, ratio
from mitigate.records import SampleRecord

ROWS = (
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "Is there a cow in the image?", "label": "no"},
)
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
OLDER = CONTENT.replace(b"image?", b"imange?")


def source(url: str | None = None, **changes: Any) -> Source:
    """Return the toy's file of questions, pinned to `CONTENT`."""
    values: dict[str, Any] = {
        "path": "questions.json",
        "url": url,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "licence": "MIT",
        "instruction": "get questions.json from the shelf and put it into toyfiles/",
        "count": 3,
        "older": ((hashlib.sha256(OLDER).hexdigest(), "of last year"),),
    }
    return Source(**values | changes)


PICTURES = Source(
    path="../toypictures/",
    url=None,
    sha256=None,
    licence="CC0",
    instruction="draw two pictures into toypictures/",
    count=None,
)


@dataclass(frozen=True, kw_only=True)
class ToyFiles(Benchmark):
    """Yes/no questions.

    Parameters
    ----------
    word
        The word that means yes.
    tasks
        Any of ``dog``, ``cat`` and ``cow``.
    shout
        Whether answers are upper-cased first.
    data_dir
        Folder of the data.
    """

    name: ClassVar[str] = "toyfiles"
    summary: ClassVar[str] = "three questions about two pictures"
    sources: ClassVar[tuple[Source, ...]] = (source(), PICTURES)
    ids: ClassVar[str] = "set/1 (set/question_id), or the question_id alone"

    word: str = "yes"
    tasks: tuple[str, ...] = ("dog", "cat", "cow")
    shout: bool = False
    data_dir: str | None = None

    def samples(self) -> list[Sample]:
        path = require_file(data_folder(self.name, self.data_dir) / "questions.json", self.name)
        return [
            Sample(
                id=f"set/{row['question_id']}",
                image_id=row["image"],
                task="yes_no",
                prompt=row["text"],
                meta={"label": row["label"]},
            )
            for _, row in read_rows(path)
            if any(task in row["text"] for task in self.tasks)
        ]

    def image_files(self, sample: Sample) -> list[Path]:
        return [data_folder("toypictures", self.data_dir) / sample.image_id]

    def aliases(self, sample: Sample) -> Sequence[str]:
        return (sample.id.partition("/")[2], sample.image_id)

    def metrics(self) -> list[Metric]:
        return [
            ratio("accuracy", "Accuracy", "toy/right", "toy/all", higher_is_better=True),
            ratio("yes_rate", "Yes-rate", "toy/yes", "toy/all"),
        ]

    def correct(self, record: SampleRecord) -> bool:
        return self._says_yes(record) == (record.meta["label"] == "yes")

    def score(self, record: SampleRecord) -> Mapping[str, float]:
        return {"toy/all": 1.0, "toy/right": float(self.correct(record)), "toy/yes": float(self._says_yes(record))}

    def _says_yes(self, record: SampleRecord) -> bool:
        text = record.text.upper() if self.shout else record.text
        return self.word in text


def write_data(root: Path, content: bytes = CONTENT) -> Path:
    """Write the toy's questions and pictures, and return the folder of all data."""
    (root / "toyfiles").mkdir(parents=True, exist_ok=True)
    (root / "toypictures").mkdir(exist_ok=True)
    (root / "toyfiles" / "questions.json").write_bytes(content)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(root / "toypictures" / name)
    return root


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/nowhere":
            self.send_error(404)
            return
        if self.path == "/slow":
            time.sleep(2)
        body = {"/altered": CONTENT.replace(b"dog", b"fox"), "/page": b"<html>log in</html>"}.get(self.path, CONTENT)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked has gone
            self.wfile.write(body[: len(body) // 2] if self.path == "/truncated" else body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def server() -> Iterator[tuple[str, list[str]]]:
    """Serve `CONTENT` (whole, half, altered, late, not at all) and say what was asked for."""
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http_server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}", http_server.asked  # type: ignore[attr-defined]
    finally:
        http_server.shutdown()
        http_server.server_close()
