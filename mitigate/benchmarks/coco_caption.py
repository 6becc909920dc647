"""Short captions of COCO pictures against those of five people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mitigate.benchmarks.base import Benchmark, Sample
from mitigate.benchmarks.coco import other_names, pictures
from mitigate.data import Source, data_folder
from mitigate.data.catalogue import COCO_CAPTION
from mitigate.metrics.cider import TOKENIZERS, Cider

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mitigate.metrics.base import Scorer

PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True, kw_only=True)
class CocoCaption(Benchmark):
    """A one-sentence caption of every picture, scored by CIDEr-D.

    Parameters
    ----------
    limit
        Number of pictures, from the first of the list; 500 if neither it nor a manifest is given.
    tokenizer
        ``simple`` or ``ptb``, the official one, which needs pycocoevalcap and Java.
    manifest
        File of the pictures, one id or file name a line; the default pictures of val2014 if not given.
    prompt
        What is asked.
    answer_tokens
        Most tokens a caption may have; ``null`` leaves it to the decoding configuration.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "coco_caption"
    summary: ClassVar[str] = "CIDEr-D: one-sentence captions of COCO pictures against people's"
    sources: ClassVar[tuple[Source, ...]] = COCO_CAPTION
    ids: ClassVar[str] = (
        "COCO's id of the picture, such as 42; its file name, too. Answers about other pictures than the default 500 "
        "need the list of their ids: manifest=FILE"
    )

    tokenizer: str = "simple"
    manifest: str | None = None
    prompt: str = PROMPT
    answer_tokens: int | None = 64
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        self.require(self.tokenizer in TOKENIZERS, "tokenizer", f"be one of {', '.join(TOKENIZERS)}")
        self.require(bool(self.prompt.strip()), "prompt", "say something")
        self.require(self.answer_tokens is None or self.answer_tokens >= 1, "answer_tokens", "be at least 1, or null")

    def samples(self) -> list[Sample]:
        """Return one caption per picture, in the order of the manifest."""
        chosen = pictures(self.name, self.data_dir, self.manifest, self.limit, segmented=False)
        return [
            Sample(
                id=str(picture.id),
                image_id=str(picture.id),
                task="caption",
                prompt=self.prompt,
                meta={"references": list(picture.captions), "file": picture.file},
            )
            for picture in chosen
        ]

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture's file in the folder of COCO."""
        return [data_folder("coco", self.data_dir) / self.truth(sample, "file")]

    def aliases(self, sample: Sample) -> Sequence[str]:
        """Return the file name, with and without its ending, and the id with leading zeros."""
        return other_names(sample.id, self.truth(sample, "file"))

    def scorers(self) -> list[Scorer]:
        """Return CIDEr-D."""
        return [Cider(tokenizer=self.tokenizer)]

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return `answer_tokens`."""
        return self.answer_tokens
