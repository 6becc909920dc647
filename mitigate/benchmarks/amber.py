"""AMBER: what is in the picture, said in a caption and in answers about existence, attributes and relations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mitigate.benchmarks.base import Benchmark, Sample, Span, SpanKind, whole
from mitigate.data import Source, data_folder, read_rows, require_file
from mitigate.data.catalogue import AMBER
from mitigate.errors import DataError
from mitigate.metrics.amber import KINDS, PARSERS, TASKS, kind_of, read_answer
from mitigate.metrics.amber import Amber as AmberScorer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord

_SPANS: Final[dict[str, SpanKind]] = {"ignored": "plain", "present": "correct", "hallucinated": "hallucinated"}


@dataclass(frozen=True, kw_only=True)
class Amber(Benchmark):
    """One caption and about fourteen yes/no questions for each of 1004 pictures.

    Parameters
    ----------
    limit
        Number of pictures, in the order of the files; all of them if not given.
    tasks
        Any of ``generative``, ``existence``, ``attribute`` and ``relation``.
    parser
        How yes/no replies are read: ``official`` (exactly "Yes" or "No", anything else is wrong) or ``strict``.
    similarity
        File of similar words (word, other word, similarity) in place of spaCy's vectors; if not given, only equal
        words are alike.
    caption_prompt
        What is asked for a caption; ``{question}`` stands for the sentence of the file.
    prompt
        What is asked for yes or no; ``{question}`` stands for the question of the file.
    answer_tokens
        Most tokens of a yes/no reply; ``null`` leaves it to the decoding configuration, as captions are.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "amber"
    summary: ClassVar[str] = "AMBER: captions, and yes/no questions about existence, attributes and relations"
    sources: ClassVar[tuple[Source, ...]] = AMBER
    ids: ClassVar[str] = "the id of AMBER's files: 1 to 1004 are captions, 1005 to 15220 yes/no questions"

    tasks: tuple[str, ...] = TASKS
    parser: str = "official"
    similarity: str | None = None
    caption_prompt: str = "{question}"
    prompt: str = "{question}"
    answer_tokens: int | None = 10
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters; tasks may come as a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        super().__post_init__()
        self.require_some_of(TASKS, "tasks")
        self.require(self.parser in PARSERS, "parser", f"be one of {', '.join(PARSERS)}")
        self.require_question(self.prompt, self.answer_tokens)

    def samples(self) -> list[Sample]:
        """Return captions and questions in the order of the files.

        Raises
        ------
        DataError
            If a file is missing or damaged, or queries and annotations do not belong together.
        """
        truths = self._annotations()
        path = self._file("query_all.json")
        wanted = {kind for task in self.tasks for kind in kind_of(task)}
        samples: list[Sample] = []
        seen: set[int] = set()
        pictures: set[str] = set()
        for line, row in read_rows(path):
            where = f"{path}:{line}"
            number, image, query = _query(row, where)
            if number in seen:
                raise DataError(f"{where}: the id {number} occurs twice; get the file again: mitigate data fetch amber")
            seen.add(number)
            if number not in truths:
                raise DataError(f"{where}: the id {number} has no annotation; the two files are not of one version")
            truth = truths[number]
            if KINDS[truth["type"]] not in wanted:
                continue
            if image not in pictures:
                if len(pictures) == self.limit:
                    continue
                pictures.add(image)
            samples.append(self._sample(number, image, query, truth))
        if missing := sorted(truths.keys() - seen):
            raise DataError(f"{path} has no query for the id {missing[0]}; it is truncated, or of another version")
        return samples

    def _sample(self, number: int, image: str, query: str, truth: dict[str, Any]) -> Sample:
        caption = truth["type"] == "generative"
        prompt = (self.caption_prompt if caption else self.prompt).replace("{question}", query)
        task = "caption" if caption else "yes_no"
        return Sample(id=str(number), image_id=image, task=task, prompt=prompt, meta=truth)

    def _annotations(self) -> dict[int, dict[str, Any]]:
        path = self._file("annotations.json")
        found: dict[int, dict[str, Any]] = {}
        for line, row in read_rows(path):
            number = _number(row, f"{path}:{line}")
            if number in found:
                raise DataError(f"{path}:{line}: the id {number} occurs twice; get the file again")
            found[number] = _truth(row, f"{path}:{line}")
        return found

    def _file(self, name: str) -> Path:
        return require_file(data_folder(self.name, self.data_dir) / name, self.name)

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture of a sample."""
        return [data_folder(self.name, self.data_dir) / "image" / sample.image_id]

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return a few tokens for an answer; captions are left to the decoding configuration."""
        return self.answer_tokens if sample.task == "yes_no" else None

    def scorers(self) -> list[Scorer]:
        """Return AMBER's metrics of the chosen tasks."""
        return [self._scorer()]

    def _scorer(self) -> AmberScorer:
        folder = str(data_folder(self.name, self.data_dir))
        return AmberScorer(data=folder, similarity=self.similarity, parser=self.parser, tasks=self.tasks)

    @property
    def headline(self) -> tuple[str, ...]:
        """Return CHAIR and F1, the overall one if there is one."""
        asked = [task for task in TASKS if task in self.tasks and task != "generative"]
        found = ["amber/f1"] if len(asked) == 3 else [f"amber/{task}/f1" for task in asked]
        return (*(["amber/chair"] if "generative" in self.tasks else []), *found)

    def correct(self, record: SampleRecord) -> bool | None:
        """Return whether a yes/no reply is right; ``None`` for captions."""
        if record.task != "yes_no":
            return None
        return bool(read_answer(record.text, self.parser) == self.truth(record, "truth"))

    def errors(self, record: SampleRecord) -> float | None:
        """Return 0 or 1 for a yes/no reply, and how many nouns of a caption are hallucinated."""
        if record.task == "yes_no":
            return float(not self.correct(record))
        return float(self._scorer().judged(record, record.text, self)[1].kinds.count("hallucinated"))

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return the task, and for attributes which kind."""
        kind = KINDS[self.truth(record, "type")]
        attribute = kind in kind_of("attribute")
        return {"task": "attribute", "attribute": kind} if attribute else {"task": kind}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark the nouns that count as right or hallucinated; a wrong yes/no reply is hallucinated as a whole."""
        if sample.task == "yes_no":
            return whole(text, read_answer(text, self.parser) == self.truth(sample, "truth"))
        spans, end = [], 0
        found, judgement = self._scorer().judged(sample, text, self)
        for noun, kind in zip(found, judgement.kinds, strict=True):
            spans += [Span(text[end : noun.start]), Span(text[noun.start : noun.end], _SPANS[kind])]
            end = noun.end
        return [span for span in [*spans, Span(text[end:])] if span.text]


def _number(row: Mapping[str, Any], where: str) -> int:
    number = row.get("id")
    if type(number) is not int:
        raise DataError(f"{where}: the id must be a whole number, not {number!r:.60}")
    return number


def _query(row: Mapping[str, Any], where: str) -> tuple[int, str, str]:
    for key in ("image", "query"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise DataError(f"{where}: {key} must be text, not {row.get(key)!r:.60}")
    if "/" in row["image"] or "\\" in row["image"]:
        raise DataError(f"{where}: the image must be the name of a file, not {row['image']!r:.60}")
    return _number(row, where), row["image"], row["query"]


def _truth(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what scoring needs of an annotation."""
    kind, truth = row.get("type"), row.get("truth")
    if kind not in KINDS:
        raise DataError(f"{where}: unknown type {kind!r:.60}; known: {', '.join(KINDS)}")
    if kind != "generative":
        if truth not in ("yes", "no"):
            raise DataError(f"{where}: truth must be yes or no, not {truth!r:.60}")
        return {"type": kind, "truth": truth}
    for key in ("truth", "hallu"):
        words = row.get(key)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{where}: {key} must be a list of words, not {words!r:.60}")
    return {"type": kind, "truth": truth, "hallu": row["hallu"]}
