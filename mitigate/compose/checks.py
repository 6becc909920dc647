"""Combinations that cannot be right although every single value is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mitigate.core.facts import ModelFacts
from mitigate.core.method import Method
from mitigate.core.plan import plan_stack
from mitigate.errors import ConfigError, StackConflict, UnsupportedModel
from mitigate.registry import adapters, suggestion, trackers

_DTYPES = ("float32", "bfloat16", "float16")
#: Lightning's names for what this project runs on; whether the machine has it is seen when a run starts.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_QUANTIZATIONS = ("int8", "bnb-8bit", "bnb-4bit")
_DEVICE_MAPS = ("auto", "balanced", "sequential")
_STRATEGIES = ("auto", "ddp")
_SEEDS = 2**32
_ON_ERROR = ("stop", "skip")
_SAMPLING_ONLY = ("temperature", "top_p", "top_k")
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def check_values_in_range(config: Mapping[str, Any]) -> None:
    """Check the numbers and names of every section.

    Raises
    ------
    ConfigError
        Naming the key, its value and what it must be.
    """
    decoding, trainer, model, tracker = (config[key] for key in ("decoding", "trainer", "model", "tracker"))
    rules = [
        (decoding["max_new_tokens"] >= 1, "decoding.max_new_tokens", "be at least 1"),
        (decoding["num_beams"] >= 1, "decoding.num_beams", "be at least 1"),
        (decoding["temperature"] > 0, "decoding.temperature", "be above 0; decoding=greedy takes the likeliest token"),
        (0 < decoding["top_p"] <= 1, "decoding.top_p", "be above 0 and at most 1"),
        (decoding["top_k"] >= 0, "decoding.top_k", "be 0 (off) or more"),
        (decoding["repetition_penalty"] > 0, "decoding.repetition_penalty", "be above 0 (1 is off)"),
        (trainer["batch_size"] >= 1, "trainer.batch_size", "be at least 1"),
        (trainer["num_workers"] >= 0, "trainer.num_workers", "be 0 or more"),
        (trainer["devices"] >= 1 or trainer["devices"] == -1, "trainer.devices", "be at least 1, or -1 for all"),
        (
            trainer["devices"] != -1 or trainer["accelerator"] != "cpu",
            "trainer.devices",
            "be at least 1 with trainer.accelerator=cpu",
        ),
        (trainer["num_nodes"] >= 1, "trainer.num_nodes", "be at least 1"),
        *_model_rules(model, trainer),
        (trainer["accelerator"] in ACCELERATORS, "trainer.accelerator", "be one of " + ", ".join(ACCELERATORS)),
        (trainer["strategy"] in _STRATEGIES, "trainer.strategy", "be auto, or ddp for one process per device"),
        (0 <= config["seed"] < _SEEDS, "seed", f"be at least 0 and below 2**32 ({_SEEDS})"),
        (config["on_error"] in _ON_ERROR, "on_error", "be one of " + ", ".join(_ON_ERROR)),
        (config["name"] is None or _is_folder_name(config["name"]), "name", "be a plain folder name, without / or .."),
    ]
    for holds, key, must in rules:
        if not holds:
            value: Any = config
            for part in key.split("."):
                value = value[part]
            raise ConfigError(f"{key}={value} must {must}")
    if model["path"] == "testbed" and model["revision"] is not None:
        raise ConfigError(
            f"model.revision={model['revision']} has no effect: the testbed ships with this package; "
            f"drop it, or name a hub checkpoint with model=hf model.path=..."
        )
    _check_tracker(tracker)
    if not decoding["do_sample"]:
        for key in _SAMPLING_ONLY:
            if decoding[key] != _NEUTRAL[key]:
                raise ConfigError(
                    f"decoding.{key}={decoding[key]} has no effect without sampling; "
                    f"add decoding=sample or drop decoding.{key}"
                )


def _model_rules(model: Mapping[str, Any], trainer: Mapping[str, Any]) -> list[tuple[bool, str, str]]:
    """Return what holds of a model section: condition, key, and what the key must be or do."""
    divided = model["device_map"] is not None
    known = isinstance(model["device_map"], Mapping) or model["device_map"] in (None, *_DEVICE_MAPS)
    rules = [
        (bool(model["path"]), "model.path", "name a checkpoint: a hub id or a folder"),
        (model["dtype"] in _DTYPES, "model.dtype", "be one of " + ", ".join(_DTYPES)),
        (
            model["quantization"] in (None, *_QUANTIZATIONS),
            "model.quantization",
            "be null or one of " + ", ".join(_QUANTIZATIONS),
        ),
        (known, "model.device_map", f"be null, {', '.join(_DEVICE_MAPS)}, or a mapping {{PART: DEVICE}}"),
        (
            not divided or (trainer["devices"], trainer["num_nodes"]) == (1, 1),
            "trainer.devices",
            "be 1, on one node: model.device_map divides the model over all GPUs already",
        ),
    ]
    alone = "be left out, or stand beside a model.device_map such as auto"
    limits = model["max_memory"]
    rules += [(limits is None or isinstance(limits, Mapping), "model.max_memory", "be a mapping {DEVICE: MEMORY}")]
    rules += [(divided or model[key] is None, f"model.{key}", alone) for key in ("max_memory", "offload_folder")]
    return rules


def _check_tracker(tracker: Mapping[str, Any]) -> None:
    if tracker["name"] not in trackers().names():
        raise ConfigError(f"tracker.name={tracker['name']} is unknown{suggestion(tracker['name'], trackers().names())}")
    modes = trackers().get(tracker["name"]).modes
    if modes and tracker["mode"] is not None and tracker["mode"] not in modes:
        raise ConfigError(
            f"tracker.mode={tracker['mode']} must be one of {', '.join(modes)}, or null for your own settings"
        )


def _is_folder_name(name: str) -> bool:
    return bool(name.strip()) and "/" not in name and "\\" not in name and not name.startswith(".")


def check_served(config: Mapping[str, Any], facts: ModelFacts | None) -> str | None:
    """Refuse to run a model of a family nobody brings an adapter for; planning one needs none. Imports no adapter.

    Parameters
    ----------
    config
        The complete configuration.
    facts
        The model's geometry; without it, and without ``model.family``, the family is seen when the model is loaded.

    Returns
    -------
    str or None
        The family, as far as it is known.

    Raises
    ------
    UnsupportedModel
        Naming the families that are served.
    """
    family: str | None = config["model"]["family"] if facts is None else facts.family
    served = adapters().names()
    if family is not None and family not in served and not _may_be_served(family):
        if _is_known(family):
            raise UnsupportedModel(
                f"model={config['model']['name']} is of family {family}, which transformers does not load as a model "
                "of pictures and text (a text model?)\nset model.path to an image-text-to-text checkpoint"
            )
        raise UnsupportedModel(
            f"model={config['model']['name']} is of family {family}, which cannot be run yet (`mitigate plan` works); "
            f"served: {', '.join(served)}. An outside package can bring an adapter (entry-point group mitigate.models)"
        )
    return family


def _may_be_served(family: str) -> bool:
    """Whether transformers has the family: then the generic adapter looks at the model once it is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _is_known(family: str) -> bool:
    """Whether transformers has the family, as a model of whatever kind."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return family in CONFIG_MAPPING_NAMES


def check_family(config: Mapping[str, Any], facts: ModelFacts | None) -> None:
    """Refuse what `check_served` refuses, and a family whose adapter cannot be used: it is imported before weights are.

    Raises
    ------
    UnsupportedModel
        Naming the families that are served.
    PluginError, DuplicateName
        If the family's adapter cannot be used.
    """
    family = check_served(config, facts)
    if family in adapters().names():
        adapters().get(family)


def check_stack(methods: Mapping[str, Method], facts: ModelFacts | None, config: Mapping[str, Any]) -> None:
    """Check that the methods fit together, the model and the way of decoding.

    Raises
    ------
    ConfigError
        If a method refuses the model.
    StackConflict
        If two methods exclude each other, or a method that chooses tokens meets beam search.
    UnsupportedModel
        If the model cannot serve a method.
    """
    decoding = config["decoding"]
    for method in methods.values():
        method.check_model(str(config["model"]["path"]), facts)
    if facts is not None:
        plan_stack(methods, facts)
    choosing = [key for key, method in methods.items() if method.tags.selects_token or method.tags.owns_loop]
    if decoding["num_beams"] > 1 and choosing:
        raise StackConflict(
            f"{choosing[0]} chooses each token itself and cannot follow decoding.num_beams={decoding['num_beams']}; "
            f"use decoding.num_beams=1 or take {choosing[0]} out"
        )
