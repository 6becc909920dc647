"""Measure what each stack costs over plain ``model.generate``: paired, interleaved, median of ratios.

Two models: the packaged testbed, and a randomly initialised LLaVA of 8 layers and width 1024 with a prompt of 600
tokens. Ratios of times measured in one run are comparable; the milliseconds are those of the machine at hand.

    python scripts/benchmark_overhead.py                        # print the tables
    python scripts/benchmark_overhead.py --write docs/performance.md
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from sections import write_section

from mitigate import Stack, load_model
from mitigate.core.method import Method
from mitigate.registry import methods

STACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "empty stack": [],
    "locore": [("locore", {})],
    "locore (logit_bias)": [("locore", {"mode": "logit_bias"})],
    "scr": [("scr", {})],
    "dleaf": [("dleaf", {})],
    "clva": [("clva", {})],
    "sgrs": [("sgrs", {})],
    "sgrs (deep layers)": [("sgrs", {"layers": "0.75-0.875"})],
    "sgrs (direct gradient)": [("sgrs", {"gradient": "direct"})],
    "sgrs+locore": [("sgrs", {}), ("locore", {})],
    "all five": [("scr", {}), ("clva", {}), ("dleaf", {}), ("locore", {}), ("sgrs", {})],
}


def build(parts: list[tuple[str, dict[str, Any]]]) -> Stack:
    """Build a stack from registered names and parameters."""
    instances: list[Method] = [methods().get(name)(**values) for name, values in parts]
    return Stack(instances)


def testbed(batch: int) -> tuple[Any, dict[str, torch.Tensor], str]:
    """Return the packaged model with a batch of its test pictures."""
    from mitigate.testbed.draw import draw
    from mitigate.testbed.language import CAPTION_PROMPT
    from mitigate.testbed.world import scene

    loaded = load_model("testbed")
    pictures = [[draw(scene("test", index))] for index in range(batch)]
    inputs = loaded.inputs([CAPTION_PROMPT] * batch, pictures)
    loaded.model.generation_config.eos_token_id = None  # every stack writes the same number of tokens
    return loaded.model, dict(inputs), f"testbed, batch {batch}, prompt of {inputs['input_ids'].shape[1]} tokens"


def wide(batch: int) -> tuple[Any, dict[str, torch.Tensor], str]:
    """Return a random LLaVA of 8 layers, width 1024, 16 heads, and prompts of 600 tokens (576 of them image)."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=8,
        num_attention_heads=16,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    ).eval()
    ids = torch.randint(10, 2000, (batch, 600))
    ids[:, 4:580] = 1
    pixels = torch.randn(batch, 3, 336, 336)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, inputs, f"random LLaVA, 8 layers, width 1024, batch {batch}, prompt of 600 tokens"


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(model: Any, inputs: dict[str, torch.Tensor], tokens: int, rounds: int, title: str) -> list[str]:
    """Return a Markdown table: per stack the median of (stack / plain) over interleaved pairs."""
    kwargs: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    names = list(STACKS)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    plains: list[float] = []
    model.generate(**inputs, **kwargs)
    for _ in track(range(rounds), description=title[:40], console=Console(stderr=True)):
        for name in names:
            plain = seconds(lambda: model.generate(**inputs, **kwargs))
            with build(STACKS[name]).attach(model) as handle:
                own = seconds(lambda: handle.generate(**inputs, **kwargs))
            plains.append(plain)
            ratios[name].append(own / plain)
    rows = [
        f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |"
        for name, values in ratios.items()
    ]
    per_token = statistics.median(plains) / (tokens * inputs["input_ids"].shape[0]) * 1e3
    return [
        f"### {title}",
        "",
        f"{tokens} new tokens, {rounds} pairs; plain `generate`: {per_token:.2f} ms per token (prefill included).",
        "",
        "| stack | median ratio to plain `generate` | range |",
        "|---|---|---|",
        *rows,
        "",
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="pairs per stack (default 7)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per sample (default 32)")
    parser.add_argument("--only", choices=("testbed", "wide"), help="measure one model only")
    parser.add_argument("--write", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    cases = {"testbed": lambda: (testbed(1), testbed(16)), "wide": lambda: (wide(1),)}
    lines: list[str] = []
    for name, make in cases.items():
        if options.only in (None, name):
            for model, inputs, title in make():
                lines += measure(model, inputs, options.tokens, options.rounds, title)
    print("\n".join(lines))
    if options.write:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, CPU"
        head = [
            "## Time over plain generation",
            "",
            "Made by `python scripts/benchmark_overhead.py --write docs/performance.md`"
            f" (torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, {machine}).",
            "Each ratio pairs a stack with plain `model.generate` measured just before it, in the same process.",
            "",
        ]
        write_section(options.write, "overhead", [*head, *lines])


if __name__ == "__main__":
    main()
