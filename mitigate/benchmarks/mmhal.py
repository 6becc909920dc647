"""MMHal-Bench: open questions that invite hallucination, answered freely and rated by a judge."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mitigate.benchmarks.base import Benchmark, Sample, Span, whole
from mitigate.data import Source, data_folder, read_rows, require_file
from mitigate.data.catalogue import MMHAL
from mitigate.errors import ConfigError, DataError
from mitigate.judges import CACHE, Message, graded, judge_of
from mitigate.metrics.mmhal import CLEAN, TYPES, rating
from mitigate.metrics.mmhal import Mmhal as MmhalScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord

QUESTIONS: Final = 96
_FILE: Final = "response_template.json"
_TEXTS: Final = ("question", "gt_answer", "image_src", "question_type")
#: What a template must have a place for.
FIELDS: Final = ("image_content", "question", "gt_answer", "model_answer")
_PLACE: Final = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")


@dataclass(frozen=True, kw_only=True)
class Mmhal(Benchmark):
    """96 questions of 8 types about pictures of OpenImages, graded by a judge.

    Parameters
    ----------
    limit
        Number of questions, in the order of the file; all 96 if not given.
    judge_url
        Base address of an OpenAI-compatible endpoint, such as ``http://localhost:8000/v1``.
    judge_model
        Name of the judge there.
    judge_key_env
        Environment variable that holds the endpoint's key.
    judge_retries
        How often a request is sent again if the endpoint is busy or fails.
    template
        File with the judge's prompt; it must hold ``{image_content}``, ``{question}``, ``{gt_answer}`` and
        ``{model_answer}``.
    prompt
        What the model is asked; ``{question}`` stands for the question of the file.
    answer_tokens
        Most tokens an answer may have; ``null`` leaves it to the decoding configuration.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "mmhal"
    summary: ClassVar[str] = "MMHal-Bench: 96 open questions whose answers a judge rates"
    sources: ClassVar[tuple[Source, ...]] = MMHAL
    ids: ClassVar[str] = "the index of the question in the file: 0 to 95"

    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_env: str = "OPENAI_API_KEY"
    judge_retries: int = 6
    template: str | None = None
    prompt: str = "{question}"
    answer_tokens: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters: without a judge and its prompt nothing begins."""
        super().__post_init__()
        judge_of(self)
        self._template()
        self.require_question(self.prompt, self.answer_tokens)

    def samples(self) -> list[Sample]:
        """Return the questions in the order of the file.

        Raises
        ------
        DataError
            If the file is missing, damaged, or its questions are not the 96 in their order.
        """
        path = require_file(data_folder(self.name, self.data_dir) / _FILE, self.name)
        rows = read_rows(path)
        if len(rows) != QUESTIONS:
            raise DataError(f"{path} holds {len(rows)} questions, not {QUESTIONS}; get it again")
        samples = [self._sample(index, row, f"{path}:{line}") for index, (line, row) in enumerate(rows)]
        return samples[: self.limit]

    def _sample(self, index: int, row: Mapping[str, Any], where: str) -> Sample:
        for key in _TEXTS:
            if not isinstance(row.get(key), str) or not row[key]:
                raise DataError(f"{where}: {key} must be text, not {row.get(key)!r:.60}")
        content = row.get("image_content")
        if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
            raise DataError(f"{where}: image_content must be a list of words, not {content!r:.60}")
        kind = TYPES[index % len(TYPES)]
        if row["question_type"] != kind:
            raise DataError(
                f"{where}: question {index} should be of the type {kind!r}, but is {row['question_type']!r}; "
                "the questions must stay in the order of the original file"
            )
        return Sample(
            id=str(index),
            image_id=row["image_src"].rpartition("/")[2],
            task="open",
            prompt=self.prompt.replace("{question}", row["question"]),
            meta={"type": kind, **{key: row[key] for key in ("question", "gt_answer", "image_content")}},
        )

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture, which is called as at the end of its address."""
        return [data_folder(self.name, self.data_dir) / "images" / sample.image_id]

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return the limit that is chosen."""
        return self.answer_tokens

    def scorers(self) -> list[Scorer]:
        """Return MMHal-Bench's metrics."""
        return [MmhalScorer()]

    @property
    def headline(self) -> tuple[str, ...]:
        """Return the mean rating and the hallucination rate."""
        return ("mmhal/score", "mmhal/hallucination_rate")

    def graded(
        self, records: Sequence[SampleRecord], folder: Path, report: Callable[[int, int], None] | None = None
    ) -> list[SampleRecord]:
        """Return the records with the judge's reply and name in their ``meta``.

        Raises
        ------
        ConfigError, DataError
            If the judge does not answer (`mitigate.judges.Judge.reply`).
        """
        template = self._template()

        def ask(record: SampleRecord) -> list[Message]:
            parts = {key: self.truth(record, key) for key in ("question", "gt_answer")}
            parts["image_content"] = ", ".join(self.truth(record, "image_content"))
            parts["model_answer"] = record.text
            # In one pass, so that braces in an answer stay what they are.
            return [{"role": "user", "content": _PLACE.sub(lambda match: parts[match[1]], template)}]

        return graded(records, ask, judge_of(self), folder / CACHE, report)

    def _template(self) -> str:
        if not self.template:
            raise ConfigError(
                "mmhal: give benchmark.template=FILE with the judge's prompt (docs/benchmarks/mmhal.md says how to get "
                "the official one)"
            )
        path = Path(self.template).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"benchmark.template={self.template} cannot be read: {error}") from None
        if missing := [name for name in FIELDS if f"{{{name}}}" not in text]:
            raise ConfigError(
                f"{path} has no {{{missing[0]}}}; a judge's prompt holds " + ", ".join(f"{{{name}}}" for name in FIELDS)
            )
        return text

    def correct(self, record: SampleRecord) -> bool | None:
        """Return whether the judge found nothing hallucinated; ``None`` before it is asked."""
        reply = record.meta.get("judge_reply")
        return None if reply is None else rating(reply) >= CLEAN

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return the type of the question."""
        return {"type": self.truth(record, "type")}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark an answer as a whole, once it is judged: nobody says which part is hallucinated."""
        reply = sample.meta.get("judge_reply")
        return super().marked(sample, text) if reply is None else whole(text, rating(reply) >= CLEAN)
