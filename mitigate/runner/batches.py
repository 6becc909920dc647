"""Which samples are generated together: fixed by the benchmark alone, never by what is already finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark, Sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one call of ``generate``.

    Parameters
    ----------
    index
        Place in the full list of batches.
    samples
        All samples of one task.
    max_new_tokens
        Limit that they share.
    """

    index: int
    samples: tuple[Sample, ...]
    max_new_tokens: int

    def missing(self, done: Collection[str]) -> tuple[Sample, ...]:
        """Return the samples without a record."""
        return tuple(sample for sample in self.samples if sample.id not in done)


def plan_batches(benchmark: Benchmark, samples: Sequence[Sample], batch_size: int, longest: int) -> list[Batch]:
    """Cut the full, ordered sample list into batches that share task and token limit.

    A run that was killed repeats the very same batches (same padding, same kernels), so that its numbers are those of
    an undisturbed run.

    Parameters
    ----------
    benchmark
        Says how many tokens a sample may need.
    samples
        All samples of the benchmark, finished or not.
    batch_size
        Samples per batch.
    longest
        The decoding's ``max_new_tokens``; a sample's own limit can only lower it.
    """
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        own = benchmark.max_new_tokens(sample)
        limit = longest if own is None else min(own, longest)
        groups.setdefault((sample.task, limit), []).append(sample)
    batches: list[Batch] = []
    for (_, limit), members in groups.items():
        for start in range(0, len(members), batch_size):
            chosen = tuple(members[start : start + batch_size])
            batches.append(Batch(index=len(batches), samples=chosen, max_new_tokens=limit))
    return batches


def generate_arguments(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the decoding configuration into arguments of ``generate``, without those that do not apply."""
    arguments: dict[str, Any] = {"do_sample": bool(decoding["do_sample"]), "num_beams": decoding["num_beams"]}
    if decoding["repetition_penalty"] != 1.0:
        arguments["repetition_penalty"] = decoding["repetition_penalty"]
    if decoding["do_sample"]:  # transformers warns about sampling options in a greedy call
        arguments |= {key: decoding[key] for key in ("temperature", "top_p", "top_k")}
    return arguments
