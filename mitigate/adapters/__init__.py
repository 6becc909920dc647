"""Model families (``model_type`` -> adapter) and loading of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mitigate.adapters.loading import LoadedModel as LoadedModel
    from mitigate.adapters.loading import adapter_for as adapter_for
    from mitigate.adapters.loading import load_model as load_model

#: The first one is the family on which methods are checked unless another is asked for.
BUILTIN = {
    "llava": "mitigate.adapters.llava:LlavaAdapter",
    "vipllava": "mitigate.adapters.llava:VipLlavaAdapter",
    "llava_next": "mitigate.adapters.llava_next:LlavaNextAdapter",
    "llava_next_video": "mitigate.adapters.llava_next:LlavaNextVideoAdapter",
    "llava_onevision": "mitigate.adapters.llava_onevision:LlavaOnevisionAdapter",
    "qwen2_vl": "mitigate.adapters.qwen_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "mitigate.adapters.qwen_vl:Qwen2_5VLAdapter",
    "qwen3_vl": "mitigate.adapters.qwen_vl:Qwen3VLAdapter",
    "qwen3_vl_moe": "mitigate.adapters.qwen_vl:Qwen3VLMoeAdapter",
    "internvl": "mitigate.adapters.internvl:InternVLAdapter",
    "chameleon": "mitigate.adapters.chameleon:ChameleonAdapter",
    "instructblip": "mitigate.adapters.instructblip:InstructBlipAdapter",
    "idefics3": "mitigate.adapters.idefics3:Idefics3Adapter",
    "smolvlm": "mitigate.adapters.idefics3:SmolVLMAdapter",
    "paligemma": "mitigate.adapters.paligemma:PaliGemmaAdapter",
    "gemma3": "mitigate.adapters.gemma3:Gemma3Adapter",
    "video_llava": "mitigate.adapters.video_llava:VideoLlavaAdapter",
}
__all__ = ["BUILTIN", "LoadedModel", "adapter_for", "load_model"]


def __getattr__(name: str) -> object:
    """Import the loading code, and with it transformers, on first use."""
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("mitigate.adapters.loading"), name)
    raise AttributeError(f"module 'mitigate.adapters' has no attribute {name!r}")
