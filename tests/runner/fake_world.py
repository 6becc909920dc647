"""A benchmark, a model and a stack without transformers: small enough to check the runner's own behaviour."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from PIL import Image

import mitigate.adapters
import mitigate.core.stack
from mitigate.benchmarks.base import Benchmark, Sample, Span
from mitigate.compose.resolved import ResolvedRun
from mitigate.core.facts import ModelFacts
from mitigate.core.method import Fidelity, Method, Tags
from mitigate.metrics.chair import chair_counts, chair_metrics, mentions
from mitigate.metrics.pope import parse, pope_counts, pope_metrics

OBJECTS = ("cat", "dog", "cup", "car", "tree", "ball")
WORDS = ("<pad>", "</s>", "Yes", "No", "A", ".", *OBJECTS)
END, YES, NO, ARTICLE, STOP, FIRST_OBJECT = 1, 2, 3, 4, 5, 6
FACTS = ModelFacts(family="fake", layers=4, heads=2, kv_heads=2)


@dataclass(frozen=True, kw_only=True)
class FakeBenchmark(Benchmark):
    name: ClassVar[str] = "fake"
    summary: ClassVar[str] = "drawn squares"
    limit: int | None = 6

    def samples(self) -> list[Sample]:
        made = []
        for index in range(self.limit or 6):
            image, present = f"img-{index}", [OBJECTS[index % 6], OBJECTS[(index + 2) % 6]]
            made.append(
                Sample(
                    id=f"{image}/caption", image_id=image, task="caption", prompt="Describe.", meta={"objects": present}
                )
            )
            for split, word in zip(("adversarial", "popular", "random"), OBJECTS[index % 3 :], strict=False):
                label = "yes" if word in present else "no"
                meta = {"label": label, "split": split}
                made.append(
                    Sample(
                        id=f"{image}/{split}", image_id=image, task="yes_no", prompt=f"Is there a {word}?", meta=meta
                    )
                )
        return made

    def images(self, sample: Sample) -> list[Image.Image]:
        return [Image.new("RGB", (16, 16), (int(sample.image_id.split("-")[1]) * 30 % 256, 90, 150))]

    def metrics(self) -> list[Any]:
        return chair_metrics() + pope_metrics()

    @property
    def headline(self) -> tuple[str, ...]:
        return ("chair_i", "pope/mean/f1")

    def score(self, record: Any) -> dict[str, float]:
        if record.task == "caption":
            return chair_counts(record.text, record.meta["objects"], {word: word for word in OBJECTS})
        return pope_counts(record.text, record.meta["label"], record.meta["split"])

    def max_new_tokens(self, sample: Sample) -> int | None:
        return 2 if sample.task == "yes_no" else None

    def correct(self, record: Any) -> bool | None:
        return parse(record.text) == record.meta["label"] if record.task == "yes_no" else None

    def marked(self, sample: Any, text: str) -> list[Span]:
        if sample.task == "yes_no":
            return [Span(text, "correct" if parse(text) == sample.meta["label"] else "hallucinated")]
        spans, end = [], 0
        for found in mentions(text, {word: word for word in OBJECTS}):
            kind = "correct" if found.name in sample.meta["objects"] else "hallucinated"
            spans += [Span(text[end : found.start]), Span(text[found.start : found.end], kind)]
            end = found.end
        return [span for span in [*spans, Span(text[end:])] if span.text]


@dataclass(frozen=True, kw_only=True)
class FakeMethod(Method):
    """Turns every ``period``-th reply into another one; 0 does nothing."""

    name: ClassVar[str] = "turn"
    summary: ClassVar[str] = "changes replies"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags()
    period: int = 2


class FakeModel(torch.nn.Module):
    """Replies by hashing the prompt ids, so that a reply depends on its sample alone (unless it samples)."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = SimpleNamespace(eos_token_id=END)
        self.pause = pause
        self.calls: list[dict[str, Any]] = []
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("broken")

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, turn: int = 0, **kwargs: Any) -> torch.Tensor:
        self.calls.append(
            {
                "rows": len(input_ids),
                "max_new_tokens": max_new_tokens,
                "inference": torch.is_inference_mode_enabled(),
                **kwargs,
            }
        )
        if self.fail_at is not None and len(self.calls) > self.fail_at:
            raise self.error
        time.sleep(self.pause)
        noise = int(torch.randint(1000, ()).item()) if kwargs.get("do_sample") else 0
        rows = []
        for ids in input_ids.tolist():
            digest = hashlib.sha256(repr((ids, noise)).encode()).digest()
            turned = turn and digest[0] % turn == 0
            if max_new_tokens <= 2:
                reply = [YES if (digest[1] + bool(turned)) % 2 else NO, END]
            else:
                reply = [
                    t for k in range(3) for t in (ARTICLE, FIRST_OBJECT + (digest[k + 1] + bool(turned)) % 6, STOP)
                ] + [END]
            rows.append((reply + [0] * 20)[: min(max_new_tokens, 12)])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


class FakeStack:
    """Stands for the real stack: attaches by setting a flag, and counts what it did."""

    def __init__(self, methods: Any) -> None:
        self.methods = dict(methods)
        self.needs_gradient = any(method.tags.gradient for method in self.methods.values())
        self.batch = all(method.tags.batch for method in self.methods.values())

    @contextmanager
    def attach(self, model: FakeModel, processor: Any) -> Any:
        turn = next((method.period for method in self.methods.values()), 0)
        rows = [0, 0]

        def generate(*, seed: int, sample_ids: list[str], **kwargs: Any) -> torch.Tensor:
            rows[:] = [len(sample_ids), 10 if kwargs["max_new_tokens"] > 2 else 2]
            assert model.training is False
            return model.generate(turn=turn, **kwargs)

        def telemetry() -> list[dict[str, dict[str, float]]]:
            effect = {
                "rows_edited": 4.0 * bool(turn),
                "l1_change": 1.0 * bool(turn),
                "rejections": 0.0,
                "extra_forwards": 3.0,
                "seconds": 0.1,
            }
            bus = {"bus": {"attention_rows": 40.0, "forwards": 10.0, "tokens": float(rows[1])}}
            return [{**bus, **{key: dict(effect) for key in self.methods}} for _ in range(rows[0])]

        model.attached = getattr(model, "attached", 0) + 1
        try:
            yield SimpleNamespace(generate=generate, telemetry=telemetry)
        finally:
            model.attached -= 1


class FakeLoaded:
    def __init__(self, pause: float = 0.0) -> None:
        self.model = FakeModel(pause).eval()
        self.facts = FACTS
        self.processor = SimpleNamespace(
            decode=lambda tokens, skip_special_tokens: " ".join(WORDS[t] for t in tokens if t > END).replace(" .", ".")
        )

    def inputs(self, prompts: list[str], images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        rows = [
            [sum(prompt.encode()), *picture[0].getpixel((0, 0))]
            for prompt, picture in zip(prompts, images, strict=True)
        ]
        return {"input_ids": torch.tensor(rows)}


def install(setter: Any, loaded: FakeLoaded) -> list[str]:
    """Put the fakes in place of model loading and stack; ``setter(object, name, value)``. Returns the list of loads."""
    loads: list[str] = []

    def load_model(path: str, **kwargs: Any) -> FakeLoaded:
        loads.append(path)
        return loaded

    setter(mitigate.adapters, "load_model", load_model)
    setter(mitigate.core.stack, "Stack", FakeStack)
    return loads


def resolved(
    stack: str = "none", *, methods: dict[str, Method] | None = None, images: int = 6, **changes: Any
) -> ResolvedRun:
    """Return a run of the fake benchmark; ``changes`` are dotted keys with ``__`` for the dot."""
    methods = methods if methods is not None else ({} if stack == "none" else {"turn": FakeMethod()})
    config: dict[str, Any] = {
        "model": {
            "name": "fake",
            "path": "testbed",
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "revision": None,
            "trust_remote_code": False,
        },
        "methods": {key: {"name": method.name, **method.params()} for key, method in methods.items()},
        "benchmark": {"name": "fake", "limit": images},
        "decoding": {
            "max_new_tokens": 12,
            "do_sample": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "num_beams": 1,
            "repetition_penalty": 1.0,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "batch_size": 4,
            "num_workers": 0,
        },
        "tracker": {"name": "none", "mode": "offline", "project": "p", "entity": None, "tags": []},
        "stack": stack,
        "stacks": [],
        "seed": 0,
        "on_error": "stop",
        "runs_dir": "runs",
        "name": None,
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return ResolvedRun(
        config=config,
        methods=methods,
        benchmark=FakeBenchmark(limit=images),
        facts=FACTS,
        provenance={f"methods.{key}.period": "default" for key in methods},
        stack_name=stack,
    )


def main(directory: str, pause: str) -> None:
    """Compare slowly, so that a test can kill the process in the middle."""
    from rich.console import Console

    from mitigate.runner import compare

    install(setattr, FakeLoaded(float(pause)))
    compare([resolved(), resolved("turned")], Path(directory), console=Console(quiet=True))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
