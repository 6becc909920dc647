"""A real HTTP server that behaves like an OpenAI-compatible endpoint, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server sends back: a status, headers, a body, and how long it thinks before."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Request:
    """What the server was sent."""

    path: str
    key: str | None
    body: dict[str, Any]
    time: float


def said(text: str | None, model: str = "judge-2026-01-01") -> Answer:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return completion({"choices": [choice], "model": model})


def completion(parts: dict[str, Any]) -> Answer:
    body = {"id": "1", "object": "chat.completion", "created": 1, **parts}
    return Answer(body=json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def failure(status: int, message: str = "no luck", **headers: str) -> Answer:
    # The pauses between retries are as long as the server says, so that tests need not wait.
    pauses = {"retry-after-ms": "1"} if not headers else {}
    body = json.dumps({"error": {"message": message}}).encode()
    return Answer(status, body, {"Content-Type": "application/json", **pauses, **headers})


@dataclass
class Endpoint:
    """The running server: its base address, and what it was asked."""

    url: str
    requests: list[Request]

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [request.body["messages"][-1]["content"] for request in self.requests]


@contextmanager
def endpoint(answer: Callable[[int, dict[str, Any]], Answer]) -> Iterator[Endpoint]:
    """Serve on a free port; ``answer`` gets the number of the request, from 0, and its body."""
    requests: list[Request] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(Request(self.path, self.headers["Authorization"], body, time.monotonic()))
            reply = answer(number, body)
            time.sleep(reply.delay)
            try:
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:  # the client did not want to wait
                pass

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
