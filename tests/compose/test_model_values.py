"""Values per model: the papers' tables, written down here by hand, against what a run is composed with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mitigate.compose import ResolvedRun, compose_run
from mitigate.core import parse_layers
from mitigate.registry import adapters, methods

FOLDER = Path(__file__).parents[2] / "conf" / "model"
MODELS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAPER, CODE, OURS = "paper", "official code", "not in the paper"

#: model -> method -> parameter -> (value, where it is from); OURS for what a paper leaves open.
#: sgrs, locore: arXiv 2601.20279, experiments and Table 3; scr: arXiv 2602.22469 v1, implementation details.
TABLE: dict[str, dict[str, dict[str, tuple[Any, str]]]] = {
    "llava-1.5-7b": {
        "locore": {"beta": (0.15, PAPER), "window": (5, OURS), "layers": ("all", PAPER)},
        "sgrs": {"alpha": (0.6, PAPER), "top_k": (5, CODE), "max_resample": (3, CODE), "window": (5, CODE)},
        "scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)},
    },
    "llava-1.5-13b": {
        "locore": {"beta": (0.15, OURS), "window": (5, OURS)},
        "sgrs": {"alpha": (0.6, OURS), "top_k": (5, OURS), "max_resample": (3, OURS), "window": (5, OURS)},
        "scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)},
    },
    "qwen2-vl-7b": {
        "locore": {"beta": (0.2, PAPER), "window": (5, OURS), "layers": ("all", PAPER)},
        "sgrs": {"alpha": (0.6, PAPER), "top_k": (5, OURS), "max_resample": (3, OURS), "window": (5, OURS)},
        "scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)},
    },
    "chameleon-7b": {"scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)}},
    "chameleon-30b": {"scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)}},
    "qwen-vl-7b": {"scr": {"lam": (1.1, PAPER), "k_src": (32, PAPER)}},
    "qwen2.5-vl-7b": {"locore": {"beta": (0.15, OURS)}, "sgrs": {"alpha": (0.6, OURS)}},
    "qwen2.5-vl-32b": {"locore": {"beta": (0.15, OURS)}},
    "internvl-7b": {"locore": {"beta": (0.15, OURS)}, "sgrs": {"alpha": (0.6, OURS)}},
    "internvl-13b": {"locore": {"beta": (0.15, OURS)}, "sgrs": {"alpha": (0.6, OURS)}},
    "internvl2-8b": {"scr": {"lam": (1.1, PAPER), "k_src": (32, OURS)}},
    "video-llava-7b": {"locore": {"beta": (0.15, OURS)}},
}
#: model -> (depth, method, parameter) -> (first layer, last layer, where it is from)
LAYERS = {
    ("llava-1.5-7b", 32, "scr", "layers"): (0, 11, PAPER),
    ("llava-1.5-13b", 40, "scr", "layers"): (0, 11, PAPER),
    ("qwen2-vl-7b", 28, "scr", "layers"): (0, 15, PAPER),
    ("chameleon-7b", 32, "scr", "layers"): (0, 15, PAPER),
    ("chameleon-30b", 48, "scr", "layers"): (0, 20, PAPER),
    ("qwen-vl-7b", 32, "scr", "layers"): (0, 15, PAPER),
    ("llava-1.5-7b", 32, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("llava-1.5-13b", 40, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("qwen2-vl-7b", 28, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("chameleon-7b", 32, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("chameleon-30b", 48, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("qwen-vl-7b", 32, "scr", "diagnostic_layers"): (8, 16, PAPER),
    ("internvl2-8b", 32, "scr", "diagnostic_layers"): (8, 16, OURS),
    ("llava-1.5-7b", 32, "sgrs", "layers"): (6, 8, CODE),
    ("llava-1.5-13b", 40, "sgrs", "layers"): (6, 8, OURS),
    ("qwen2-vl-7b", 28, "sgrs", "layers"): (5, 7, OURS),
    ("qwen2.5-vl-7b", 28, "sgrs", "layers"): (5, 7, OURS),
    ("internvl-7b", 32, "sgrs", "layers"): (6, 8, OURS),
}
#: transformers' model_type, blocks, heads, key/value heads; None where nothing could be verified.
GEOMETRY = {
    "llava-1.5-7b": ("llava", 32, 32, 32),
    "llava-1.5-13b": ("llava", 40, 40, 40),
    "qwen2-vl-7b": ("qwen2_vl", 28, 28, 4),
    "qwen2.5-vl-7b": ("qwen2_5_vl", 28, 28, 4),
    "qwen2.5-vl-32b": ("qwen2_5_vl", 64, 40, 8),
    "internvl-7b": ("internvl", 32, 32, 8),
    "internvl-13b": ("internvl", 48, 40, 8),
    "internvl2-8b": ("internvl", 32, 32, 8),
    "chameleon-7b": ("chameleon", 32, 32, 32),
    "chameleon-30b": ("chameleon", 48, None, None),
    "qwen-vl-7b": ("qwen", 32, 32, 32),
    "video-llava-7b": ("video_llava", 32, 32, 32),
    # current checkpoints, which no paper here evaluates: the geometry of their decoders
    "gemma3-12b": ("gemma3", 48, 16, 8),
    "gemma3-27b": ("gemma3", 62, 32, 16),
    "gemma3-4b": ("gemma3", 34, 8, 4),
    "idefics3-8b": ("idefics3", 32, 32, 8),
    "instructblip-vicuna-7b": ("instructblip", 32, 32, 32),
    "internvl3-14b": ("internvl", 48, 40, 8),
    "internvl3-1b": ("internvl", 24, 14, 2),
    "internvl3-2b": ("internvl", 28, 12, 2),
    "internvl3-38b": ("internvl", 64, 40, 8),
    "internvl3-8b": ("internvl", 28, 28, 4),
    "llava-next-llama3-8b": ("llava_next", 32, 32, 8),
    "llava-next-mistral-7b": ("llava_next", 32, 32, 8),
    "llava-next-vicuna-13b": ("llava_next", 40, 40, 40),
    "llava-next-vicuna-7b": ("llava_next", 32, 32, 32),
    "llava-onevision-0.5b": ("llava_onevision", 24, 14, 2),
    "llava-onevision-7b": ("llava_onevision", 28, 28, 4),
    "paligemma2-10b": ("paligemma", 42, 16, 8),
    "paligemma2-3b": ("paligemma", 26, 8, 4),
    "qwen2.5-vl-3b": ("qwen2_5_vl", 36, 16, 2),
    "qwen2.5-vl-72b": ("qwen2_5_vl", 80, 64, 8),
    "qwen3-vl-2b": ("qwen3_vl", 28, 16, 8),
    "qwen3-vl-32b": ("qwen3_vl", 64, 64, 8),
    "qwen3-vl-4b": ("qwen3_vl", 36, 32, 8),
    "qwen3-vl-8b": ("qwen3_vl", 36, 32, 8),
    "smolvlm2-2.2b": ("smolvlm", 24, 32, 32),
    "smolvlm2-256m": ("smolvlm", 30, 9, 3),
    "smolvlm2-500m": ("smolvlm", 32, 15, 5),
}
CASES = [
    (model, method, parameter, value, source)
    for model, parts in TABLE.items()
    for method, values in parts.items()
    for parameter, (value, source) in values.items()
]


@cache
def composed(model: str) -> ResolvedRun:
    return compose_run([f"model={model}", "methods=[locore,scr,sgrs]"])


@pytest.mark.parametrize(("model", "method", "parameter", "value", "source"), CASES)
def test_published_values(model: str, method: str, parameter: str, value: Any, source: str) -> None:
    run = composed(model)
    assert getattr(run.methods[method], parameter) == value
    origin = run.provenance[f"methods.{method}.{parameter}"]
    assert origin in ("default", f"model {model}")
    if source is OURS:  # what no paper says for this model must not look as if this model had been tuned
        assert origin == "default"


@pytest.mark.parametrize(("place", "expected"), LAYERS.items(), ids=lambda item: " ".join(map(str, item)))
def test_published_layers(place: tuple[str, int, str, str], expected: tuple[int, int, str]) -> None:
    model, depth, method, parameter = place
    first, last, _ = expected
    run = composed(model)
    assert run.config["model"]["layers"] == depth
    assert parse_layers(getattr(run.methods[method], parameter), depth) == tuple(range(first, last + 1))


def test_scr_without_a_table_takes_its_share_of_the_depth() -> None:
    run = compose_run(["model=internvl2-8b", "methods=[scr]"])
    assert run.facts is not None
    edited = next(item for item in run.methods["scr"].subscriptions(run.facts) if item.point == "hidden_states")
    assert edited.layers == tuple(range(12))


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("hf", "testbed")])
def test_geometry(model: str) -> None:
    values = yaml.safe_load((FOLDER / f"{model}.yaml").read_text(encoding="utf-8"))
    assert tuple(values.get(key) for key in ("family", "layers", "heads", "kv_heads")) == GEOMETRY[model]
    assert values["name"] == model


@pytest.mark.parametrize("model", MODELS)
def test_layer_ranges_fit_the_depth(model: str) -> None:
    """A file's own depth decides; every layer range of its tuned values must be inside."""
    values = yaml.safe_load((FOLDER / f"{model}.yaml").read_text(encoding="utf-8")) or {}
    for method, tuned in values.get("tuned", {}).items():
        assert method in methods().names()
        for parameter, text in tuned.items():
            if "layers" in parameter and "layers" in values:
                assert parse_layers(text, values["layers"])


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("hf", "testbed")])
def test_every_tuned_value_names_its_source(model: str) -> None:
    lines = (FOLDER / f"{model}.yaml").read_text(encoding="utf-8").splitlines()
    if "tuned:" not in lines:
        assert any("no values for it" in line or "not from the paper" in line for line in lines)
        return
    for line in lines[lines.index("tuned:") + 1 :]:
        if line.startswith("    ") and not line.strip().startswith("#"):
            comment = line.partition("#")[2]
            assert any(word in comment for word in ("arXiv 2", "not in the paper", "official code")), line


def test_families_without_an_adapter_can_be_planned() -> None:
    served = adapters().names()
    assert "llava" in served
    unserved = [name for name, (family, *_) in GEOMETRY.items() if family not in served]
    for model in unserved:
        run = compose_run([f"model={model}", "methods=[locore,sgrs]"])
        assert list(run.methods) == ["locore", "sgrs"]
