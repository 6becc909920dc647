"""Which samples a report shows, and what it says about each: every answer, what changed, what the methods did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from mitigate.effects import BUS, EFFECT_COUNTERS

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark, Span
    from mitigate.records import SampleRecord, Telemetry

#: Samples a report shows unless asked for another number.
SAMPLES = 200

State = Literal["changed", "fixed", "broken", "failed"]
Errors = Callable[["SampleRecord"], float | None]


class AnsweredRun(Protocol):
    """A run with its answers."""

    @property
    def stack(self) -> str:
        """Name of the stack."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the run."""
        ...

    @property
    def answers(self) -> Mapping[str, SampleRecord]:
        """Sample id -> record."""
        ...


@dataclass(frozen=True, kw_only=True)
class Line:
    """One reply, and everybody who gave it.

    Parameters
    ----------
    givers
        Stack and label of each; the label names the seed where a stack has several.
    spans
        The reply, cut into marked pieces.
    error
        Why there is no reply; empty normally.
    verdict
        What a judge said about it, word for word; empty where no judge was asked.
    """

    givers: list[tuple[str, str]]
    spans: Sequence[Span]
    error: str = ""
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One sample of the browser.

    Parameters
    ----------
    record
        Any stack's record of it: what was asked.
    categories
        Breakdown -> category.
    lines
        All replies, the baseline's first.
    states
        Stack -> what became of the baseline's answer; stacks that answered the same are left out.
    did
        Label of a stack -> method -> what it did, in words.
    """

    record: SampleRecord
    categories: Mapping[str, str]
    lines: Sequence[Line]
    states: Mapping[str, Sequence[State]]
    did: Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a report shows of all samples.

    Parameters
    ----------
    shown
        The chosen samples, most telling first.
    total
        How many samples there are.
    tally
        Kind of sample -> shown and there: those an answer of which was fixed or broken, only changed, and the others.
    """

    shown: Sequence[ShownSample]
    total: int
    tally: Mapping[str, tuple[int, int]] = field(default_factory=dict)


#: Kinds of samples in the order in which they are chosen, as the page calls them.
KINDS = ("fixed or broken by a stack, or failed", "changed, but neither", "the same with every stack")


def choose_samples(
    benchmark: Benchmark, runs: Sequence[AnsweredRun], baseline: str | None, *, limit: int = SAMPLES, seed: int = 0
) -> Choice:
    """Choose the samples to show: those that a stack fixed or broke, then those it changed, then any.

    Within each kind the choice is by chance, with a seed, so that no answer is picked for its looks.

    Parameters
    ----------
    benchmark
        Knows errors, categories and marks.
    runs
        Runs over the same samples; the order of the stacks is that of the page.
    baseline
        Stack the others are compared to.
    limit
        Most samples to show.
    seed
        Of the choice.
    """
    ids = list(dict.fromkeys(key for run in runs for key in run.answers))
    errors = _remembered(benchmark)
    states = {key: _states(errors, runs, baseline, key) for key in ids}
    kinds: list[list[str]] = [[], [], []]
    for key in ids:
        kinds[_kind(states[key])].append(key)
    chosen: list[str] = []
    tally: dict[str, tuple[int, int]] = {}
    for name, members in zip(KINDS, kinds, strict=True):
        drawn = sorted(members, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode("utf-8", "replace")).digest())
        taken = set(drawn[: max(0, limit - len(chosen))])
        chosen += [key for key in members if key in taken]
        tally[name] = (len(taken), len(members))
    seeds = {stack: sum(run.stack == stack for run in runs) for stack in {run.stack for run in runs}}
    ordered = sorted(runs, key=lambda run: run.stack != baseline)  # stable: the baseline leads
    labelled = [(run.stack if seeds[run.stack] == 1 else f"{run.stack}, seed {run.seed}", run) for run in ordered]
    shown = [_shown(benchmark, labelled, key, states[key]) for key in chosen]
    return Choice(shown=shown, total=len(ids), tally=tally)


def _remembered(benchmark: Benchmark) -> Errors:
    """Return the benchmark's errors, asked once per record: the baseline's are needed for every stack."""
    known: dict[int, float | None] = {}

    def errors(record: SampleRecord) -> float | None:
        if id(record) not in known:
            known[id(record)] = benchmark.errors(record)
        return known[id(record)]

    return errors


def _kind(states: Mapping[str, Sequence[State]]) -> int:
    found = {state for each in states.values() for state in each}
    return 0 if found & {"fixed", "broken", "failed"} else 1 if found else 2


def _states(errors: Errors, runs: Sequence[AnsweredRun], baseline: str | None, key: str) -> dict[str, list[State]]:
    """Return stack -> what it made of the baseline's answer, over all its seeds; nothing where it is the same."""
    states: dict[str, list[State]] = {}
    plain = {run.seed: run.answers[key] for run in runs if run.stack == baseline and key in run.answers}
    for stack in dict.fromkeys(run.stack for run in runs):
        own = [(run.seed, run.answers[key]) for run in runs if run.stack == stack and key in run.answers]
        if any(record.error is not None for _, record in own):
            states[stack] = ["failed"]
            continue
        if stack == baseline or not plain:
            continue
        pairs = [(plain.get(seed, next(iter(plain.values()))), record) for seed, record in own]
        pairs = [pair for pair in pairs if pair[0].error is None and pair[0].text != pair[1].text]
        if pairs:
            change = _change(errors, pairs)
            states[stack] = ["changed"] if not change else ["changed", "fixed" if change < 0 else "broken"]
    return states


def _change(errors: Errors, pairs: Sequence[tuple[SampleRecord, SampleRecord]]) -> float:
    """Return by how much the errors rose; 0 where nobody can say."""
    total = 0.0
    for before, after in pairs:
        first, second = errors(before), errors(after)
        if first is not None and second is not None:
            total += second - first
    return total


def _shown(
    benchmark: Benchmark, labelled: Sequence[tuple[str, AnsweredRun]], key: str, states: Mapping[str, Sequence[State]]
) -> ShownSample:
    lines: dict[tuple[str, str, str], Line] = {}
    did: dict[str, dict[str, list[str]]] = {}
    found = [(label, run.stack, run.answers[key]) for label, run in labelled if key in run.answers]
    for label, stack, record in found:
        same = (record.text, record.error or "", str(record.meta.get("judge_reply", "")))
        if same not in lines:
            spans = benchmark.marked(record, record.text) if record.error is None else []
            lines[same] = Line(givers=[], spans=spans, error=same[1], verdict=same[2])
        lines[same].givers.append((stack, label))
        if said := what_methods_did(record.telemetry):
            did[label] = said
    record = found[0][2]
    categories = dict(benchmark.breakdowns(record))
    return ShownSample(record=record, categories=categories, lines=list(lines.values()), states=states, did=did)


def what_methods_did(telemetry: Telemetry) -> dict[str, list[str]]:
    """Say in words what every method did for one sample.

    Parameters
    ----------
    telemetry
        A record's counters.
    """
    bus = telemetry.get(BUS, {})
    return {key: _did(counters, bus) for key, counters in telemetry.items() if key != BUS}


def _did(counters: Mapping[str, float], bus: Mapping[str, float]) -> list[str]:
    said = []
    if not any(counters.get(name) for name in EFFECT_COUNTERS):
        said.append("changed nothing")
    for name, amount in counters.items():
        if not amount or name in ("seconds", "l1_change"):
            continue
        if name == "rows_edited":
            there = f" of {_plain(bus['attention_rows'])}" if bus.get("attention_rows") else ""
            said.append(f"attention rows edited: {_plain(amount)}{there}")
            if counters.get("l1_change"):
                said.append(f"mean L1 change of a row: {_plain(counters['l1_change'] / amount)}")
        else:
            said.append(f"{name.replace('_', ' ')}: {_plain(amount)}")
    return said


def _plain(amount: float) -> str:
    return f"{amount:.0f}" if float(amount).is_integer() else f"{amount:.3g}"
