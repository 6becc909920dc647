"""Typed shape of a run's configuration: what Hydra composes and what a record stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """A checkpoint and how to load it.

    Parameters
    ----------
    name
        Registered name (the file's name in ``conf/model``).
    path
        Hub id or local folder; ``testbed`` is the model packaged with the project.
    revision
        Commit, branch or tag of the hub's repository; ``None``: the newest. A record keeps the commit that was loaded.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    attn_implementation
        transformers' attention implementation (``sdpa``).
    trust_remote_code
        Run code shipped with the checkpoint; only when the user asks by name.
    device_map
        ``auto``, ``balanced``, ``sequential`` or a mapping {part: device}: the model is divided over the GPUs, the
        CPU's memory and the disk. ``None``: whole on one device.
    max_memory
        With a device map: device -> its share (``{0: 20GB, cpu: 60GB}``).
    offload_folder
        With a device map: folder for what goes to disk.
    quantization
        ``int8`` (torchao), ``bnb-8bit`` or ``bnb-4bit`` (bitsandbytes); ``None``: weights as in ``dtype``.
    chat_template
        Text of a chat template or path of a ``.jinja`` file; ``None``: the processor's own.
    layers, heads, kv_heads, family, spatial_grid
        Geometry, so that a stack can be planned before the weights are there; checked against the model when loaded.
        ``None``: read from the checkpoint's ``config.json``.
    tuned
        Method name -> parameter -> value tuned for this model; ranks above the method's default, below a stack preset.
    """

    name: str = "testbed"
    path: str = "testbed"
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    device_map: Any = None
    max_memory: Any = None
    offload_folder: str | None = None
    quantization: str | None = None
    chat_template: str | None = None
    family: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    spatial_grid: bool = True
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class DecodingConfig:
    """Arguments of ``generate`` (transformers' names).

    Parameters
    ----------
    max_new_tokens
        Longest caption; yes/no questions end earlier by themselves.
    do_sample, temperature, top_p, top_k, num_beams, repetition_penalty
        As in ``transformers.GenerationConfig``.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0


@dataclass
class TrainerConfig:
    """Arguments of Lightning's ``Trainer`` plus the batch size.

    Parameters
    ----------
    accelerator, devices, num_nodes, strategy
        As in ``pytorch_lightning.Trainer``.
    batch_size
        Samples per forward.
    num_workers
        Worker processes that prepare pictures and prompts.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    batch_size: int = 32
    num_workers: int = 0


@dataclass
class TrackerConfig:
    """Where a run is logged besides its own record.

    Parameters
    ----------
    name
        ``none`` or ``wandb``.
    mode
        W&B mode; ``None`` leaves it to the user's own settings.
    project, entity, tags
        As in ``wandb.init``.
    """

    name: str = "wandb"
    mode: str | None = "offline"
    project: str = "mitigate"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One run: a model, an ordered stack of methods, a benchmark.

    Parameters
    ----------
    methods
        Ordered: key -> the method's parameters (with ``name``, its registered name).
    benchmark
        The benchmark's parameters (with ``name``).
    stack
        Name of the preset in ``conf/stack`` or ``None``.
    stacks
        Only for ``mitigate compare``: presets, or method names joined by ``+``.
    seed
        Seed of every random draw (sampling, stochastic methods, bootstrap).
    on_error
        What a sample that fails does: ``stop`` ends the run, ``skip`` records the failure and goes on; either way the
        same command tries failed samples again.
    runs_dir
        Folder under which records are written.
    name
        Name of the run or comparison folder; ``None`` derives it from the configuration.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    methods: dict[str, Any] = field(default_factory=dict)
    benchmark: Any = None
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    stack: str | None = None
    stacks: list[str] = field(default_factory=list)
    seed: int = 0
    on_error: str = "stop"
    runs_dir: str = "runs"
    name: str | None = None
