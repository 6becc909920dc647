"""Downloads from a real server: complete and pinned, or not there at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mitigate.data.fetching import download
from mitigate.errors import DataError
from tests.data.toy import CONTENT, server, source


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with server() as (url, _):
        yield url


def test_a_good_file_arrives_whole_and_readable_for_others(address: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "questions.json"
    mask = os.umask(0o022)
    try:
        download(source(f"{address}/good"), path, retries=0)
    finally:
        os.umask(mask)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("/altered", "gave a file with another sha256 than the pinned one; nothing of it was kept"),
        ("/page", "gave a file with another sha256"),
        ("/truncated", "the connection broke off in the middle"),
        ("/nowhere", "the server says 404 Not Found"),
        ("/slow", "no answer in time"),
    ],
)
def test_nothing_is_left_of_a_bad_one(address: str, tmp_path: Path, page: str, message: str) -> None:
    path = tmp_path / "questions.json"
    with pytest.raises(DataError) as caught:
        download(source(f"{address}{page}"), path, retries=0, timeout=0.3)
    assert message in str(caught.value)
    assert f"{address}{page}" in str(caught.value)
    assert f"get it by hand and save it as {path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_offline_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/good"
    with pytest.raises(DataError, match="no connection; is this machine offline"):
        download(source(url), tmp_path / "questions.json", retries=0)
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(DataError, match="the proxy cannot be used"):
        download(source("http://example.org/good"), tmp_path / "questions.json", retries=0)


def test_a_folder_that_cannot_be_written_is_named(address: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        download(source(f"{address}/good"), tmp_path / "file" / "questions.json", retries=0)


def test_what_has_no_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.json cannot be downloaded: get"):
        download(source(), tmp_path / "questions.json")
