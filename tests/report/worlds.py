"""Small comparisons and runs for the report's tests, and strings that must not act anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from mitigate.benchmarks.base import Benchmark, Span
from mitigate.errors import DataError
from mitigate.records import SampleRecord

#: What a model, a user or a file name may hold; each would do something if it were not escaped.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "' onmouseover='document.title=1' x='",
    '" autofocus onfocus="document.title=1',
    "{{ 7 * 7 }}{% raw %}",
    "javascript:document.title=1",
    "]]></style><svg onload=document.title=1>",
    "\u2028\u202e\x00\ud800 end",
)


def interval(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "undefined": 0.0}


def difference(value: float, low: float, high: float) -> dict[str, Any]:
    clear = low > 0 or high < 0
    tests = {"p": 0.01, "p_holm": 0.02, "se": 0.01, "effect_size": 0.25, "mde": 0.028}
    about = {"images": 500, "changed": 50 if value else 0, "caution": None}
    return {**interval(value, low, high), **tests, **about, "excludes_zero": clear}


def stack(chair: float, cost: float, differences: dict[str, Any], *, idle: list[str] | None = None) -> dict[str, Any]:
    effects = {
        "rows_edited_share": 0.0 if idle else 0.25,
        "rejections_per_token": 0.0,
        "extra_forwards_per_token": 1.5,
        "extra_backwards_per_token": 0.0,
        "texts_changed": 0.4,
        "idle": idle or [],
        "methods": {"bus": {"forwards": 10.0}, "beta": {"rows_edited": 12.0, "l1_change": 0.125}}
        if differences
        else {},
    }
    return {
        "methods": {"beta": {"gain": 0.2}} if differences else {},
        "provenance": {"methods.beta.gain": "command line", "seed": "default", "decoding.max_new_tokens": "quick"},
        "seeds": [0],
        "failures": 0,
        "metrics": {
            "chair_i": interval(chair, chair - 0.05, chair + 0.05),
            "pope/adversarial/f1": interval(0.8, 0.7, 0.9),
            "length": interval(9.0, 8.0, 10.0),
            "pope/adversarial/yes_rate": interval(0.5, 0.4, 0.6),
        },
        "differences": differences,
        "mcnemar": {"only_first": 1, "only_second": 2, "p": 0.0004, "odds_ratio": 2.0} if differences else None,
        "effects": effects,
        "cost": {"ms_per_token": cost, "overhead": cost / 2, "tokens": 10.0, "seconds": 1.0, "batch_size": 4},
        "notes": [f"{key} did nothing" for key in idle or []],
        "warnings": [],
        "seed_spread": {},
        "record": {
            "created_at": "2026-01-01T00:00:00+00:00",
            "versions": {"torch": "9.9"},
            "git": {"sha": "abc", "dirty": True},
            "weights": "sha256:f1f1",
        },
    }


def about(title: str, short: str, *, better: bool | None, percent: bool = True, unit: str = "") -> dict[str, Any]:
    return {"title": title, "short": short, "percent": percent, "unit": unit, "higher_is_better": better}


def made_comparison() -> dict[str, Any]:
    """Return a comparison of three stacks: the baseline, a good one, one that did nothing."""
    better = {
        "chair_i": difference(-0.1, -0.15, -0.02),
        "pope/adversarial/f1": difference(-0.2, -0.3, -0.1),
        "length": difference(-2.0, -3.0, -1.0),
        "pope/adversarial/yes_rate": difference(0.01, -0.1, 0.1),
    }
    unsure = {
        "chair_i": difference(0.01, -0.03, 0.04),
        "pope/adversarial/f1": difference(0.0, 0.0, 0.0),
        "length": difference(0.0, 0.0, 0.0),
        "pope/adversarial/yes_rate": difference(0.0, 0.0, 0.0),
    }
    numbers = {"chair_i": {"value": 0.25, "difference": {"value": -0.125, "low": -0.25, "high": -0.0625}}}
    return {
        "name": "trial",
        "benchmark": {"name": "fake", "version": 1, "judge_model": "judge-9"},
        "model": "small",
        "baseline": "none",
        "seed": 0,
        "n_images": 7,
        "n_samples": 70,
        "left_out": [],
        "headline": ["chair_i", "pope/adversarial/f1"],
        "context": ["length", "pope/adversarial/yes_rate"],
        "metrics": {
            "chair_i": about("CHAIR_i", "CHAIR_i", better=False),
            "length": about("Length", "Length", better=None, percent=False, unit="words"),
            "pope/adversarial/f1": about("POPE adversarial F1", "F1", better=True),
            "pope/adversarial/yes_rate": about("POPE adversarial yes-rate", "yes-rate", better=None),
        },
        "stacks": {
            "none": stack(0.3, 2.0, {}),
            "good": stack(0.2, 3.0, better),
            "unsure": stack(0.31, 9.0, unsure, idle=["beta"]),
        },
        "breakdowns": {
            "kind": {
                "rare": {"n": 2, "images": 2, "stacks": {"none": {"chair_i": {"value": 0.5}}, "good": numbers}},
                "often": {"n": 9, "images": 5, "stacks": {"none": {"chair_i": {"value": 0.375}}, "good": numbers}},
            }
        },
        "notes": ["The testbed is a small test bench, not evidence about large models."],
        "config": {"seed": 0},
        "data_hash": "d4d4",
        "prompt_hash": "e5e5",
    }


@dataclass(frozen=True)
class Run:
    stack: str
    answers: dict[str, SampleRecord]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Words(Benchmark):
    """In a caption ``dog`` is hallucinated and ``cat`` is right; a question is answered right with ``yes``."""

    name: ClassVar[str] = "words"
    summary: ClassVar[str] = "words"
    size: tuple[int, int] = (16, 16)
    broken: bool = False
    category: str = "animals"

    def images(self, sample: Any) -> list[Image.Image]:
        if self.broken:
            raise DataError("data/words does not exist; get it")
        return [Image.new("RGB", self.size, "red")]

    def correct(self, record: SampleRecord) -> bool | None:
        return record.text.lower().startswith("yes") if record.task == "yes_no" else None

    def marked(self, sample: Any, text: str) -> list[Span]:
        kinds = {"dog": "hallucinated", "cat": "correct"}
        parts = [part for word in text.split(" ") for part in (word, " ")][:-1]
        return [Span(part, kinds.get(part, "plain")) for part in parts if part]  # type: ignore[arg-type]

    def breakdowns(self, record: SampleRecord) -> dict[str, str]:
        return {"topic": self.category} if record.task == "caption" else {}


def record(key: str, text: str, *, task: str = "caption", image: str = "", **more: Any) -> SampleRecord:
    prompt = more.pop("prompt", f"Prompt of {key}?")
    return SampleRecord(
        id=key, image_id=image or key, task=task, prompt=prompt, text=text, tokens=3, finished=True, **more
    )


@dataclass
class World:
    """Runs of two stacks: what was fixed, broken, changed, and the same."""

    benchmark: Words = field(default_factory=Words)
    prefix: str = ""

    def runs(self) -> list[Run]:
        texts = {
            "p1/fixed": ("a dog here", "a cat here"),
            "p2/broken": ("a cat here", "a dog here"),
            "p3/changed": ("a cat here", "the cat here"),
            "p4/same": ("a cat", "a cat"),
            "p5/same": ("a bird", "a bird"),
            "p1/question": ("No", "Yes"),
        }
        sides: list[dict[str, SampleRecord]] = [{}, {}]
        for key, pair in texts.items():
            task = "yes_no" if key.endswith("question") else "caption"
            for side, text in zip(sides, pair, strict=True):
                did = {"bus": {"attention_rows": 8.0, "tokens": 3.0}}
                if side is sides[1]:
                    did["beta"] = {"rows_edited": 4.0, "l1_change": 0.5, "seconds": 1.0}
                side[key] = record(
                    key, self.prefix + text, task=task, image=key.split("/")[0], telemetry=did, prompt=f"Ask {key}"
                )
        return [Run("none", sides[0]), Run("good", sides[1]), Run("unsure", dict(sides[0]))]
