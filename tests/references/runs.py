"""Running the code under test next to the references."""

from __future__ import annotations

from typing import Any

from mitigate.core.stack import Stack
from tests.references.tiny import PAD, make_inputs, tiny_llava


def warm_model() -> Any:
    """Return a tiny random LLaVA with grouped-query attention whose own capture hooks are already installed."""
    model = tiny_llava(seed=0).eval()
    model.generate(**make_inputs(model, [(3, 1, 4)]), max_new_tokens=1, pad_token_id=PAD)
    return model


def generate(model: Any, methods: Any, inputs: dict[str, Any], steps: int, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Generate greedily with a stack; return transformers' output with raw logits, and the telemetry."""
    with Stack(methods).attach(model) as handle:
        out = handle.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )
        return out, handle.telemetry()
