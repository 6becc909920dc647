"""The embedded testbed's benchmark: captions (CHAIR) and yes/no questions (POPE) about drawn scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

from mitigate.benchmarks.base import Benchmark, Box, Sample, Span, SpanKind, whole
from mitigate.errors import DataError
from mitigate.metrics.chair import mentions
from mitigate.metrics.pope import PARSERS, SPLITS, parse
from mitigate.registry import metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from mitigate.metrics.base import Scorer
    from mitigate.records import SampleRecord
    from mitigate.testbed.world import Scene

DEFAULT_SCENES: Final = 200
TASKS: Final = ("chair", "pope")
_ANSWER_TOKENS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Testbed(Benchmark):
    """Scenes that break the co-occurrences the testbed's model was trained on.

    Each scene gives one caption and, per POPE split, up to three questions about objects that are there and as many
    about objects that are not. A question that several splits ask is one sample: it is answered once and counts in
    each.

    Parameters
    ----------
    limit
        Number of scenes; `DEFAULT_SCENES` if not given.
    split
        ``test`` or ``validation``.
    tasks
        Any of ``chair`` and ``pope``.
    parser
        How yes/no replies are read: ``official``, ``opera``, ``vcd`` or ``strict`` (`mitigate.metrics.yes_no`).
    """

    __test__: ClassVar[bool] = False  # pytest takes classes called Test... for tests
    name: ClassVar[str] = "testbed"
    summary: ClassVar[str] = "CHAIR and POPE on procedurally drawn scenes with broken co-occurrence"
    ids: ClassVar[str] = "scene/caption or scene/pope/object, such as test-0/caption and test-0/pope/crab"

    split: str = "test"
    tasks: tuple[str, ...] = TASKS
    parser: str = "strict"

    def __post_init__(self) -> None:
        """Check the parameters; tasks may come as a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        super().__post_init__()
        self.require(self.split in ("test", "validation"), "split", "be test or validation")
        self.require(self.parser in PARSERS, "parser", f"be one of {', '.join(PARSERS)}")
        self.require_some_of(TASKS, "tasks")

    def samples(self) -> list[Sample]:
        """Return captions and questions scene by scene."""
        from mitigate.testbed.language import CAPTION_PROMPT

        samples = []
        for index in range(self.limit or DEFAULT_SCENES):
            scene = _scene(f"{self.split}-{index}")
            if "chair" in self.tasks:
                samples.append(
                    Sample(
                        id=f"{scene.id}/caption",
                        image_id=scene.id,
                        task="caption",
                        prompt=CAPTION_PROMPT,
                        meta={"objects": [thing.name for thing in scene.things]},
                    )
                )
            if "pope" in self.tasks:
                samples += _questions(scene)
        return samples

    def images(self, sample: Sample) -> list[Image]:
        """Draw the scene."""
        # A copy: the cached picture must survive a caller that edits what it gets.
        return [_picture(sample.image_id).copy()]

    def max_new_tokens(self, sample: Sample) -> int | None:
        """Return a few tokens for an answer; captions are left to the decoding configuration."""
        return _ANSWER_TOKENS if sample.task == "yes_no" else None

    def scorers(self) -> list[Scorer]:
        """Return the metrics of the chosen tasks: each task is called after its metric."""
        parameters = {"pope": {"parser": self.parser}}
        return [metrics().get(task)(**parameters.get(task, {})) for task in TASKS if task in self.tasks]

    @property
    def headline(self) -> tuple[str, ...]:
        """Return CHAIR_i and the mean F1 of the POPE splits, as far as their tasks are chosen."""
        return tuple(name for task, name in (("chair", "chair_i"), ("pope", "pope/mean/f1")) if task in self.tasks)

    def score(self, record: SampleRecord) -> Mapping[str, float]:
        """Count one reply against the ground truth in its record.

        Raises
        ------
        DataError
            If the record belongs to a task that is not chosen, or lacks its ground truth.
        """
        if ("chair" if record.task == "caption" else "pope") not in self.tasks:
            raise DataError(f"sample {record.id!r} is a {record.task!r}, but benchmark.tasks={list(self.tasks)}")
        return super().score(record)

    def object_words(self) -> Mapping[str, str]:
        """Return the words of the testbed's language."""
        from mitigate.testbed.language import OBJECT_WORDS

        return OBJECT_WORDS

    def correct(self, record: SampleRecord) -> bool | None:
        """Return whether a yes/no reply is right; ``None`` for captions."""
        return self._right(record, record.text) if record.task == "yes_no" else None

    def breakdowns(self, record: SampleRecord) -> Mapping[str, str]:
        """Return which object a question is about, and how many a captioned scene has."""
        if record.task == "yes_no":
            return {"object": str(self.truth(record, "object"))}
        return {"objects in the scene": str(len(self.truth(record, "objects")))}

    def marked(self, sample: Sample | SampleRecord, text: str) -> list[Span]:
        """Mark object words as right or hallucinated; a wrong yes/no reply is marked hallucinated as a whole."""
        from mitigate.testbed.language import OBJECT_WORDS

        if sample.task == "yes_no":
            return whole(text, self._right(sample, text))
        spans, end = [], 0
        for mention in mentions(text, OBJECT_WORDS):
            kind: SpanKind = "correct" if mention.name in self.truth(sample, "objects") else "hallucinated"
            spans += [Span(text[end : mention.start]), Span(text[mention.start : mention.end], kind)]
            end = mention.end
        return [span for span in [*spans, Span(text[end:])] if span.text]

    def _right(self, sample: Sample | SampleRecord, text: str) -> bool:
        label = self.truth(sample, "label")
        return bool(parse(text, self.parser, label) == label)

    def boxes(self, sample: Sample | SampleRecord) -> Mapping[str, Sequence[Box]]:
        """Return the glyph of every thing in the scene."""
        from mitigate.testbed.draw import box
        from mitigate.testbed.language import OBJECT_WORDS

        drawn = {thing.name: [box(thing)] for thing in _scene(sample.image_id).things}
        return {word: drawn[name] for word, name in OBJECT_WORDS.items() if name in drawn}


def _questions(scene: Scene) -> list[Sample]:
    """Return a scene's yes/no questions, each once, with the POPE splits that ask it."""
    from mitigate.testbed.language import pope_questions

    asked = [(kind, question) for kind in SPLITS for question in pope_questions([scene], kind)]
    kinds: dict[str, list[str]] = {}
    for kind, question in asked:
        kinds.setdefault(question.object, []).append(kind)
    questions = {question.object: question for _, question in asked}
    return [
        Sample(
            id=f"{scene.id}/pope/{name}",
            image_id=scene.id,
            task="yes_no",
            prompt=questions[name].text,
            meta={"pope": splits, "object": name, "label": questions[name].label},
        )
        for name, splits in kinds.items()
    ]


@lru_cache(maxsize=256)
def _scene(image_id: str) -> Scene:
    from mitigate.testbed.world import SPLITS as WORLD_SPLITS
    from mitigate.testbed.world import scene

    name, _, index = image_id.rpartition("-")
    for split in WORLD_SPLITS:
        if split == name and index.isdecimal():
            return scene(split, int(index))
    raise DataError(f"{image_id!r} is no scene of the testbed; scenes are called test-0, validation-7, ...")


@lru_cache(maxsize=256)
def _picture(image_id: str) -> Image:
    from mitigate.testbed.draw import draw

    return draw(_scene(image_id))
