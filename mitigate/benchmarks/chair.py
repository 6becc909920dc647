"""CHAIR on COCO: which objects a description names that neither the outlines nor the people saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mitigate.benchmarks.base import Benchmark, Sample, Span, SpanKind
from mitigate.benchmarks.coco import other_names, pictures
from mitigate.data import Source, data_folder
from mitigate.data.catalogue import CHAIR
from mitigate.errors import DataError
from mitigate.metrics.chair import Chair as ChairScorer
from mitigate.metrics.coco_objects import object_words, read, vocabulary
from mitigate.metrics.lemmatizers import LEMMATIZERS
from mitigate.records import SampleRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mitigate.benchmarks.coco import Picture
    from mitigate.metrics.base import Scorer

PROMPT = "Please describe this image in detail."


@dataclass(frozen=True, kw_only=True)
class Chair(Benchmark):
    """A description of every picture; what it may name is what is outlined in the picture or in its reference captions.

    Parameters
    ----------
    limit
        Number of pictures, from the first of the list; 500 if neither it nor a manifest is given.
    lemmatizer
        How words become base forms: ``wordnet`` (most papers; needs nltk and its data), ``pattern`` (the original
        script) or ``closed`` (our own table).
    manifest
        File of the pictures, one id or file name a line; the default pictures of val2014 if not given.
    drop_incomplete_sentence
        Whether to score a caption that was cut off only up to its last sentence end.
    prompt
        What is asked.
    answer_tokens
        Most tokens a caption may have; ``null`` leaves it to the decoding configuration.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "chair"
    summary: ClassVar[str] = "CHAIR: objects in descriptions of COCO pictures that are not there"
    sources: ClassVar[tuple[Source, ...]] = CHAIR
    ids: ClassVar[str] = (
        "COCO's id of the picture, such as 42; its file name, too. Answers about other pictures than the default 500 "
        "need the list of their ids: manifest=FILE"
    )

    lemmatizer: str = "wordnet"
    manifest: str | None = None
    drop_incomplete_sentence: bool = False
    prompt: str = PROMPT
    answer_tokens: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        self.require(self.lemmatizer in LEMMATIZERS, "lemmatizer", f"be one of {', '.join(LEMMATIZERS)}")
        self.require(bool(self.prompt.strip()), "prompt", "say something")
        self.require(self.answer_tokens is None or self.answer_tokens >= 1, "answer_tokens", "be at least 1, or null")

    def samples(self) -> list[Sample]:
        """Return one caption per picture, in the order of the manifest."""
        chosen = pictures(self.name, self.data_dir, self.manifest, self.limit, segmented=True)
        return [
            Sample(
                id=str(picture.id),
                image_id=str(picture.id),
                task="caption",
                prompt=self.prompt,
                meta={"objects": self._objects(picture), "lemmatizer": self.lemmatizer, "file": picture.file},
            )
            for picture in chosen
        ]

    def _objects(self, picture: Picture) -> list[str]:
        """Return what is outlined and what the reference captions name, read as the captions are."""
        known = vocabulary().objects
        if unknown := [name for name in picture.categories if name not in known]:
            raise DataError(f"picture {picture.id}: {unknown[0]!r} is no category of COCO; get the annotations again")
        outlined = {known[name] for name in picture.categories}
        said = {mention.name for text in picture.captions for mention in read(text, self.lemmatizer).mentions}
        return sorted(outlined | said)

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture's file in the folder of COCO."""
        return [data_folder("coco", self.data_dir) / self.truth(sample, "file")]

    def aliases(self, sample: Sample) -> Sequence[str]:
        """Return the file name, with and without its ending, and the id with leading zeros."""
        return other_names(sample.id, self.truth(sample, "file"))

    def scorers(self) -> list[Scorer]:
        """Return CHAIR under the chosen lemmatizer."""
        return [self._scorer()]

    def _scorer(self) -> ChairScorer:
        return ChairScorer(lemmatizer=self.lemmatizer, drop_incomplete_sentence=self.drop_incomplete_sentence)

    @property
    def headline(self) -> tuple[str, ...]:
        """Return CHAIR_s and CHAIR_i."""
        return ("chair_s", "chair_i")

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return `answer_tokens`."""
        return self.answer_tokens

    def object_words(self) -> Mapping[str, str]:
        """Return all synonyms and their plural forms, whatever the lemmatizer finds of them."""
        return object_words()

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return how many different objects are in the picture: a full one gives more room to be right."""
        count = len(self.truth(record, "objects"))
        return {"objects in the picture": "0 or 1" if count < 2 else str(count) if count < 5 else "5 or more"}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark the words that name objects as right or hallucinated; what is not scored stays plain."""
        scored = self._scorer().scored_text(sample) if isinstance(sample, SampleRecord) else text
        present, spans, end = self.truth(sample, "objects"), [], 0
        for mention in read(scored, self.lemmatizer).mentions:
            kind: SpanKind = "correct" if mention.name in present else "hallucinated"
            spans += [Span(text[end : mention.start]), Span(text[mention.start : mention.end], kind)]
            end = mention.end
        return [span for span in [*spans, Span(text[end:])] if span.text]
