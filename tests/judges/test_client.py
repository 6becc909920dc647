"""A judge behind a real HTTP server that answers, fails, hangs and lies."""

import logging
import socket
import sys
import time
from itertools import pairwise

import pytest

from mitigate.errors import ConfigError, DataError, MitigateError
from mitigate.judges import Judge, Reply
from tests.judges.server import Answer, completion, endpoint, failure, said

QUESTION = [{"role": "user", "content": "Is it right?"}]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def judge(url: str, **parameters: object) -> Judge:
    return Judge(url, "judge", **{"key_env": "JUDGE_KEY", "retries": 3, **parameters})  # type: ignore[arg-type]


def test_a_reply_is_word_for_word_and_names_the_model_that_gave_it() -> None:
    with endpoint(lambda *_: said("  Rating: 5,\nbecause ... ")) as server:
        assert judge(server.url).reply(QUESTION) == Reply("  Rating: 5,\nbecause ... ", "judge-2026-01-01")
        assert judge(server.url + "/").ask(QUESTION) == "  Rating: 5,\nbecause ... "
    first = server.requests[0]
    assert first.path == "/v1/chat/completions"
    assert first.key == f"Bearer {KEY}"
    assert first.body == {"model": "judge", "messages": QUESTION, "temperature": 0.0}


def test_a_server_without_names_is_called_as_it_was_asked_for() -> None:
    choice = {"message": {"content": "yes"}}
    with endpoint(lambda *_: completion({"choices": [choice]})) as server:
        assert judge(server.url).reply(QUESTION) == Reply("yes", "judge")


def test_no_key_is_needed_where_the_server_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with endpoint(lambda *_: said("yes")) as server:
        assert judge(server.url).ask(QUESTION) == "yes"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(status: int) -> None:
    with endpoint(lambda number, _: failure(status) if number < 2 else said("yes")) as server:
        assert judge(server.url).ask(QUESTION) == "yes"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_after_the_retries_the_error_says_what_to_do(status: int) -> None:
    with endpoint(lambda *_: failure(status, "too much")) as server, pytest.raises(DataError) as caught:
        judge(server.url, retries=2).ask(QUESTION)
    assert len(server.requests) == 3
    assert f"HTTP {status}: too much" in str(caught.value)
    assert "after 2 retries" in str(caught.value)
    assert "judge_retries" in str(caught.value)


def test_a_busy_server_says_how_long_to_wait() -> None:
    wait = failure(429, **{"Retry-After": "1"})
    with endpoint(lambda number, _: said("yes") if number else wait) as server:
        assert judge(server.url).ask(QUESTION) == "yes"
    first, second = server.requests
    assert 0.9 < second.time - first.time < 3


def test_the_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    silent = Answer(500, b"")
    with endpoint(lambda *_: silent) as server, pytest.raises(DataError):
        judge(server.url, retries=4).ask(QUESTION)
    waits = [pause for pause in pauses if pause > 0.2]
    assert len(waits) == 4
    assert all(after > before for before, after in pairwise(waits))


def test_a_server_that_hangs_is_given_up() -> None:
    slow = said("yes")
    slow.delay = 0.6
    start = time.monotonic()
    with endpoint(lambda *_: slow) as server, pytest.raises(DataError, match=r"did not answer within 0\.1 s"):
        judge(server.url, timeout=0.1, retries=0).ask(QUESTION)
    assert time.monotonic() - start < 5


def test_nobody_listens() -> None:
    with socket.socket() as taken:  # bound, but not listening: the connection is refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(DataError, match=r"cannot be reached.*is the server running"):
            judge(url, retries=0).ask(QUESTION)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, ConfigError, "environment variable JUDGE_KEY: the key in it was refused"),
        (403, ConfigError, "environment variable JUDGE_KEY"),
        (404, ConfigError, "judge_url and judge_model"),
        (400, DataError, "did not take the request"),
        (422, DataError, "did not take the request"),
    ],
)
def test_what_no_retry_can_mend_is_an_error_at_once(status: int, kind: type[MitigateError], says: str) -> None:
    with endpoint(lambda *_: failure(status)) as server, pytest.raises(kind, match=says) as caught:
        judge(server.url).ask(QUESTION)
    assert type(caught.value) is kind
    assert len(server.requests) == 1
    assert server.url in str(caught.value)


def test_a_key_is_sent_without_the_line_end_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\r\n")
    with endpoint(lambda *_: said("yes")) as server:
        assert judge(server.url).ask(QUESTION) == "yes"
        assert server.requests[0].key == f"Bearer {KEY}"
        for broken in (f"{KEY}\nx", f"{KEY}\u00e9"):
            monkeypatch.setenv("JUDGE_KEY", broken)
            with pytest.raises(ConfigError, match="JUDGE_KEY must be plain letters") as caught:
                judge(server.url).ask(QUESTION)
            assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with endpoint(lambda *_: failure(401)) as server, pytest.raises(ConfigError, match="JUDGE_KEY: which is not set"):
        judge(server.url).ask(QUESTION)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_a_key_is_never_shown(status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with endpoint(lambda *_: failure(status, f"Incorrect API key provided: {KEY}")) as server:
        asked = judge(server.url, retries=1)
        with pytest.raises(MitigateError) as caught:
            asked.ask(QUESTION)
    shown = [str(caught.value), repr(caught.value), repr(asked), str(asked), caplog.text]
    assert not any(KEY in text for text in shown)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}),
        Answer(body=b'{"choices": [', headers={"Content-Type": "application/json"}),
        Answer(body=b"", headers={"Content-Type": "application/json"}),
        Answer(body=b"[1, 2]", headers={"Content-Type": "application/json"}),
        Answer(body=b"null", headers={"Content-Type": "application/json"}),
        completion({}),
        completion({"choices": []}),
        completion({"choices": None}),
        completion({"choices": "yes"}),
        completion({"choices": ["yes"]}),
        completion({"choices": [{"finish_reason": "stop"}]}),
        completion({"choices": [{"message": {"content": ["yes"]}}]}),
        said(None),
        said(""),
        said(" \n"),
    ],
    ids=lambda answer: answer.body.decode()[:70],
)
def test_an_answer_without_words_is_an_error_and_no_verdict(answer: Answer) -> None:
    with endpoint(lambda *_: answer) as server, pytest.raises(DataError, match="the judge 'judge' at http"):
        judge(server.url, retries=0).ask(QUESTION)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"url": ""}, "must be an address"),
        ({"url": "localhost:8000/v1"}, "must be an address"),
        ({"url": "ftp://host/v1"}, "must be an address"),
        ({"url": "http://"}, "must be an address"),
        ({"url": "http://[half/v1"}, "must be an address"),
        ({"url": f"https://me:{KEY}@host/v1"}, "must not hold a user name"),
        ({"url": f"https://host/v1?key={KEY}"}, "must not hold a user name"),
        ({"model": ""}, "judge_model is empty"),
        ({"retries": -1}, "judge_retries=-1"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_and_shows_no_secret(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Judge(**{"url": "http://localhost/v1", "model": "judge", **parameters})  # type: ignore[arg-type]
    assert KEY not in str(caught.value)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'mitigate\[judge\]'"):
        judge("http://localhost:1/v1").ask(QUESTION)
