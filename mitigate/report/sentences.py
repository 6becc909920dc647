"""What the numbers of a comparison say, in sentences; that nothing was found is said, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mitigate.runner.table import number

#: p-values below it count as a difference after correction.
ALPHA = 0.05


def sentences(comparison: Mapping[str, Any]) -> list[str]:
    """Return the summary: one sentence or a few per headline metric, then what else has to be known.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    """
    baseline = comparison["baseline"]
    if baseline is None or len(comparison["stacks"]) < 2:
        return [_value(comparison, name) for name in comparison["headline"]] + _failures(comparison)
    said = [_about(comparison, name, baseline) for name in comparison["headline"]]
    moved = _moved_context(comparison)
    return [*said, *([moved] if moved else []), *_failures(comparison)]


def _value(comparison: Mapping[str, Any], name: str) -> str:
    """Say a metric of every stack, where there is nothing to compare."""
    metric = comparison["metrics"][name]
    shown = [f"{_interval(metric, data['metrics'][name])} with {stack}" for stack, data in comparison["stacks"].items()]
    return f"{metric['title']} is {', '.join(shown)}."


def _about(comparison: Mapping[str, Any], name: str, baseline: str) -> str:
    """Say for one metric what every stack did to it."""
    metric = comparison["metrics"][name]
    found = {
        stack: data["differences"][name] for stack, data in comparison["stacks"].items() if name in data["differences"]
    }
    clear = {stack: item for stack, item in found.items() if item["excludes_zero"]}
    parts = [
        f"{metric['title']} is {_interval(metric, comparison['stacks'][baseline]['metrics'][name])} with {baseline}."
    ]
    for verdict in ("Better", "Worse", "Different"):
        told = [_amount(stack, item, metric) for stack, item in clear.items() if _verdict(metric, item) == verdict]
        if told:
            parts.append(f"{verdict}: {'; '.join(told)}.")
    weak = [stack for stack, item in clear.items() if (item.get("p_holm") or 0.0) >= ALPHA]
    if weak:
        parts.append(
            f"Corrected for comparing several stacks (Holm), {listed(weak)} may be chance: p is {ALPHA} or more."
        )
    unclear = [stack for stack in found if stack not in clear]
    if unclear:
        parts.append(_nothing(metric, unclear, found, all_of_them=not clear))
    if few := on_few_pictures(comparison, name):
        parts.append(
            f"Too few pictures count or changed, so interval and smallest difference are too small: {listed(few)}."
        )
    return " ".join(parts)


def _nothing(
    metric: Mapping[str, Any],
    unclear: Sequence[str],
    found: Mapping[str, Mapping[str, Any]],
    *,
    all_of_them: bool,
) -> str:
    """Say that nothing was found, and how large it could have been without being seen."""
    unknown = [stack for stack in unclear if found[stack]["low"] is None]
    same = [stack for stack in unclear if found[stack]["low"] == found[stack]["high"] == 0]
    open_ones = [stack for stack in unclear if stack not in (*unknown, *same)]
    parts = []
    if open_ones:
        least = [_scaled(metric, found[stack].get("mde")) for stack in open_ones]
        known = [value for value in least if value is not None and value > 0]
        text = f"No difference beyond the 95 % interval: {', '.join(open_ones)}"
        if all_of_them and not unknown:
            text = "No stack changed it beyond the 95 % interval of the difference"
        if known:
            low, high = number(min(known)), number(max(known))
            size = (
                f"{low}{unit_of(metric, difference=True)}"
                if low == high
                else (f"{low} to {high}{unit_of(metric, difference=True)}, by stack")
            )
            text += f"; the smallest difference this sample could have shown (power 80 %) is {size}"
        parts.append(f"{text}.")
    if same:
        parts.append(f"Exactly the same in every resample: {', '.join(same)}.")
    if unknown:
        parts.append(f"Nothing can be said about {listed(unknown)}: the difference has no interval.")
    return " ".join(parts)


def on_few_pictures(comparison: Mapping[str, Any], name: str) -> list[str]:
    """Return the stacks whose interval of a metric's difference rests on too few pictures, if it is not just zero."""
    found = {stack: data["differences"].get(name, {}) for stack, data in comparison["stacks"].items()}
    return [
        stack for stack, item in found.items() if item.get("caution") and item["changed"] and item["low"] is not None
    ]


def _amount(stack: str, item: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    value, low, high = (_scaled(metric, item[key]) for key in ("value", "low", "high"))
    p = item.get("p_holm")
    parts = [f"{number(value, sign=True)} [{number(low, sign=True)}, {number(high, sign=True)}]"]
    if p is not None and p == p:
        parts.append(f"Holm p {'< 0.001' if p < 0.001 else f'= {number(p, 3)}'}")
    return f"{stack} ({', '.join(parts)})"


def _verdict(metric: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    if metric["higher_is_better"] is None:
        return "Different"
    return "Better" if (difference["value"] > 0) == metric["higher_is_better"] else "Worse"


def _moved_context(comparison: Mapping[str, Any]) -> str:
    """Name the metrics beside the headline ones (recall, length, yes-rate) that moved beyond their interval."""
    told = []
    prices = [other for name in comparison["headline"] for other in beside(comparison, name)]
    for name in dict.fromkeys([*prices, *context_of(comparison)]):
        metric = comparison["metrics"][name]
        for stack, data in comparison["stacks"].items():
            item = data["differences"].get(name)
            if item is not None and item["excludes_zero"]:
                unit = unit_of(metric, difference=True)
                title = metric["title"]
                told.append(f"{title} {number(_scaled(metric, item['value']), sign=True)}{unit} ({stack})")
    return f"What else moved beyond its interval: {'; '.join(told)}." if told else ""


def _failures(comparison: Mapping[str, Any]) -> list[str]:
    failed = {stack: data["failures"] for stack, data in comparison["stacks"].items() if data.get("failures")}
    if not failed:
        return []
    shown = ", ".join(f"{count} with {stack}" for stack, count in failed.items())
    return [f"Samples that failed: {shown}."]


def beside(comparison: Mapping[str, Any], name: str) -> list[str]:
    """Return the metrics a headline metric must be read beside.

    First what it may have been bought with: the metrics of its own family and part whose better end is the other one,
    such as recall beside a rate of hallucinations. Then the context of that family and part, or the nearest there is.
    """
    metrics, headline = comparison["metrics"], comparison["headline"]
    better = metrics[name]["higher_is_better"]
    prefix = name.rpartition("/")[0]
    price = [
        other
        for other, metric in metrics.items()
        if other not in headline
        and other.rpartition("/")[0] == prefix
        and None not in (better, metric["higher_is_better"])
        and metric["higher_is_better"] != better
    ]
    context = context_of(comparison)
    while True:
        near = [other for other in context if other.rpartition("/")[0] == prefix]
        if near or not prefix:
            return price + (near or context)
        prefix = prefix.rpartition("/")[0]


def context_of(comparison: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics that are context: they have no better end."""
    named = comparison.get("context")
    if named is not None:
        return [name for name in named if name in comparison["metrics"]]
    return [name for name, metric in comparison["metrics"].items() if metric["higher_is_better"] is None]


def listed(names: Sequence[str]) -> str:
    """Join names as in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unit_of(metric: Mapping[str, Any], *, difference: bool = False) -> str:
    """Return a metric's unit with a leading space, or nothing."""
    if metric["percent"]:
        return " percentage points" if difference else " %"
    return f" {metric['unit']}" if metric.get("unit") else ""


def _interval(metric: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    value, low, high = (_scaled(metric, item[key]) for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    tail = "" if low is None else f" [{number(low)}, {number(high)}]"
    return f"{number(value)}{unit_of(metric)}{tail}"


def _scaled(metric: Mapping[str, Any], value: float | None) -> float | None:
    return None if value is None else value * (100.0 if metric["percent"] else 1.0)
