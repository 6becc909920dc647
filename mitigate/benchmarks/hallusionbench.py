"""HallusionBench: yes/no questions on pictures, on edited copies of them, and without any."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mitigate.benchmarks.base import Benchmark, Sample, Span, whole
from mitigate.data import Source, data_folder, read_rows, require_file
from mitigate.data.catalogue import HALLUSIONBENCH
from mitigate.errors import DataError
from mitigate.judges import CACHE, Message, graded, judge_of
from mitigate.metrics.hallusionbench import GRADERS, is_right
from mitigate.metrics.hallusionbench import HallusionBench as HallusionBenchScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord

FILE: Final = "HallusionBench.json"
PICTURES: Final = "hallusion_bench"
_NAMES: Final = ("category", "subcategory", "set_id", "figure_id", "question_id")
_KEYS: Final = (*_NAMES, "visual_input", "question", "gt_answer", "gt_answer_details")
_PLAIN: Final = re.compile(r"[A-Za-z0-9-]+")

#: The request of the official evaluation, word for word, because a judge's verdict depends on it:
#: HallusionBench, utils.py, Copyright 2023 Fuxiao Liu, BSD-3-Clause.
JUDGE_PROMPT: Final = (
    "Imagine you are an intelligent teacher. Thoroughly read the question, reference answer and the prediction answer "
    "to ensure a clear understanding of the information provided. Assess the correctness of the predictions. If the "
    "prediction answer does not conflict with the reference answer, please generate \u201ccorrect\u201d. If the "
    "prediction answer conflict with the reference answer, please generate \u201cincorrect\u201d. If the prediction "
    'answer is unclear about the answer, please generate "unclear". \n\n Question:{question}\nReference answer: '
    "{reference}\nPrediction answer:{prediction}\nOutput:"
)


@dataclass(frozen=True, kw_only=True)
class HallusionBench(Benchmark):
    """Sets of questions; a set is one subject with its original and edited pictures, and is resampled as a whole.

    Parameters
    ----------
    limit
        Number of sets, in the order of the file; all of them if not given.
    grader
        ``exact`` compares the yes or no of a reply, ``judge`` asks a language model about every reply.
    prompt
        What is asked; ``{question}`` stands for the question of the file.
    answer_tokens
        Most tokens a reply may have; ``null`` leaves it to the decoding configuration.
    judge_url
        Base address of an OpenAI-compatible endpoint; only for the grader ``judge``.
    judge_model
        Name of the judge there. The official numbers are those of GPT-4 of 2023.
    judge_key_env
        Environment variable that holds the endpoint's key.
    judge_retries
        How often a request is sent again if the endpoint does not answer.
    data_dir
        Folder of the data; ``$MITIGATE_DATA`` or ``data`` if not given.
    """

    name: ClassVar[str] = "hallusionbench"
    summary: ClassVar[str] = "HallusionBench: the same questions on original and edited pictures"
    sources: ClassVar[tuple[Source, ...]] = HALLUSIONBENCH
    ids: ClassVar[str] = "category_subcategory_set_figure_question, such as VS_chart_0_1_0"
    grouped: ClassVar[bool] = True

    grader: str = "exact"
    prompt: str = "{question}"
    answer_tokens: int | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_env: str = "OPENAI_API_KEY"
    judge_retries: int = 6
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        self.require(self.grader in GRADERS, "grader", f"be one of {', '.join(GRADERS)}")
        self.require_question(self.prompt, self.answer_tokens)
        self.require(self.judge_retries >= 0, "judge_retries", "not be negative")
        if self.grader == "judge":
            judge_of(self)  # before anything runs

    def samples(self) -> list[Sample]:
        """Return the questions in the order of the file."""
        path = require_file(data_folder(self.name, self.data_dir) / FILE, self.name)
        samples: dict[str, Sample] = {}
        sets: dict[str, None] = {}
        for line, row in read_rows(path):
            sample = self._sample(_checked(row, f"{path}:{line}"))
            if sample.id in samples:
                raise DataError(f"{path}:{line}: the question {sample.id} is there twice; keep one row")
            samples[sample.id] = sample
            sets[_set(sample)] = None
        chosen = set(list(sets)[: self.limit])
        return [sample for sample in samples.values() if _set(sample) in chosen]

    def _sample(self, row: Mapping[str, str]) -> Sample:
        meta = {
            "label": "yes" if row["gt_answer"] == "1" else "no",
            "category": row["category"],
            "subcategory": row["subcategory"],
            "set": row["set_id"],
            "figure": row["figure_id"],
            "question_id": row["question_id"],
            "visual_input": row["visual_input"],
            "question": row["question"],
            "reference": row["gt_answer_details"],
        }
        names = [row[name] for name in _NAMES]
        return Sample(
            id="_".join(names),
            image_id="_".join(names[:-1]),
            task="yes_no",
            prompt=self.prompt.replace("{question}", row["question"]),
            meta=meta,
        )

    def image_files(self, sample: Sample) -> list[Path]:
        """Return the picture's file; none for a question that is asked without its picture."""
        if self.truth(sample, "visual_input") == "0":
            return []
        meta = sample.meta
        folder = data_folder(self.name, self.data_dir) / PICTURES / meta["category"] / meta["subcategory"]
        return [folder / f"{meta['set']}_{meta['figure']}.png"]

    def cluster(self, record: SampleRecord) -> str:
        """Return the set: its questions are asked on several pictures, and count together."""
        return _set(record)

    def graded(
        self, records: Sequence[SampleRecord], folder: Path, report: Callable[[int, int], None] | None = None
    ) -> list[SampleRecord]:
        """Return the records with the judge's replies, if a judge grades.

        Raises
        ------
        ConfigError, DataError
            If the judge does not answer (`mitigate.judges.Judge.reply`).
        """
        if self.grader == "exact":
            return list(records)

        def ask(record: SampleRecord) -> list[Message]:
            text = JUDGE_PROMPT.format(
                question=self.truth(record, "question"),
                reference=self.truth(record, "reference"),
                prediction=record.text,
            )
            return [{"role": "user", "content": text}]

        return graded(records, ask, judge_of(self), folder / CACHE, report)

    def scorers(self) -> list[Scorer]:
        """Return HallusionBench's metrics."""
        return [HallusionBenchScorer(grader=self.grader)]

    @property
    def headline(self) -> tuple[str, ...]:
        """Return aAcc, qAcc and fAcc."""
        return ("hallusionbench/aAcc", "hallusionbench/qAcc", "hallusionbench/fAcc")

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return `answer_tokens`."""
        return self.answer_tokens

    def correct(self, record: SampleRecord) -> bool:
        """Return whether the answer is right, as the grader sees it."""
        self.truth(record, "label")
        return is_right(record.meta, record.text, self.grader)

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return category and subcategory, and whether the picture is the original, edited, or not shown."""
        category, subcategory = self.truth(record, "category"), self.truth(record, "subcategory")
        picture = {"0": "none", "1": "original", "2": "edited"}[self.truth(record, "visual_input")]
        return {"category": category, "subcategory": f"{category} {subcategory}", "picture": picture}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark the whole reply as right or wrong; leave it plain where a judge has not said anything yet."""
        if self.grader == "judge" and "judge_reply" not in sample.meta:
            return super().marked(sample, text)
        return whole(text, is_right(sample.meta, text, self.grader))


def _set(sample: Sample | SampleRecord) -> str:
    return "_".join(str(sample.meta[key]) for key in ("category", "subcategory", "set"))


def _checked(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return a row as text, or refuse it."""
    for key in _KEYS:
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing; a row has {', '.join(_KEYS)}")
        if not isinstance(row[key], str | int) or isinstance(row[key], bool):
            raise DataError(f"{where}: {key} must be text, not {row[key]!r:.60}")
    found = {key: str(row[key]) for key in _KEYS}
    for key, known in (("category", ("VD", "VS")), ("gt_answer", ("0", "1")), ("visual_input", ("0", "1", "2"))):
        if found[key] not in known:
            raise DataError(f"{where}: {key} must be one of {', '.join(known)}, not {row[key]!r:.60}")
    if odd := [key for key in _NAMES if not _PLAIN.fullmatch(found[key])]:
        raise DataError(f"{where}: {odd[0]} must be letters and digits, not {found[odd[0]]!r:.60}")
    return found
