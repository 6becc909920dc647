"""POPE: is there a dog in the image? Half of the objects asked for are not there."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mitigate.benchmarks.base import Benchmark, Sample, Span, whole
from mitigate.data import Source, data_folder, read_rows, require_file
from mitigate.data.catalogue import POPE
from mitigate.errors import DataError
from mitigate.metrics.pope import Pope as PopeScorer
from mitigate.metrics.yes_no import PARSERS, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord

SPLITS: Final = ("random", "popular", "adversarial")
_FILES: Final = {
    "coco": "coco_pope_{}.json",
    "aokvqa": "aokvqa_pope_seem_{}.json",
    "gqa": "gqa_pope_seem_{}.json",
}
_PICTURES: Final = {"coco": ("coco", "val2014"), "aokvqa": ("coco", "val2014"), "gqa": ("gqa", "images")}
_OBJECT = re.compile(r"Is there an? (.+) in the im\w+\?")  # older files spell it "imange"
_KEYS: Final = ("question_id", "image", "text", "label")


@dataclass(frozen=True, kw_only=True)
class Pope(Benchmark):
    """Six questions on each of 500 pictures and in each of three splits, which choose the absent objects.

    Parameters
    ----------
    limit
        Number of pictures, in the order of the files; all of them if not given.
    dataset
        ``coco``, ``aokvqa`` (its pictures are COCO's too) or ``gqa``.
    splits
        Any of ``random``, ``popular`` and ``adversarial``.
    parser
        How replies are read: ``official``, ``opera``, ``vcd`` or ``strict``.
    prompt
        What is asked; ``{question}`` stands for the question of the file.
    answer_tokens
        Most tokens a reply may have; ``null`` leaves it to the decoding configuration.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "POPE: yes/no questions about objects in COCO, A-OKVQA or GQA pictures"
    sources: ClassVar[tuple[Source, ...]] = POPE
    ids: ClassVar[str] = "split/question_id, such as adversarial/17; the question_id alone where one split is scored"

    dataset: str = "coco"
    splits: tuple[str, ...] = SPLITS
    parser: str = "official"
    prompt: str = "{question}"
    answer_tokens: int | None = 10
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters; splits may come as a list."""
        object.__setattr__(self, "splits", tuple(self.splits))
        super().__post_init__()
        self.require(self.dataset in _FILES, "dataset", f"be one of {', '.join(_FILES)}")
        self.require_some_of(SPLITS, "splits")
        self.require(self.parser in PARSERS, "parser", f"be one of {', '.join(PARSERS)}")
        self.require_question(self.prompt, self.answer_tokens)

    def samples(self) -> list[Sample]:
        """Return the questions split by split, in the order of their files."""
        return [sample for split in self.splits for sample in self._split(split)]

    def _split(self, split: str) -> list[Sample]:
        path = require_file(data_folder(self.name, self.data_dir) / _FILES[self.dataset].format(split), self.name)
        _name_version(path)
        samples: dict[str, Sample] = {}
        pictures: dict[str, None] = {}
        for line, row in read_rows(path):
            _check(row, f"{path}:{line}")
            pictures[row["image"]] = None
            sample = self._sample(row, split)
            if sample.id in samples:
                raise DataError(f"{path}:{line}: the question_id {row['question_id']} is there twice; keep one row")
            samples[sample.id] = sample
        chosen = set(list(pictures)[: self.limit])
        return [sample for sample in samples.values() if sample.image_id in chosen]

    def _sample(self, row: Mapping[str, Any], split: str) -> Sample:
        meta = {"label": row["label"], "pope": [split]}
        if found := _OBJECT.fullmatch(row["text"].strip()):
            meta["object"] = found.group(1)
        return Sample(
            id=f"{split}/{row['question_id']}",
            image_id=row["image"],
            task="yes_no",
            prompt=self.prompt.replace("{question}", row["text"]),
            meta=meta,
        )

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture's file in the folder of COCO or GQA."""
        name, folder = _PICTURES[self.dataset]
        return [data_folder(name, self.data_dir) / folder / sample.image_id]

    def aliases(self, sample: Sample) -> Sequence[str]:
        """Return the question's number in its file."""
        return (sample.id.partition("/")[2],)

    def scorers(self) -> list[Scorer]:
        """Return POPE's metrics of the chosen splits."""
        return [PopeScorer(parser=self.parser, splits=self.splits)]

    @property
    def headline(self) -> tuple[str, ...]:
        """Return the mean F1 and the mean accuracy of the splits."""
        return ("pope/mean/f1", "pope/mean/accuracy")

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return `answer_tokens`."""
        return self.answer_tokens

    def correct(self, record: SampleRecord) -> bool:
        """Return whether the reply, as the parser reads it, is right."""
        return self._right(record, record.text)

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return the split, and the object that is asked for."""
        known = {"object": record.meta["object"]} if "object" in record.meta else {}
        return {"split": ", ".join(self.truth(record, "pope")), **known}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark the whole reply as right or wrong."""
        return whole(text, self._right(sample, text))

    def _right(self, sample: Sample | SampleRecord, text: str) -> bool:
        label = self.truth(sample, "label")
        return bool(parse(text, self.parser, label) == label)


def _check(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row that lacks something, or whose answer is neither yes nor no."""
    for key in _KEYS:
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing; a row has {', '.join(_KEYS)}")
        kinds = (str, int) if key == "question_id" else (str,)
        if not isinstance(row[key], kinds) or isinstance(row[key], bool):
            raise DataError(f"{where}: {key} must be text, not {row[key]!r:.60}")
    if row["label"] not in ("yes", "no"):
        raise DataError(f"{where}: the label must be yes or no, not {row['label']!r:.60}")
    if not row["image"] or "/" in row["image"] or "\\" in row["image"]:
        raise DataError(f"{where}: the image must be the name of a file, not {row['image']!r:.60}")


def _name_version(path: Path) -> None:
    """Say so if the file is one of the versions whose numbers are not comparable with today's."""
    older = {sha256: name for source in POPE if source.path == path.name for sha256, name in source.older}
    name = older.get(hashlib.sha256(path.read_bytes()).hexdigest())
    if name is not None:
        warnings.warn(
            f"{path} is the version {name}; its numbers are not those of the current file "
            "(`mitigate data fetch pope` gets it)",
            stacklevel=2,
        )
