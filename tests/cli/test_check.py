"""`mitigate check`: what an author sees, and the exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mitigate.cli import main
from mitigate.registry import methods

CLASS = '''
from dataclasses import dataclass
from typing import ClassVar

from tests.testing.gentle import Gentle


@dataclass(frozen=True, kw_only=True)
class Mine(Gentle):
    """Mine."""

    name: ClassVar[str] = "mine"

    def __post_init__(self) -> None:
        pass
'''
API = ("--check", "check_name", "--check", "check_bad_numbers", "--check", "check_tags")


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["check", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with the class ``mine:Mine``, which no package registers."""
    (tmp_path / "mine.py").write_text(CLASS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_method_that_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "locore", *API)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("check_name", "passed", "1"),
        ("check_bad_numbers", "passed", "5"),
        ("check_tags", "passed", "1"),
    ]
    assert "locore conforms: 3 checks, 7 runs, " in out


def test_a_class_that_is_not_registered_and_does_not_conform(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, out, err = outcome(capsys, "mine:Mine", "locore", *API)
    assert (code, err) == (1, "")
    assert "mine accepts gain=nan: call self.require_finite('gain', ...)" in " ".join(out.split())
    assert "mine:Mine does not conform: 1 of 3 checks, 5 runs, " in out
    assert "mend it and repeat `mitigate check mine:Mine --check check_bad_numbers`" in out
    assert "locore conforms" in out
    assert str(here) not in sys.path
    assert "mine" not in methods().names()


def test_a_message_says_where_it_was_seen_first_and_how_often(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    text = (here / "mine.py").read_text().replace("pass", "assert self.gain < 2 or self.offset != self.offset")
    (here / "mine.py").write_text(text)
    _, out, _ = outcome(capsys, "mine:Mine", "--check=check_bad_numbers")
    flat = " ".join(out.split())
    assert "2 failed" in flat or "failed │ 2" in flat
    assert "mine: gain=nan raises AssertionError" in flat


def test_an_error_of_a_handler_is_told_once_with_its_place(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    text = CLASS + "\n    def on_hidden_states(self, event, state):\n        return event.hidden.nothing\n"
    (here / "mine.py").write_text(text)
    wanted = ("check_detach", "check_batch", "check_composes")
    code, out, _ = outcome(capsys, "mine:Mine", *(f"--check={name}" for name in wanted))
    flat = " ".join(out.replace("│", " ").split())
    assert code == 1
    assert "mine.on_hidden_states failed at layer 3, phase prefill, step 0: AttributeError" in flat
    assert f"'nothing' (mine.py:{len(text.splitlines())})" in flat
    assert flat.count("the error of check_detach") == 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "tags = dataclasses.replace(Gentle.tags, writes=frozenset())",
            "writes hidden_states but its tags do not say so",
        ),
        ("def branches(self):\n        return [1 / 0]", "ZeroDivisionError: division by zero (mine.py:"),
    ],
    ids=["contradiction", "crash"],
)
def test_a_method_no_stack_takes_is_told_once(
    capsys: pytest.CaptureFixture[str], here: Path, code: str, told: str
) -> None:
    (here / "mine.py").write_text(f"import dataclasses\n{CLASS}\n    {code}\n")
    _, out, _ = outcome(
        capsys, "mine:Mine", *(f"--check={name}" for name in ("check_detach", "check_batch", "check_cache"))
    )
    flat = " ".join(out.replace("│", " ").split())
    assert flat.count(told) == 1
    assert flat.count("the error of check_detach") == 2


def test_json_has_every_run(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, out, err = outcome(capsys, "locore", "mine:Mine", "--json", *API)
    assert (code, err) == (1, "")
    good, bad = json.loads(out)
    assert (good["name"], good["conforms"], len(good["results"])) == ("locore", True, 7)
    assert (bad["name"], bad["conforms"]) == ("mine:Mine", False)
    assert list(bad["results"][0]) == ["method", "check", "params", "family", "status", "message", "seconds"]
    failed = [row for row in bad["results"] if row["status"] == "failed"]
    assert {row["check"] for row in failed} == {"check_bad_numbers"}
    assert [row["params"] for row in failed][:1] == [""]


def test_skips_are_shown_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "control_probe", "--check", "check_bad_options")
    assert code == 0
    assert "skipped" in out
    assert out.count("no parameter is a string with a fixed meaning") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "mitigate check needs the name of a method; known: clva, "),
        (["lcore"], "unknown method 'lcore'; did you mean 'locore'?"),
        (["locore", "--chek", "x"], "mitigate check has no option '--chek'; did you mean '--check'?"),
        (["locore", "--check"], "--check needs a value"),
        (["locore", "--check", "--json"], "--check needs a value"),
        (["locore", "--check", "check_nam"], "unknown check 'check_nam'; did you mean 'check_name'?"),
        (["locore", "--family", "lava"], "unknown family of tiny models 'lava'; did you mean 'llava'?"),
        (["no_such_module:Mine"], "no_such_module cannot be imported: ModuleNotFoundError: No module named"),
        (["mine:Min"], "mine has no method class 'Min'; did you mean 'Mine'?"),
        (["mine:dataclass"], "mine has no method class 'dataclass'"),
        (["ghost"], "method 'ghost' of mitigate cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path, argv: list[str], message: str
) -> None:
    if argv == ["ghost"]:
        monkeypatch.setitem(methods()._builtin, "ghost", "nowhere:Ghost")
    code, out, err = outcome(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2


def test_nothing_runs_if_one_name_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "locore", "lcore", *API)
    assert (code, out) == (2, "")
    assert "unknown method 'lcore'" in err


def test_help_and_list_of_checks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "--help")
    assert (code, err) == (0, "")
    for part in ("module:Class", "--list-checks", "test_params()", "parametrize_with_checks", "Exit codes"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 120
    code, out, err = outcome(capsys, "--list-checks")
    assert (code, err) == (0, "")
    assert "check_config_round_trip" in out
    assert "Refuse NaN and infinities by the parameter's name" in out
