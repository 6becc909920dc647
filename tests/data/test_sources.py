"""Sources: where files are looked for, what a missing one says, and that the catalogue holds no guesses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mitigate.data import Source, data_folder, require_file
from mitigate.errors import DataError
from mitigate.registry import benchmarks
from tests.data.toy import ToyFiles, source

ALL = [(name, item) for name in benchmarks().names() for item in benchmarks().get(name).sources]


@pytest.fixture
def toy() -> Iterator[None]:
    benchmarks().register("toyfiles", ToyFiles)
    yield
    benchmarks().unregister("toyfiles")


def test_the_folder_is_the_given_one_then_the_variable_then_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MITIGATE_DATA", raising=False)
    assert data_folder("toy", None) == Path("data/toy")
    monkeypatch.setenv("MITIGATE_DATA", "/scratch")
    assert data_folder("toy", None) == Path("/scratch/toy")
    assert data_folder("toy", "~/own") == Path("~/own/toy").expanduser()


def test_a_missing_file_says_how_to_get_it(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_folder("toyfiles", str(tmp_path)) / "questions.json"
    with pytest.raises(DataError) as by_hand:
        require_file(path, "toyfiles")
    assert str(by_hand.value) == f"{path} does not exist\n{source().instruction}"
    monkeypatch.setattr(ToyFiles, "sources", (source("https://example.org/questions.json"),))
    with pytest.raises(DataError) as fetched:
        require_file(path, "toyfiles")
    assert str(fetched.value) == f"{path} does not exist\nget it with: mitigate data fetch toyfiles --data {tmp_path}"
    monkeypatch.setenv("MITIGATE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"mitigate data fetch toyfiles$"):
        require_file(path, "toyfiles")
    with pytest.raises(DataError, match=r"mitigate data fetch nobody$"):
        require_file(path, "nobody")
    path.parent.mkdir()
    path.touch()
    assert require_file(path, "toyfiles") == path


@pytest.mark.parametrize(("name", "item"), ALL, ids=[f"{name}:{item.path}" for name, item in ALL])
def test_what_is_downloaded_is_pinned_and_licensed(name: str, item: Source) -> None:
    assert item.licence
    assert item.instruction
    assert not item.is_folder or item.sha256 is None
    if item.url is None:
        assert item.sha256 is not None or re.search(r"no published sha256|no sha256|not pinned", item.instruction)
    else:
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/\S+", item.url)
        assert item.url.endswith(f"/{item.path}")
        assert item.sha256 is not None
    hashes = [sha256 for sha256 in (item.sha256, *dict(item.older)) if sha256 is not None]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
    assert len(set(hashes)) == len(item.older) + (item.sha256 is not None)
