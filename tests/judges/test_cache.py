"""Verdicts are written down at once, used again for the same question, and come in the order of the records."""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mitigate.errors import ConfigError, DataError
from mitigate.judges import CACHE, Judge, graded, judge_of, verdicts
from mitigate.judges import cache as cache_module
from mitigate.records import SampleRecord
from tests.judges.server import Answer, Endpoint, endpoint, failure, said

KEY = "sk-very-secret-0123456789"


def record(name: str, text: str = "a dog", **parts: Any) -> SampleRecord:
    return SampleRecord(
        id=name, image_id=name, task="open", prompt="?", text=text, tokens=2, finished=True, meta={"n": 1}, **parts
    )


RECORDS = [record(name, f"reply {name}") for name in ("3", "1", "2")]


def ask(answer: SampleRecord) -> list[dict[str, Any]]:
    return [{"role": "user", "content": answer.text}]


def judge(url: str, model: str = "judge", retries: int = 0) -> Judge:
    return Judge(url, model, key_env="JUDGE_KEY", retries=retries, parallel=2)


def echo(_: int, body: dict[str, Any]) -> Answer:
    return said(f"about {body['messages'][0]['content']}")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(cache_module, "_SEEN", {})  # a new process


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint(echo) as running:
        yield running


def lines(cache: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in cache.read_text().splitlines()]


def test_verdicts_come_in_the_order_of_the_records(tmp_path: Path) -> None:
    def slowest_first(number: int, body: dict[str, Any]) -> Answer:
        answer = echo(number, body)
        answer.delay = 0.1 if number == 0 else 0.0
        return answer

    seen: list[tuple[int, int]] = []
    with endpoint(slowest_first) as server:
        found = verdicts(RECORDS, ask, judge(server.url), tmp_path / CACHE, lambda *counts: seen.append(counts))
    assert list(found.items()) == [(name, f"about reply {name}") for name in ("3", "1", "2")]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_every_line_says_who_judged_what(tmp_path: Path, server: Endpoint) -> None:
    cache = tmp_path / "new" / CACHE
    verdicts(RECORDS, ask, judge(server.url), cache)
    found = sorted(lines(cache), key=lambda line: line["id"])
    assert [line["id"] for line in found] == ["1", "2", "3"]
    first = found[0]
    assert set(first) == {"id", "messages", "model", "judge", "url", "reply", "time"}
    assert (first["model"], first["judge"], first["url"]) == ("judge", "judge-2026-01-01", server.url)
    assert first["reply"] == "about reply 1"
    assert len({line["messages"] for line in found}) == 3
    assert first["time"].endswith("+00:00")
    assert KEY not in cache.read_text()


def test_nothing_is_asked_twice_and_a_complete_cache_needs_no_endpoint(tmp_path: Path, server: Endpoint) -> None:
    cache = tmp_path / CACHE
    first = verdicts(RECORDS[:2], ask, judge(server.url), cache)
    assert verdicts(RECORDS, ask, judge(server.url), cache) == {**first, "2": "about reply 2"}
    assert sorted(server.asked) == ["reply 1", "reply 2", "reply 3"]
    seen: list[tuple[int, int]] = []
    nowhere = judge("http://127.0.0.1:9/v1")
    assert len(verdicts(RECORDS, ask, nowhere, cache, lambda *counts: seen.append(counts))) == 3
    assert seen == [(3, 3)]


def test_another_reply_or_another_model_is_judged_anew(tmp_path: Path, server: Endpoint) -> None:
    cache = tmp_path / CACHE
    verdicts(RECORDS[:1], ask, judge(server.url), cache)
    assert verdicts([record("3", "other")], ask, judge(server.url), cache) == {"3": "about other"}
    verdicts(RECORDS[:1], ask, judge(server.url, "better judge"), cache)
    verdicts([record("4", "reply 3")], ask, judge(server.url), cache)
    assert len(server.requests) == 4
    assert verdicts(RECORDS[:1], ask, judge(server.url), cache) == {"3": "about reply 3"}
    assert len(server.requests) == 4


def test_the_same_answer_of_two_stacks_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that changes its mind makes no difference between answers that are the same."""
    first, second = tmp_path / "a" / CACHE, tmp_path / "b" / CACHE
    with endpoint(lambda number, _: said(f"verdict {number}")) as server:
        asked = judge(server.url)
        found = verdicts(RECORDS, ask, asked, first)
        others = [*RECORDS[:2], record("2", "another reply")]
        again = verdicts(others, ask, asked, second)
        assert {name: again[name] for name in ("3", "1")} == {name: found[name] for name in ("3", "1")}
        assert again["2"] == "verdict 3"
        assert len(server.requests) == 4
        # Each folder has all of its own verdicts, also for the next process.
        monkeypatch.setattr(cache_module, "_SEEN", {})
        assert verdicts(others, ask, asked, second) == again
        assert verdicts(RECORDS, ask, asked, first) == found
        assert len(server.requests) == 4
        # What one process reads from a folder, it uses for the others.
        assert verdicts(RECORDS[:1], ask, asked, tmp_path / "c" / CACHE) == {"3": found["3"]}
        verdicts(RECORDS[:1], ask, judge(server.url, "another judge"), tmp_path / "c" / CACHE)
        assert len(server.requests) == 5


@pytest.mark.parametrize("torn", [b'{"id": "9", "mess', b'{"id": "\xff'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, server: Endpoint, torn: bytes) -> None:
    cache = tmp_path / CACHE
    verdicts(RECORDS[:1], ask, judge(server.url), cache)
    with cache.open("ab") as file:
        file.write(torn)
    verdicts(RECORDS, ask, judge(server.url), cache)
    assert lines(cache)[0]["id"] == "3"
    assert len(lines(cache)) == 3


@pytest.mark.parametrize("damage", [b"oops\n", b"[]\n", b'{"id": "1"}\n', b"\n", b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path: Path, server: Endpoint, damage: bytes) -> None:
    cache = tmp_path / CACHE
    verdicts(RECORDS[:1], ask, judge(server.url), cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole + damage + whole)
    with pytest.raises(DataError, match=rf"{CACHE}:2: no verdict.*delete the line"):
        verdicts(RECORDS, ask, judge(server.url), cache)


def test_a_line_of_the_wrong_kind_is_named(tmp_path: Path, server: Endpoint) -> None:
    cache = tmp_path / CACHE
    verdicts(RECORDS[:1], ask, judge(server.url), cache)
    cache.write_text(json.dumps({**lines(cache)[0], "reply": 5}) + "\n")
    with pytest.raises(DataError, match=rf"{CACHE}:1: .*'reply' is no text"):
        verdicts(RECORDS, ask, judge(server.url), cache)


def test_a_failure_keeps_what_is_judged_and_the_same_call_goes_on(tmp_path: Path) -> None:
    cache = tmp_path / CACHE
    records = [record(str(index), f"reply {index}") for index in range(20)]
    with endpoint(lambda number, body: echo(number, body) if number < 7 else failure(503)) as server:
        with pytest.raises(DataError, match=r"sample '\d+': the judge .*HTTP 503"):
            verdicts(records, ask, judge(server.url), cache)
        asked = len(server.requests)
    kept = {line["id"] for line in lines(cache)}
    assert len(kept) == 7
    assert asked <= 7 + 3  # the failure, and what was under way beside it
    with endpoint(echo) as server:
        assert list(verdicts(records, ask, judge(server.url), cache)) == [str(index) for index in range(20)]
        assert {text.split()[1] for text in server.asked} == {str(index) for index in range(20)} - kept
    assert len(lines(cache)) == 20


def test_every_verdict_is_on_the_disk_before_the_next_is_reported(tmp_path: Path, server: Endpoint) -> None:
    cache = tmp_path / CACHE

    def look(done: int, _: int) -> None:
        assert (len(lines(cache)) if cache.exists() else 0) == done

    verdicts(RECORDS, ask, judge(server.url), cache, look)


def test_who_interrupts_does_not_wait_for_a_judge_that_hangs(tmp_path: Path) -> None:
    def hang(number: int, body: dict[str, Any]) -> Answer:
        answer = echo(number, body)
        answer.delay = 5.0 if number else 0.0
        return answer

    def interrupt(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with endpoint(hang) as server:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            verdicts(RECORDS, ask, judge(server.url), tmp_path / CACHE, interrupt)
        assert time.monotonic() - start < 3
    assert len(lines(tmp_path / CACHE)) == 1


def test_requests_are_few_at_a_time(tmp_path: Path) -> None:
    now, most = 0, 0
    lock = threading.Lock()

    def count(number: int, body: dict[str, Any]) -> Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return echo(number, body)

    with endpoint(count) as server:
        verdicts([record(str(index)) for index in range(8)], ask, judge(server.url), tmp_path / CACHE)
    assert most == 2


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, server: Endpoint) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be read|cannot write"):
        verdicts(RECORDS, ask, judge(server.url), tmp_path / "file" / CACHE)
    (tmp_path / CACHE).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        verdicts(RECORDS, ask, judge(server.url), tmp_path / CACHE)
    assert server.requests == []


def test_failed_answers_are_not_judged(tmp_path: Path, server: Endpoint) -> None:
    answers = [RECORDS[0], record("5", "", error="boom")]
    assert list(verdicts(answers, ask, judge(server.url), tmp_path / CACHE)) == ["3"]
    assert graded(answers, ask, judge(server.url), tmp_path / CACHE)[1] == answers[1]


def test_graded_records_hold_the_reply_and_the_name_of_the_judge(tmp_path: Path, server: Endpoint) -> None:
    found = graded(RECORDS, ask, judge(server.url), tmp_path / CACHE)
    meta = {"n": 1, "judge_reply": "about reply 3", "judge": "judge-2026-01-01"}
    assert found[0] == dataclasses.replace(RECORDS[0], meta=meta)
    assert RECORDS[0].meta == {"n": 1}
    assert [answer.id for answer in found] == ["3", "1", "2"]


def test_options_name_a_judge_or_are_refused() -> None:
    options = {"name": "quiz", "judge_url": "http://host/v1", "judge_model": "m", "judge_key_env": "K"}
    chosen = SimpleNamespace(**options, judge_retries=2)
    assert judge_of(chosen) == Judge("http://host/v1", "m", key_env="K", retries=2)
    for absent in ("judge_url", "judge_model"):
        with pytest.raises(ConfigError, match=r"quiz: give benchmark\.judge_url.*benchmark\.judge_model.*\$K"):
            judge_of(SimpleNamespace(**{**options, absent: None}, judge_retries=2))
