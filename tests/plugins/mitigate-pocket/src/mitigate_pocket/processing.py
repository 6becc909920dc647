"""Pocket-VL's processor: square pixels, and placeholders between two marks."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from mitigate_pocket.modeling import PocketConfig

IMAGE, BEGIN, END = "<ImageHere>", "<Img>", "</Img>"


class PocketProcessor(ProcessorMixin):
    """Writes ``<Img>``, a placeholder for every query, and ``</Img>`` for a picture."""

    image_token = IMAGE

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: str | None = None, queries: int = 6
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.queries = queries

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return what stands for one picture; transformers puts it in place of ``image_token``."""
        return BEGIN + IMAGE * self.queries + END


AutoProcessor.register(PocketConfig, PocketProcessor)
