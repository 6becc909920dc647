"""MMHal-Bench: a judge rates each answer from 0 to 6, and 3 or more means that nothing is hallucinated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from mitigate.metrics.base import Metric, Scorer, divide, ratio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mitigate.benchmarks.base import Benchmark
    from mitigate.records import SampleRecord

#: The question with index i is of the type i mod 8.
TYPES: Final = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
RATINGS: Final = range(7)
#: Ratings below it say that something is hallucinated.
CLEAN: Final = 3

_ALL: Final = tuple(
    f"mmhal/{name}" for name in ("answers", "points", "hallucinated", "informative", "unrated", "words")
)


def found_ratings(reply: str) -> list[int]:
    """Return the ratings a judge's reply names, as the official script looks for them: ``rating: 5`` in any case."""
    lower = reply.lower()
    return [rating for rating in RATINGS if f"rating: {rating}" in lower]


def rating(reply: str) -> int:
    """Return the rating a judge's reply gives; 0, as in the official script, if it names none or several."""
    found = found_ratings(reply)
    return found[0] if len(found) == 1 else 0


def mmhal_counts(reply: str, kind: str, length: int = 0) -> dict[str, float]:
    """Count one judged answer.

    Parameters
    ----------
    reply
        What the judge said.
    kind
        Type of the question, one of `TYPES`.
    length
        Words of the answer.
    """
    points = rating(reply)
    # RLHF-V's informativeness: 0 to 3 points, whether or not something is hallucinated.
    informative = points - CLEAN if points >= CLEAN else points
    counts = (1, points, points < CLEAN, informative, len(found_ratings(reply)) != 1, length)
    row = {f"mmhal/{kind}/answers": 1.0, f"mmhal/{kind}/points": float(points)}
    return row | dict(zip(_ALL, map(float, counts), strict=True))


def mmhal_metrics() -> list[Metric]:
    """Return mean rating, hallucination rate, mean rating of each type of question, and RLHF-V's informativeness."""
    answers, points, hallucinated, informative, unrated, words = _ALL
    return [
        ratio("mmhal/score", "MMHal score", points, answers, higher_is_better=True, percent=False, unit="points"),
        ratio("mmhal/hallucination_rate", "MMHal hallucination", hallucinated, answers, higher_is_better=False),
        Metric(
            name="mmhal/informativeness",
            title="MMHal informativeness",
            columns=(informative, answers),
            compute=lambda sums: divide(sums[..., 0], CLEAN * sums[..., 1]),
            higher_is_better=True,
        ),
        *(
            ratio(
                f"mmhal/{kind}/score",
                f"MMHal {kind}",
                f"mmhal/{kind}/points",
                f"mmhal/{kind}/answers",
                higher_is_better=True,
                percent=False,
                unit="points",
            )
            for kind in TYPES
        ),
        ratio("mmhal/unrated", "MMHal unrated", unrated, answers, higher_is_better=False),
        ratio("mmhal/words", "MMHal words", words, answers, percent=False, unit="words"),
    ]


@dataclass(frozen=True, kw_only=True)
class Mmhal(Scorer):
    """MMHal-Bench of answers that a judge has rated (``meta["judge_reply"]``) and whose type is known (``type``)."""

    name: ClassVar[str] = "mmhal"
    summary: ClassVar[str] = "MMHal-Bench: a judge's rating of answers, and how many of them hallucinate"

    def metrics(self) -> list[Metric]:
        """Return the metrics of `mmhal_metrics`."""
        return mmhal_metrics()

    def score(self, record: SampleRecord, benchmark: Benchmark) -> Mapping[str, float]:
        """Count a judged answer; replies to anything but open questions are not counted.

        Raises
        ------
        DataError
            If the answer was not judged, or its type is not known.
        """
        if record.task != "open":
            return {}
        reply, kind = benchmark.truth(record, "judge_reply"), benchmark.truth(record, "type")
        return mmhal_counts(reply, kind, len(record.text.split()))

    def warnings(self, sums: Mapping[str, float]) -> list[str]:
        """Say how many replies of the judge gave no rating, or several."""
        if not (unrated := sums.get("mmhal/unrated")):
            return []
        return [
            f"mmhal: {unrated:g} of {sums['mmhal/answers']:g} replies of the judge do not give exactly one "
            "'Rating: 0' to 'Rating: 6' and count as 0, as in the official script"
        ]
