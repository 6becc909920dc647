"""The table of samples a tracker gets: picture, question, both answers, what is wrong in them, what each method did."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from mitigate.benchmarks.base import Sample
from mitigate.effects import BUS
from mitigate.report.samples import choose_samples

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.records import SampleRecord
    from mitigate.report.samples import ShownSample
    from mitigate.runner.stored import StoredRun

ROWS: Final = 100
"""Most samples of a table; all tables of a comparison show the same ones, in the same order."""
COLUMNS: Final = (
    "picture", "sample", "seed", "category", "prompt", "truth", "baseline", "answer", "hallucinated", "became",
)  # fmt: skip
"""Followed by one column per counter of a method: ``METHOD/COUNTER``."""
_TRUTH_LENGTH = 300


class SampleTables:
    """The sample tables of a comparison, one per stack; samples are chosen as in the report, pictures opened once.

    Parameters
    ----------
    runs
        All runs; of a stack with several seeds, the first one is shown.
    baseline
        Stack the others are compared to, if there is one.
    """

    def __init__(self, runs: Sequence[StoredRun], baseline: str | None) -> None:
        self._runs: dict[str, StoredRun] = {}
        for run in runs:
            self._runs.setdefault(run.stack, run)
        self._baseline = self._runs.get(baseline) if baseline is not None else None

    @cached_property
    def _chosen(self) -> Sequence[ShownSample]:
        runs = list(self._runs.values())
        baseline = None if self._baseline is None else self._baseline.stack
        return choose_samples(runs[0].benchmark, runs, baseline, limit=ROWS, seed=runs[0].seed).shown

    @cached_property
    def _pictures(self) -> Mapping[str, Image | None]:
        benchmark = next(iter(self._runs.values())).benchmark
        found: dict[str, Image | None] = {}
        for shown in self._chosen:
            record = shown.record
            if record.image_id in found:
                continue
            asked = {name: getattr(record, name) for name in ("id", "image_id", "task", "prompt", "meta")}
            try:
                found[record.image_id] = next(iter(benchmark.images(Sample(**asked))), None)
            except Exception:  # a picture that failed in the run, or records that lie where the pictures do not
                continue
        return found

    @property
    def missing(self) -> int:
        """How many pictures of the tables could not be opened; a sample without a picture misses none."""
        return len({shown.record.image_id for shown in self._chosen} - self._pictures.keys())

    def of(self, stack: str) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of a stack's table."""
        run = self._runs[stack]
        records = [run.answers[shown.record.id] for shown in self._chosen if shown.record.id in run.answers]
        counters = sorted(
            {(key, name) for record in records for key, own in record.telemetry.items() if key != BUS for name in own}
        )
        shown_by_id = {shown.record.id: shown for shown in self._chosen}
        rows = [
            [
                *self._row(run, record, shown_by_id[record.id]),
                *(record.telemetry.get(key, {}).get(name) for key, name in counters),
            ]
            for record in records
        ]
        return [*COLUMNS, *(f"{key}/{name}" for key, name in counters)], rows

    def _row(self, run: StoredRun, record: SampleRecord, shown: ShownSample) -> list[Any]:
        before = None if self._baseline is None else self._baseline.answers.get(record.id)
        spans = run.benchmark.marked(record, record.text) if record.error is None else []
        states = shown.states.get(run.stack, ())
        return [
            self._pictures.get(record.image_id),
            record.id,
            run.seed,
            ", ".join(f"{name}: {category}" for name, category in shown.categories.items()),
            record.prompt,
            truth(record.meta),
            None if before is None or self._baseline is run else _answer(before),
            _answer(record),
            ", ".join(span.text for span in spans if span.kind == "hallucinated"),
            states[-1] if states else "same" if before is not None and self._baseline is not run else "",
        ]


def _answer(record: SampleRecord) -> str:
    return record.text if record.error is None else f"(failed: {record.error})"


def truth(meta: Mapping[str, Any]) -> str:
    """Write a sample's ground truth in a line; long ones are cut off."""
    parts = [f"{key}: {_plain(value)}" for key, value in meta.items() if value not in (None, "", [], {})]
    return textwrap.shorten("; ".join(parts), _TRUTH_LENGTH, placeholder=" ...")


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)
