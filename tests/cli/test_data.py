"""``mitigate data``: what is there, what is wrong with it, and how the rest is got."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mitigate.cli import main
from mitigate.data.fetching import download
from mitigate.registry import benchmarks
from tests.data.toy import CONTENT, OLDER, PICTURES, ToyFiles, server, source, write_data


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("MITIGATE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    benchmarks().register("toyfiles", ToyFiles)
    yield
    benchmarks().unregister("toyfiles")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["data", *argv])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def checked(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["data", "check", "toyfiles", "--json", *argv])
    out, err = capsys.readouterr()
    assert err == ""
    (found,) = json.loads(out)["benchmarks"]
    assert (code == 0) == found["ok"]
    return code, found


def test_good_data_are_ready(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    code, found = checked(capsys)
    assert code == 0
    assert [file["verdict"] for file in found["files"]] == ["ok", "ok"]
    assert found["pictures"] == {"needed": 2, "wrong": 0, "decoded": True}
    code, out, _ = told(capsys, "check", "TOYfiles", "--data", str(tmp_path / "data"))
    assert code == 0
    assert out.endswith("2 of 2 pictures are there and can be read toyfiles: ready")


@pytest.mark.parametrize(
    ("content", "verdict", "detail", "problem"),
    [
        (OLDER, "older", "of last year", None),
        (CONTENT.replace(b"dog", b"fox"), "altered", "expected", None),
        (CONTENT[:-120], "altered", "2 rows, expected 3", None),
        (CONTENT[:-5], "damaged", "line 3: the JSON ends in the middle", "questions.json:3: the JSON ends"),
        (CONTENT.replace(b'"question_id": 2', b'"question_id": 1'), "altered", "sha256", "two samples have the id"),
        (b"", "damaged", "is empty", "is empty"),
    ],
)
def test_wrong_files_are_told_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, verdict: str, detail: str, problem: str | None
) -> None:
    if verdict == "altered" and "2 rows" in detail:
        content = b"".join(CONTENT.splitlines(keepends=True)[:2])
    path = write_data(tmp_path / "data", content) / "toyfiles" / "questions.json"
    code, found = checked(capsys)
    assert code == 1
    assert found["files"][0]["verdict"] == verdict
    assert detail in found["files"][0]["detail"]
    assert [problem in line for line in found["problems"]] == ([] if problem is None else [True])
    assert path.read_bytes() == content
    code, out, _ = told(capsys, "check", "toyfiles")
    assert code == 1
    assert "move it away, then get questions.json from the shelf" in out


def test_unpinned_files_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data", OLDER)
    monkeypatch.setattr(ToyFiles, "sources", (source(sha256=None, older=()), PICTURES))
    assert checked(capsys)[1]["files"][0]["verdict"] == "unpinned"
    monkeypatch.setattr(ToyFiles, "sources", (source(sha256=None, older=(), count=4), PICTURES))
    code, found = checked(capsys)
    assert code == 1
    assert (found["files"][0]["verdict"], found["files"][0]["detail"]) == ("damaged", "3 rows, expected 4")


def test_pictures_are_looked_for_and_decoded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pictures = write_data(tmp_path / "data") / "toypictures"
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(whole[: len(whole) // 2])
    code, found = checked(capsys)
    assert code == 1
    assert ["a.png cannot be read as a picture" in line for line in found["problems"]] == [True]
    assert checked(capsys, "--quick")[0] == 0
    (pictures / "b.png").unlink()
    for flags in ((), ("--quick",)):
        code, found = checked(capsys, *flags)
        assert code == 1
        assert found["problems"][-1] == "data/toypictures/b.png does not exist"
    (pictures / "a.png").unlink()
    code, out, _ = told(capsys, "check", "toyfiles")
    assert code == 1
    assert "data/toypictures is missing: draw two pictures into toypictures/" in out


def test_fetch_downloads_what_it_may_and_says_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mitigate.cli.data.download", functools.partial(download, retries=0))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with server() as (address, asked):
        monkeypatch.setattr(ToyFiles, "sources", (source(f"{address}/good"), PICTURES))
        code, out, _ = told(capsys, "fetch", "toyfiles", "--data", "new")
        assert code == 1  # the pictures are left to the user
        assert "new/toypictures/ is missing: draw two pictures into toypictures/" in out
        assert Path("new/toyfiles/questions.json").read_bytes() == CONTENT
        write_data(Path("new"), OLDER)
        code, out, _ = told(capsys, "fetch", "toyfiles", "--data", "new")
        assert code == 1
        assert "is an older version, of last year: move it away, then fetch it again" in out
        assert Path("new/toyfiles/questions.json").read_bytes() == OLDER  # never overwritten
        write_data(Path("new"))
        code, out, _ = told(capsys, "fetch", "toyfiles", "--data", "new")
        assert code == 0
        assert "toyfiles: everything is there" in out
        assert asked == ["/good"]
        monkeypatch.setattr(ToyFiles, "sources", (source(f"{address}/altered"), PICTURES))
        code, _, err = told(capsys, "fetch", "toyfiles")
        assert code == 2
        assert "gave a file with another sha256" in err
        assert not Path("data/toyfiles/questions.json").exists()


def test_other_settings_are_checked_on_demand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data")
    (tmp_path / "data" / "toypictures" / "b.png").unlink()
    extra = source(path="extra.json", optional=True)
    monkeypatch.setattr(ToyFiles, "sources", (*ToyFiles.sources, extra, source(path="needed.json")))
    assert checked(capsys, "tasks=[dog]")[1]["pictures"] == {"needed": 1, "wrong": 0, "decoded": True}
    code, found = checked(capsys, "tasks=cow")
    assert (code, found["problems"]) == (1, ["data/toypictures/b.png does not exist"])
    assert checked(capsys)[0] == 1
    (tmp_path / "data" / "toyfiles" / "extra.json").write_bytes(CONTENT)
    assert "pictures of other settings were not looked for" in told(capsys, "check", "toyfiles")[1]
    assert "not looked for" not in told(capsys, "check", "toyfiles", "tasks=[dog]")[1]
    code, out, err = told(capsys, "check", "toyfiles", "task=dog")
    assert (code, out) == (2, "")
    assert "benchmark toyfiles has no parameter 'task'; did you mean 'tasks'?" in err


def test_optional_files_may_be_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data")
    extra = source(path="extra.json", optional=True)
    monkeypatch.setattr(ToyFiles, "sources", (source(), extra, PICTURES))
    code, found = checked(capsys)
    assert code == 0
    assert found["files"][1]["verdict"] == "missing"


def test_list_shows_files_and_licences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    code, out, _ = told(capsys, "list", "toyfiles", "--data", "data")
    assert code == 0
    assert "data/toyfiles/questions.json │ yes │ by hand │ MIT" in out
    assert told(capsys, "list", "testbed")[1] == "testbed needs no files"
    assert main(["data", "list", "--json"]) == 0
    names = [item["name"] for item in json.loads(capsys.readouterr().out)["benchmarks"]]
    assert "toyfiles" in names
    assert "testbed" not in names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek", "toyfiles"], "mitigate data has no command 'chek'; did you mean 'check'?"),
        (["check"], "mitigate data check needs names, such as `mitigate data check pope`"),
        (["check", "toyfile"], "unknown benchmark 'toyfile'; did you mean 'toyfiles'?"),
        (["check", "toyfiles", "--quik"], "mitigate data check has no option '--quik'; did you mean '--quick'?"),
        (["fetch", "toyfiles", "--quick"], "mitigate data fetch has no option '--quick'"),
        (["check", "toyfiles", "--data"], "--data needs a value"),
        (["check", "toyfiles", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["check", "toyfiles", "--json=yes"], "--json takes no value"),
        (["check", "toyfiles", "--json", "--json"], "--json is given twice"),
    ],
)
def test_wrong_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    code, out, err = told(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "--help")[1].startswith("Usage: mitigate data list")
    assert told(capsys)[0] == 2
