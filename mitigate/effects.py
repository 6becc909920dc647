"""What the methods did and what it cost, summed from the records' telemetry.

A method that changed nothing shows zeros here, whatever its time was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mitigate.records import SampleRecord, Telemetry

BUS: Final = "bus"
"""Telemetry key of what the bus itself counted: ``attention_rows``, ``forwards``, ``tokens``."""

EFFECT_COUNTERS: Final = (
    "images_edited",
    "keys_masked",
    "keys_scaled",
    "rows_edited",
    "tokens_edited",
    "steps_edited",
    "tokens_changed",
    "rejections",
    "fallbacks",
)
"""Counters that are above zero only if the model or its output was changed."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one method did in a run.

    Parameters
    ----------
    rows_edited_share
        Attention rows edited / attention rows there were (layers x rows that predict a token).
    l1_per_row
        Mean L1 change of an edited attention row, averaged over heads; 0 without edited rows.
    tokens_edited_per_sample
        Positions whose hidden state was written.
    steps_edited_per_token, tokens_changed_per_token
        Steps whose logits were changed, and tokens chosen other than plain decoding would have.
    rejections_per_token, extra_forwards_per_token, extra_backwards_per_token
        Per generated token.
    seconds_per_token
        Time inside the method's handlers.
    idle
        Whether nothing at all was changed.
    """

    rows_edited_share: float
    l1_per_row: float
    tokens_edited_per_sample: float
    steps_edited_per_token: float
    tokens_changed_per_token: float
    rejections_per_token: float
    extra_forwards_per_token: float
    extra_backwards_per_token: float
    seconds_per_token: float
    idle: bool


def totals(records: Sequence[SampleRecord]) -> Telemetry:
    """Sum the telemetry of all samples: method key (and ``bus``) -> counter -> sum; NaN stays NaN.

    Where the bus did not count ``tokens``, the denominator of everything per token, they are the records' own.
    """
    amounts: dict[str, dict[str, list[float]]] = {}
    for record in records:
        bus = {"tokens": float(record.tokens), **record.telemetry.get(BUS, {})}
        for key, counters in {**record.telemetry, BUS: bus}.items():
            lists = amounts.setdefault(key, {})
            for name, amount in counters.items():
                lists.setdefault(name, []).append(amount)
    return {key: {name: _sum(each) for name, each in sorted(lists.items())} for key, lists in sorted(amounts.items())}


def _sum(amounts: Iterable[float]) -> float:
    # fsum gives the same sum in every order, so the records of one and of several processes agree to the last bit.
    try:
        return math.fsum(amounts)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        return math.nan


def effects(summed: Mapping[str, Mapping[str, float]], samples: int) -> dict[str, Effect]:
    """Return what each method did, by its key.

    Parameters
    ----------
    summed
        As `totals` returns it; the denominators come from its ``bus`` entry.
    samples
        Number of samples summed over.
    """
    bus = summed.get(BUS, {})
    return {key: _effect(counters, bus, samples) for key, counters in summed.items() if key != BUS}


def stack_effect(summed: Mapping[str, Mapping[str, float]], samples: int) -> Effect:
    """Return what all methods of a stack did together.

    Edits of several methods add up: ``rows_edited_share`` is edits per row, above 1 where two methods edit every row.
    """
    together: dict[str, float] = {}
    for key, counters in summed.items():
        for name, amount in counters.items() if key != BUS else ():
            together[name] = together.get(name, 0.0) + amount
    return _effect(together, summed.get(BUS, {}), samples)


def _effect(counters: Mapping[str, float], bus: Mapping[str, float], samples: int) -> Effect:
    tokens = bus.get("tokens", 0.0)

    def per(counter: str, denominator: float) -> float:
        amount = counters.get(counter, 0.0)
        # Nothing out of nothing is nothing; something out of nothing is a contradiction and stays visible.
        return amount / denominator if denominator else (0.0 if amount == 0 else math.nan)

    return Effect(
        rows_edited_share=per("rows_edited", bus.get("attention_rows", 0.0)),
        l1_per_row=per("l1_change", counters.get("rows_edited", 0.0)),
        tokens_edited_per_sample=per("tokens_edited", samples),
        steps_edited_per_token=per("steps_edited", tokens),
        tokens_changed_per_token=per("tokens_changed", tokens),
        rejections_per_token=per("rejections", tokens),
        extra_forwards_per_token=per("extra_forwards", tokens),
        extra_backwards_per_token=per("extra_backwards", tokens),
        seconds_per_token=per("seconds", tokens),
        idle=not any(counters.get(name, 0.0) for name in EFFECT_COUNTERS),
    )
