"""Measure tokens per second and peak memory of every stack against plain ``model.generate``, on real geometries.

Models have the shapes of the checkpoints and random weights, so nothing is downloaded and answers mean nothing. Every
stack is measured right after plain ``generate``, in one process, and is given as a ratio to it.

    python scripts/benchmark_models.py memory --write docs/performance.md    # a 4,000-token prompt, on the CPU
    python scripts/benchmark_models.py llava-1.5-7b llava-1.5-13b qwen2-vl-7b --device cuda --write docs/performance.md

Peak memory is what torch's allocator held at most on a GPU, and the highest resident memory of the process on a CPU
(Linux only); both include the weights. *Working memory* leaves out what was held before the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_overhead import STACKS, build
from rich.console import Console
from rich.progress import track
from sections import write_section

IMAGE, PAD = 1, 0
#: Of glibc's malloc.h: larger blocks are mapped one by one.
M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Shape:
    """Geometry of a checkpoint.

    Parameters
    ----------
    family
        ``llava`` or ``qwen2_vl``.
    layers, width, heads, kv_heads, mlp, vocabulary
        Of the text decoder.
    vision_layers, vision_width, vision_heads
        Of the vision tower.
    text
        Prompt tokens beside the picture's.
    dtype
        Of the weights.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    text: int = 40
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "llava-1.5-7b": Shape("llava", 32, 4096, 32, 32, 11008, 32064, 24, 1024, 16),
    "llava-1.5-13b": Shape("llava", 40, 5120, 40, 40, 13824, 32064, 24, 1024, 16),
    "qwen2-vl-7b": Shape("qwen2_vl", 28, 3584, 28, 4, 18944, 152064, 32, 1280, 16),
    "memory": Shape("llava", 6, 512, 8, 8, 1376, 2000, 2, 256, 4, text=4000 - 576, dtype=torch.float32),
    "small-qwen2-vl": Shape("qwen2_vl", 4, 256, 8, 2, 512, 2000, 2, 128, 4, dtype=torch.float32),
}


def model_of(shape: Shape, device: str) -> Any:
    """Build the model on the device, with random weights of the size training leaves."""
    text: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: Any
    if shape.family == "llava":
        vision = transformers.CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=336,
            patch_size=14,
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=IMAGE
        )
        kind: Any = transformers.LlavaForConditionalGeneration
    else:
        width = shape.width // shape.heads
        rope = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // 8, width * 3 // 16, width * 3 // 16],
        }
        config = transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={
                "depth": shape.vision_layers,
                "embed_dim": shape.vision_width,
                "num_heads": shape.vision_heads,
                "hidden_size": shape.width,
            },
            image_token_id=IMAGE,
            video_token_id=2,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
        kind = transformers.Qwen2VLForConditionalGeneration
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # every stack writes the same number of tokens
    return model.eval()


def inputs_of(shape: Shape, batch: int, device: str) -> dict[str, torch.Tensor]:
    """Make prompts with one picture each, about 336 x 336."""
    torch.manual_seed(1)
    patches = 576 if shape.family == "llava" else 144
    ids = torch.randint(10, 1000, (batch, patches + shape.text))
    ids[:, 5 : 5 + patches] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "llava":
        inputs["pixel_values"] = torch.randn(batch, 3, 336, 336, dtype=shape.dtype)
    else:
        inputs["pixel_values"] = torch.randn(batch * patches * 4, 3 * 2 * 14 * 14, dtype=shape.dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, 24, 24]] * batch)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {name: value.to(device) for name, value in inputs.items()}


class Memory:
    """Peak memory of a call, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if not self._cuda:  # what is freed goes back to the system at once: no call runs in another's leftovers
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)

    def measured(self, call: Callable[[], Any]) -> tuple[float, int, int]:
        """Run a call; return its seconds, the peak while it ran, and what was held before it."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
        before = self._held("VmRSS")
        started = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, self._held("VmHWM"), before

    def _held(self, what: str) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated() if what == "VmRSS" else torch.cuda.max_memory_allocated()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[what].split()[0]) * 1024


def measure(name: str, batch: int, options: argparse.Namespace) -> list[str]:
    """Return a Markdown table of one model and batch size."""
    shape, device = SHAPES[name], options.device
    model, inputs = model_of(shape, device), inputs_of(shape, batch, device)
    kwargs: dict[str, Any] = {"max_new_tokens": options.tokens, "do_sample": False, "pad_token_id": PAD}
    memory = Memory(device)
    model.generate(**inputs, **kwargs)
    found: dict[str, list[tuple[float, float, float]]] = {stack: [] for stack in STACKS}
    plains: list[tuple[float, int, int]] = []
    for _ in track(range(options.rounds), description=f"{name}, batch {batch}", console=Console(stderr=True)):
        for stack, parts in STACKS.items():
            plain = memory.measured(lambda: model.generate(**inputs, **kwargs))
            with build(parts).attach(model) as handle:
                own = memory.measured(lambda: handle.generate(**inputs, **kwargs))
            plains.append(plain)
            work = (own[1] - own[2]) / max(plain[1] - plain[2], 1)
            found[stack].append((plain[0] / own[0], own[1] / plain[1], work))
    tokens = batch * options.tokens
    seconds, peak = statistics.median(one[0] for one in plains), statistics.median(one[1] for one in plains)
    rows = [
        f"| {stack} | {tokens / seconds * speed:.1f} | {speed:.2f} | {total:.2f} | {work:.2f} |"
        for stack, values in found.items()
        for speed, total, work in [[statistics.median(column) for column in zip(*values, strict=True)]]
    ]
    length = inputs["input_ids"].shape[1]
    return [
        f"### {name} ({str(shape.dtype).removeprefix('torch.')}), batch {batch}, prompt of {length} tokens",
        "",
        f"{options.tokens} new tokens, {options.rounds} pairs; plain `generate`: {tokens / seconds:.1f} tokens/s"
        f" (prefill included), peak memory {peak / 2**30:.2f} GiB. Ratios are to plain `generate`.",
        "",
        "| stack | tokens/s | speed | peak memory | working memory |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", choices=list(SHAPES), help="geometry to build")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs per stack (default 3)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per sample (default 32)")
    parser.add_argument("--write", type=Path, help="also write the tables to their section of this Markdown file")
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.model:
        for batch in options.batch:
            lines += measure(name, batch, options)
    print("\n".join(lines))
    if options.write:
        cuda = options.device.startswith("cuda")
        machine = (
            torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU"
        )
        head = [
            f"## Speed and memory on {'a GPU' if cuda else 'the CPU'}",
            "",
            f"Made by `python scripts/benchmark_models.py {' '.join(options.model)} --device {options.device}"
            f" --batch {' '.join(map(str, options.batch))} --rounds {options.rounds} --tokens {options.tokens}"
            f" --write {options.write}`",
            f"(torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, {machine});"
            " random weights.",
            "*Working memory* is the peak less what was held before the call: weights and inputs.",
            "",
        ]
        write_section(options.write, f"{' '.join(options.model)} on {options.device}", [*head, *lines])


if __name__ == "__main__":
    main()
