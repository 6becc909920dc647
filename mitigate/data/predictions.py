"""Answers of any tool, matched to a benchmark's samples: every one exactly once, or an error with file and line."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mitigate.data.reading import parse_rows, read_rows
from mitigate.errors import DataError
from mitigate.records import SampleRecord
from mitigate.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mitigate.benchmarks.base import Benchmark, Sample

#: More known ids than this are not listed to somebody who wrote a wrong one.
_LISTED = 6
#: Most characters of a list of keys.
_SHOWN_KEYS = 100


@dataclass(frozen=True)
class Prediction:
    """One line of a file of answers.

    Parameters
    ----------
    id
        As it is written there.
    text
        The raw answer.
    place
        ``file:line``.
    failed
        Why there is no answer, in the records of a run that skipped its failures; empty normally.
    """

    id: str
    text: str
    place: str
    failed: str = ""


def read_predictions(
    source: Path | bytes, name: str, *, id_field: str = "id", text_field: str = "text"
) -> list[Prediction]:
    """Read answers from JSON lines, or one JSON array of objects.

    Parameters
    ----------
    source
        A file, or its content.
    name
        What to call it in messages.
    id_field, text_field
        Keys of the sample's id (text or a whole number) and of the raw answer; other keys mean nothing.

    Raises
    ------
    DataError
        Naming file and line, if the file is damaged, a key is missing, or an id or answer is of the wrong kind.
    """
    rows = parse_rows(source, name) if isinstance(source, bytes) else read_rows(source)
    return [_prediction(row, f"{name}:{line}", id_field, text_field) for line, row in rows]


def _prediction(row: Mapping[str, Any], place: str, id_field: str, text_field: str) -> Prediction:
    key, answer = _get(row, id_field, "--id-field", place), _get(row, text_field, "--text-field", place)
    if not isinstance(key, str) and (not isinstance(key, int) or isinstance(key, bool)):
        raise DataError(f"{place}: {id_field!r} must be text or a whole number, not {_shown(key)}")
    if not isinstance(answer, str):
        hint = '; an empty answer is ""' if answer is None else ""
        raise DataError(f"{place}: {text_field!r} must be the answer as text, not {_shown(answer)}{hint}")
    return Prediction(str(key), answer, place, failed=str(row.get("error") or ""))


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"


def _get(row: Mapping[str, Any], key: str, flag: str, place: str) -> Any:
    if key not in row:
        there = textwrap.shorten(", ".join(row), _SHOWN_KEYS, placeholder=" ...") or "nothing"
        raise DataError(f"{place}: there is no {key!r}, only {there}; name the key with {flag} KEY")
    return row[key]


def match(
    benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[Prediction], name: str, *, partial: bool
) -> list[SampleRecord]:
    """Return the records of the answered samples, in the benchmark's order.

    Parameters
    ----------
    benchmark
        Knows the other names of its samples (`Benchmark.aliases`).
    samples
        Its samples.
    predictions
        The answers, in any order.
    name
        Of their file.
    partial
        Whether samples may be left out, those that failed among them.

    Raises
    ------
    DataError
        If an answer's id is unknown or ambiguous, a sample has two answers, one failed or has none and `partial` is
        off, or a part is left out of what counts together.
    """
    known = {sample.id: sample for sample in samples}
    names = _other_names(benchmark, samples)
    answered: dict[str, Prediction] = {}
    failed: dict[str, Prediction] = {}  # what stands for its text is no answer; a run may have answered it later
    for prediction in predictions:
        key = _resolve(prediction, known, names)
        if prediction.failed:
            failed[key] = prediction
            continue
        if key in answered:
            raise DataError(
                f"{prediction.place}: sample {key!r} has an answer already, at {answered[key].place}; keep one of them"
            )
        answered[key] = prediction
    if not partial and (without := [item for key, item in failed.items() if key not in answered]):
        first = without[0]
        raise DataError(f"{first.place}: the sample failed ({first.failed:.60}); answer it, or use --partial")
    if not partial and (missing := [key for key in known if key not in answered]):
        raise DataError(
            f"{name} has no answer for {len(missing)} of {len(known)} samples, the first is {missing[0]!r}\n"
            "add them, choose less of the benchmark (its options), or score only what is there with --partial"
        )
    if benchmark.grouped:
        _check_groups(benchmark, samples, answered)
    return [as_record(sample, answered[sample.id].text) for sample in samples if sample.id in answered]


def _check_groups(benchmark: Benchmark, samples: Sequence[Sample], answered: Mapping[str, Prediction]) -> None:
    """Refuse a group of which only a part is answered: its answers count together."""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(benchmark.cluster(as_record(sample, "")), []).append(sample.id)
    for name, members in groups.items():
        there = [key for key in members if key in answered]
        if there and len(there) < len(members):
            missing = next(key for key in members if key not in answered)
            raise DataError(
                f"{answered[there[0]].place}: the {len(members)} answers of {name} count together, but there is none "
                f"for {missing!r}; add it, or take out the others of {name}"
            )


def _other_names(benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Return alias -> ids of all samples it may mean."""
    names: dict[str, list[str]] = {}
    for sample in samples:
        for alias in dict.fromkeys(benchmark.aliases(sample)):
            names.setdefault(alias, []).append(sample.id)
    return names


def _resolve(prediction: Prediction, known: Mapping[str, Sample], names: Mapping[str, Sequence[str]]) -> str:
    if prediction.id in known:
        return prediction.id
    meant = names.get(prediction.id, ())
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise DataError(
            f"{prediction.place}: the id {prediction.id!r} may be {' or '.join(repr(key) for key in meant[:3])}; "
            "write the whole id, or choose the part of the benchmark that the file is about (its options)"
        )
    hint = suggestion(prediction.id, known) if len(known) <= _LISTED else f"; ids look like {next(iter(known))!r}"
    raise DataError(f"{prediction.place}: the benchmark, with these options, has no sample {prediction.id!r}{hint}")


def as_record(sample: Sample, text: str) -> SampleRecord:
    """Return the record of a sample that another tool answered; what only a run knows is left at nothing."""
    return SampleRecord(
        id=sample.id,
        image_id=sample.image_id,
        task=sample.task,
        prompt=sample.prompt,
        text=text,
        tokens=0,
        finished=True,
        meta=sample.meta,
    )
