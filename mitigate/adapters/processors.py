"""A checkpoint's processor: also without its video part, which torchvision alone can run, and with another template."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mitigate.errors import DataError, UnsupportedModel

#: How the name of a file with a chat template ends.
TEMPLATE_FILE = ".jinja"


class _WithoutVideos(ProcessorMixin):  # type: ignore[misc]
    """Stands between a family's processor and its base: what comes from the family has a video part, the base none."""

    #: What chat templates ask a video processor for, also without videos.
    video_processor: Any = SimpleNamespace(num_frames=None, fps=None)

    def __init__(self, *parts: Any, **named: Any) -> None:
        given = {**dict(zip(super().get_attributes(), parts, strict=False)), **named}
        given.pop("video_processor", None)
        super().__init__(**given)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the names of the parts."""
        return [part for part in super().get_attributes() if part != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it from loaded parts, which the family's own ``__init__`` wants in its own order."""
        parts = dict(zip(cls.get_attributes(), args, strict=True))
        everything = [parts.get(name) for name in super().get_attributes()]
        kept = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return super().from_args_and_dict(everything, kept, **kwargs)

    def validate_inputs(self, *args: Any, videos: Any = None, **named: Any) -> None:
        """Refuse videos, which nothing here could read, unless it was given a video part of its own."""
        if videos is not None and "video_processor" not in vars(self):
            raise UnsupportedModel(
                "this processor was built for pictures only; videos need: pip install 'mitigate[video]'"
            )
        super().validate_inputs(*args, videos=videos, **named)


def pictures_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Derive a processor class that has no video part; saved and loaded, it is the class it comes from."""
    return type(kind.__name__, (kind, _WithoutVideos), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def load_processor(folder: str, chat_template: str | None = None, **arguments: Any) -> ProcessorMixin:
    """Load a processor; if nothing but its video part cannot be had, the rest, with a warning.

    Parameters
    ----------
    folder
        Local folder or hub id.
    chat_template
        Text of a template, or path of a ``.jinja`` file, instead of the processor's own.
    **arguments
        As for ``from_pretrained``.

    Raises
    ------
    DataError
        If the template cannot be read or used. What transformers raises is left alone.
    """
    template = None if chat_template is None else _template(chat_template)
    try:
        processor = AutoProcessor.from_pretrained(folder, **arguments)
    except (OSError, ImportError, AttributeError) as error:
        if not any(word in str(error) for word in ("ideo processor", "ideoProcessor", "VIDEO_PROCESSOR")):
            raise
        kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, **arguments))]
        processor = pictures_only(kind).from_pretrained(folder, **arguments)
        warnings.warn(
            f"{folder}: its video processor cannot be used, so pictures work and videos do not;"
            " for videos: pip install 'mitigate[video]'",
            stacklevel=3,
        )
    if template is not None:
        _use(processor, template)
    return processor


def _template(text: str) -> str:
    """Return the text of a chat template that may be given as a file."""
    if not text.endswith(TEMPLATE_FILE):
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"model.chat_template={text} cannot be read: {reason}; name a text file") from None


def _use(processor: Any, template: str) -> None:
    """Give a processor another chat template, tried on a question about one picture."""
    words = "ABC"
    content = [{"type": "image"}, {"type": "text", "text": words}]
    processor.chat_template = template
    try:
        made = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"model.chat_template is no template that works: {error}") from None
    if words not in made:
        raise DataError(f"model.chat_template leaves the user's words out: a question becomes {made!r}")
