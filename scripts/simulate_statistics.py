"""How often 95 % intervals hold the truth, and how often comparisons find what is not there, where the truth is known.

    python scripts/simulate_statistics.py [--replications 2000] [--resamples 2000] [--images 20 50 100 250]

Prints the tables of docs/statistics.md. Replications are columns of one table of counts, so that many of them go
through the project's own functions at once, in batches that draw resamples of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from mitigate.metrics.base import Array, ImageCounts, Metric, divide
from mitigate.statistics import compare_all, holm, intervals

BATCH = 100

Draw = Callable[[np.random.Generator, int, Sequence[float]], list[Array]]
"""Generator, images, effects -> counts ``[images, columns]`` of a baseline and of one stack per effect."""


@dataclass(frozen=True)
class Scenario:
    """A metric, how its counts arise, and the effect of a stack that does something."""

    name: str
    columns: int
    compute: Callable[[Array], Array]
    draw: Draw
    effect: float

    def metrics(self, batch: int) -> list[Metric]:
        """Return the metric once for every replication, each with columns of its own."""
        return [
            Metric(name=str(r), title="", columns=tuple(f"{r}/{c}" for c in range(self.columns)), compute=self.compute)
            for r in range(batch)
        ]

    def runs(self, seed: Sequence[int], batch: int, images: int, effects: Sequence[float]) -> list[ImageCounts]:
        """Draw a baseline and its stacks, all replications side by side."""
        rng = np.random.default_rng(seed)
        drawn = [self.draw(rng, images, effects) for _ in range(batch)]
        names = tuple(f"{index:06}" for index in range(len(drawn[0][0])))
        return [
            ImageCounts(
                names,
                {f"{r}/{c}": counts[side][:, c] for r, counts in enumerate(drawn) for c in range(self.columns)},
            )
            for side in range(len(effects) + 1)
        ]

    def truth(self, effect: float) -> tuple[float, float]:
        """Return the metric of the baseline and of the stack over a million images; alike without effect."""
        rng = np.random.default_rng(12345)
        total = np.zeros((2, self.columns))
        for _ in range(10):
            total += [counts.sum(axis=0) for counts in self.draw(rng, 100_000, [effect])]
        before, after = self.compute(total)
        return float(before), float(after if effect else before)


def answers(
    rng: np.random.Generator, images: int, effects: Sequence[float], chance: float, shared: float
) -> list[Array]:
    """Draw right and wrong answers to six questions per image, ``[images, 6]`` for each run.

    An answer is right where a normal number stays below a threshold. ``shared`` of its variance is the image's, most of
    the rest the question's: images are easy or hard as a whole, and runs mostly agree, as models do.
    """
    ease = np.sqrt(shared) * rng.standard_normal((images, 1))
    ease = ease + np.sqrt(0.85 - shared) * rng.standard_normal((images, 6))
    return [
        ease + np.sqrt(0.15) * rng.standard_normal((images, 6)) < ndtri(chance) + effect for effect in (0.0, *effects)
    ]


def rate(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
    """Right answers among six questions per image."""
    return [_of(right.sum(1), 6) for right in answers(rng, images, effects, 0.7, 0.4)]


def f1(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
    """True positives, misses and false positives of six yes/no questions; yes is right for three of them."""
    return [
        np.stack([right[:, :3].sum(1), 3 - right[:, :3].sum(1), 3 - right[:, 3:].sum(1)], axis=-1).astype(float)
        for right in answers(rng, images, effects, 0.75, 0.4)
    ]


def chair(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
    """Hallucinated mentions among all mentions, in captions whose lengths differ between images and runs."""
    difficulty = rng.normal(-1.5, 0.7, images)
    length = 1 + rng.poisson(5, images)
    counts = []
    for effect in (0.0, *effects):
        mentions = length + rng.poisson(1, images)
        counts.append(_of(rng.binomial(mentions, 1 / (1 + np.exp(effect - difficulty))), mentions))
    return counts


def groups(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
    """Two groups of three questions per image; a group counts only if all three are right."""
    return [_of(right[:, :3].all(1) + 1 * right[:, 3:].all(1), 2) for right in answers(rng, images, effects, 0.8, 0.3)]


def few(rng: np.random.Generator, images: int, effects: Sequence[float]) -> list[Array]:
    """One question per image; a run changes 4 % of the answers, for the better by half plus ``effect``."""
    right = rng.random(images) < 0.8
    counts = [_of(right, 1)]
    for effect in effects:
        chance = 0.04 * np.where(right, (0.5 - effect) / 0.8, (0.5 + effect) / 0.2)
        counts.append(_of(right ^ (rng.random(images) < chance), 1))
    return counts


def _of(part: Array, whole: Array | int) -> Array:
    return np.stack(np.broadcast_arrays(part, whole), axis=-1).astype(float)


def _share(sums: Array) -> Array:
    return divide(sums[..., 0], sums[..., 1])


def _f1(sums: Array) -> Array:
    return divide(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


SCENARIOS = (
    Scenario("rate", 2, _share, rate, 0.15),
    Scenario("F1", 3, _f1, f1, 0.15),
    Scenario("CHAIR_i", 2, _share, chair, 0.4),
    Scenario("qAcc", 2, _share, groups, 0.15),
    Scenario("4 % changed", 2, _share, few, 0.25),
)


@dataclass(frozen=True)
class Coverage:
    """Shares of replications: the interval of a run, of a difference held the truth; p was below .05."""

    run: float
    difference: float
    rejected: float
    standard_error: float
    """Mean of the differences' ``se`` by the standard deviation that the differences had."""


def coverage(scenario: Scenario, images: int, effect: float, replications: int, resamples: int) -> Coverage:
    """Simulate one comparison of two runs."""
    before, after = scenario.truth(effect)
    runs, differences = [], []
    for batch in range(-(-replications // BATCH)):
        baseline, stack = scenario.runs([images, batch], BATCH, images, [effect])
        metrics = scenario.metrics(BATCH)
        runs += intervals(stack, metrics, resamples, batch).values()
        differences += compare_all(baseline, {"stack": stack}, metrics, resamples, batch)["stack"].values()
    true = after - before
    return Coverage(
        float(np.mean([found.low <= after <= found.high for found in runs])),
        # a difference of counts has a grid: the truth on a bound is inside
        float(np.mean([found.low - 1e-12 <= true <= found.high + 1e-12 for found in differences])),
        float(np.mean([found.p < 0.05 for found in differences])),
        float(np.mean([found.se for found in differences]) / np.std([found.value for found in differences])),
    )


def false_findings(
    scenario: Scenario, images: int, replications: int, resamples: int, *, idle: int = 5, working: int = 0
) -> float:
    """Return how often a comparison finds at least one effect of a stack without any, after Holm's adjustment."""
    effects = [0.0] * idle + [scenario.effect] * working
    wrong = []
    for batch in range(-(-replications // BATCH)):
        baseline, *stacks = scenario.runs([images, batch, 1], BATCH, images, effects)
        named = {str(index): stack for index, stack in enumerate(stacks)}
        found = compare_all(baseline, named, scenario.metrics(BATCH), resamples, batch)
        for metric in map(str, range(BATCH)):
            adjusted = holm([found[name][metric].p for name in named])
            wrong.append(min(adjusted[:idle]) < 0.05)
    return float(np.mean(wrong))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--images", type=int, nargs="+", default=[20, 50, 100, 250])
    options = parser.parse_args()
    size = options.replications, options.resamples
    print("| metric | images | effect | run's interval | difference's interval | p < .05 | se / true se |")
    print("|---|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        for images in options.images:
            for effect in (0.0, scenario.effect):
                found = coverage(scenario, images, effect, *size)
                print(
                    f"| {scenario.name} | {images} | {'yes' if effect else 'none'} | {found.run:.1%} "
                    f"| {found.difference:.1%} | {found.rejected:.1%} | {found.standard_error:.2f} |",
                    flush=True,
                )
    print("\n| metric | images | 5 stacks without effect | 3 without, 2 with |")
    print("|---|---|---|---|")
    for scenario in SCENARIOS:
        for images in options.images:
            all_idle = false_findings(scenario, images, *size)
            some = false_findings(scenario, images, *size, idle=3, working=2)
            print(f"| {scenario.name} | {images} | {all_idle:.1%} | {some:.1%} |", flush=True)


if __name__ == "__main__":
    main()
