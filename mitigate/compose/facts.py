"""The model's geometry from its configuration, without loading transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mitigate.core.facts import ModelFacts
from mitigate.errors import ConfigError


def facts_of(model: Mapping[str, Any]) -> ModelFacts | None:
    """Return what the ``model`` section or the checkpoint's ``config.json`` says about the decoder.

    Parameters
    ----------
    model
        The section as plain values.

    Returns
    -------
    ModelFacts or None
        ``None`` if neither says enough; the plan is then checked when the model is loaded.

    Raises
    ------
    ConfigError
        If a local checkpoint's ``config.json`` cannot be read.
    """
    known = {key: model[key] for key in ("family", "layers", "heads", "kv_heads")}
    if any(value is None for value in known.values()):
        read = _read_geometry(str(model["path"]))
        known = {key: read.get(key) if value is None else value for key, value in known.items()}
    if any(value is None for value in known.values()):
        return None
    return ModelFacts(**known, spatial_grid=bool(model["spatial_grid"]))


def _read_geometry(path: str) -> dict[str, Any]:
    folder = resources.files("mitigate") / "testbed" / "checkpoint" if path == "testbed" else Path(path)
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        heads = text.get("num_attention_heads")
        numbers = {
            "layers": text.get("num_hidden_layers"),
            "heads": heads,
            "kv_heads": text.get("num_key_value_heads") or heads,
        }
        if wrong := [f"{key} is {value!r}" for key, value in numbers.items() if not isinstance(value, int | None)]:
            raise ValueError(wrong[0])
        return {"family": config.get("model_type"), **numbers}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is no model configuration ({error}); point model.path at a checkpoint") from error
