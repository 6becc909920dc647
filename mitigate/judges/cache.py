"""Verdicts on disk: every one is written down the moment it is given, and nothing is asked twice."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Final, Self

from mitigate.errors import DataError, MitigateError
from mitigate.jsonfiles import append, content_hash, refused
from mitigate.judges.client import Judge, Message, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mitigate.records import SampleRecord

    Ask = Callable[[SampleRecord], list[Message]]
    Report = Callable[[int, int], None]

CACHE: Final = "judgements.jsonl"
"""Name of the file of verdicts in a run's folder."""

_Key = tuple[str, str, str]

#: What this process has seen: where two stacks give the same answer, it is judged once and for both, because a judge
#: that changes its mind would make a difference out of nothing.
_SEEN: dict[tuple[Judge, _Key], Reply] = {}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One line of the file.

    Parameters
    ----------
    id
        The sample.
    messages
        sha256 of what was asked.
    model
        The model that was asked for.
    judge
        The model that answered, as the server reports it.
    url
        The endpoint.
    reply
        What the judge said, word for word.
    time
        When, ISO, UTC.
    """

    id: str
    messages: str
    model: str
    judge: str
    url: str
    reply: str
    time: str

    @property
    def key(self) -> _Key:
        """What must be the same for a verdict to be used again."""
        return self.id, self.messages, self.model

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read a line; `ValueError` if it is none."""
        data = json.loads(line)
        if not isinstance(data, dict) or set(data) != {item.name for item in dataclasses.fields(cls)}:
            raise ValueError("its keys are not those of a verdict")
        if odd := [name for name, value in data.items() if not isinstance(value, str)]:
            raise ValueError(f"{odd[0]!r} is no text")
        return cls(**data)


def verdicts(
    records: Sequence[SampleRecord],
    ask: Ask,
    judge: Judge,
    cache: Path,
    report: Report | None = None,
) -> dict[str, str]:
    """Return what a judge says about each answer, by sample id, in the order of the records.

    Parameters
    ----------
    records
        Answers; those that failed are not judged.
    ask
        Writes the judge's messages for an answer.
    judge
        Whom to ask; not contacted if the cache knows everything.
    cache
        File of verdicts, made if missing. A verdict is used again for the same sample, messages and model.
    report
        Called with how many are judged and how many there are.

    Raises
    ------
    ConfigError, DataError
        If the judge does not answer (`Judge.reply`); what it said before is in the cache.
    DataError
        If the cache is damaged or cannot be written.
    """
    return {key: found.text for key, found in _replies(records, ask, judge, cache, report).items()}


def graded(
    records: Sequence[SampleRecord],
    ask: Ask,
    judge: Judge,
    cache: Path,
    report: Report | None = None,
) -> list[SampleRecord]:
    """Return the records with the judge's reply (``judge_reply``) and its name (``judge``) in their ``meta``.

    As `verdicts`; records that failed stay as they are.
    """
    found = _replies(records, ask, judge, cache, report)
    return [
        dataclasses.replace(
            record, meta={**record.meta, "judge_reply": found[record.id].text, "judge": found[record.id].judge}
        )
        if record.id in found
        else record
        for record in records
    ]


def _replies(
    records: Sequence[SampleRecord],
    ask: Ask,
    judge: Judge,
    cache: Path,
    report: Report | None,
) -> dict[str, Reply]:
    questions = {record.id: ask(record) for record in records if record.error is None}
    keys = {name: (name, content_hash(messages), judge.model) for name, messages in questions.items()}
    known = _read(cache)
    _SEEN.update({(judge, key): known[key] for key in keys.values() if key in known})
    missing = {name: key for name, key in keys.items() if key not in known}
    done = len(keys) - len(missing)
    if report:
        report(done, len(keys))
    if missing:
        seen = {name: _SEEN[judge, key] for name, key in missing.items() if (judge, key) in _SEEN}
        unseen = {name: questions[name] for name in missing if name not in seen}
        with _Appender(cache) as file:
            for name, reply in chain(seen.items(), _answers(judge, unseen)):
                file.append(_judgement(keys[name], judge, reply))
                known[keys[name]] = _SEEN[judge, keys[name]] = reply
                done += 1
                if report:
                    report(done, len(keys))
    return {name: known[key] for name, key in keys.items()}


def _answers(judge: Judge, questions: Mapping[str, list[Message]]) -> Iterator[tuple[str, Reply]]:
    """Yield answers as they come; after a failure nothing more is asked, but what is under way is waited for."""
    waiting: SimpleQueue[tuple[str, list[Message]]] = SimpleQueue()
    answers: SimpleQueue[tuple[str, Reply | Exception] | None] = SimpleQueue()
    stop = Event()
    for question in questions.items():
        waiting.put(question)

    def work() -> None:
        with suppress(Empty):
            while not stop.is_set():
                name, messages = waiting.get_nowait()
                try:
                    answers.put((name, judge.reply(messages)))
                except Exception as error:  # raised below
                    stop.set()  # here, and not where the failure is noticed: that thread may be waiting for the disk
                    answers.put((name, error))
        answers.put(None)

    for _ in range(judge.parallel):  # daemons: who interrupts does not wait for a judge that hangs
        Thread(target=work, daemon=True).start()
    working = judge.parallel
    failure: Exception | None = None
    try:
        while working:
            answer = answers.get()
            if answer is None:
                working -= 1
                continue
            name, said = answer
            if isinstance(said, Reply):
                yield name, said
            elif failure is None:
                failure = type(said)(f"sample {name!r}: {said}") if isinstance(said, MitigateError) else said
    finally:  # also when the disk is full, or somebody interrupts
        stop.set()
    if failure:
        raise failure


def _judgement(key: _Key, judge: Judge, reply: Reply) -> Judgement:
    name, messages, model = key
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Judgement(
        id=name, messages=messages, model=model, judge=reply.judge, url=judge.url, reply=reply.text, time=now
    )


def _read(path: Path) -> dict[_Key, Reply]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is nothing, or a torn line
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    known: dict[_Key, Reply] = {}
    for number, line in enumerate(lines, start=1):
        try:
            found = Judgement.from_line(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: no verdict of a judge ({error}); delete the line, and its sample is judged again"
            ) from None
        known.setdefault(found.key, Reply(found.reply, found.judge))
    return known


class _Appender:
    """Appends verdicts to a file, on the disk before `append` returns; a torn last line is cut off first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise refused(self._path, error) from error
        return self

    def append(self, judgement: Judgement) -> None:
        line = json.dumps(dataclasses.asdict(judgement)).encode("ascii") + b"\n"
        try:
            append(self._file, line)
        except OSError as error:
            raise refused(self._path, error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._file.close()
