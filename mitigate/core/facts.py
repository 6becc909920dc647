"""What a stack must know about a model before it is loaded: depth, heads, spatial grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Geometry of a model's text decoder, as far as planning a stack needs it.

    Parameters
    ----------
    family
        transformers' ``model_type`` of the whole model (``"llava"``).
    layers, heads, kv_heads
        Decoder blocks, query heads and key/value heads.
    spatial_grid
        Whether image tokens form a raster (rows x columns).
    vision_layers
        Blocks of the vision tower; ``None`` if not known (yet).
    causal_prompt
        Whether prompt tokens see only what precedes them.
    attention_layers
        Decoder blocks whose attention has intervention points; ``None``: all of them.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    spatial_grid: bool = True
    vision_layers: int | None = None
    causal_prompt: bool = True
    attention_layers: tuple[int, ...] | None = None
