"""Measuring a testbed checkpoint: the numbers of its model card, all of them from the saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, LogitsProcessor, LogitsProcessorList

from mitigate.errors import ConfigError
from mitigate.testbed.batches import Packer
from mitigate.testbed.draw import draw
from mitigate.testbed.language import CAPTION_PROMPT, QUESTION_KINDS, pope_questions
from mitigate.testbed.model import checkpoint_path, checksum, load
from mitigate.testbed.options import TestbedEvaluation as TestbedEvaluation
from mitigate.testbed.probe import Probe, load_probe, presence, visual_features
from mitigate.testbed.scores import (
    answer_metrics,
    caption_metrics,
    chair_difference,
    kinship_metrics,
    rate_by_sentence,
)
from mitigate.testbed.world import Scene, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_CAPTION_TOKENS: Final = 96


class AddLogOdds(LogitsProcessor):  # type: ignore[misc]
    """Adds scaled log-odds of presence to the logits of the objects' words.

    Parameters
    ----------
    log_odds
        `[B, n_objects]`.
    token_ids
        Token id of each object's word.
    scale
        Factor on the log-odds.
    """

    def __init__(self, log_odds: Tensor, token_ids: Sequence[int], scale: float) -> None:
        self._change = log_odds * scale
        self._token_ids = list(token_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return a changed copy of the scores, `[B, V]`."""
        scores = scores.clone()
        scores[:, self._token_ids] += self._change.to(scores)
        return scores


def prompt(processor: LlavaProcessor, text: str) -> str:
    """Return the full prompt for one picture and one text."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return str(processor.apply_chat_template([message], add_generation_prompt=True))


@torch.inference_mode()
def generate_texts(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Scene],
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 100,
    change: Callable[[Sequence[Scene]], LogitsProcessor] | None = None,
) -> list[str]:
    """Greedy answers to one prompt text per picture.

    Parameters
    ----------
    model, processor
        The model and its processor.
    pictures, texts
        Scenes to look at and what to ask, of the same length.
    max_new_tokens
        Longest answer in tokens.
    batch_size
        Prompts generated at a time.
    change
        Makes, for a batch of scenes, what is applied to the next token's logits.
    """
    answers: list[str] = []
    for start in range(0, len(pictures), batch_size):
        chunk = list(pictures[start : start + batch_size])
        inputs = processor(
            text=[prompt(processor, text) for text in texts[start : start + batch_size]],
            images=[draw(made) for made in chunk],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        extra = LogitsProcessorList([change(chunk)]) if change else LogitsProcessorList()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=extra)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def probe_metrics(probe: Probe, features: Tensor, pictures: list[Scene]) -> dict[str, float]:
    """Accuracy over all objects, and recall, precision and F1 on those present, at even odds."""
    says, truth = probe.log_odds(features) > 0, presence(pictures) > 0
    hits = float((says & truth).sum())
    return {
        "accuracy": float((says == truth).float().mean()),
        "recall": hits / float(truth.sum()),
        "precision": hits / max(1.0, float(says.sum())),
        "f1": 2 * hits / float(says.sum() + truth.sum()),
    }


def _pope(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: list[Scene], batch_size: int
) -> dict[str, dict[str, float]]:
    by_id = {made.id: made for made in pictures}
    sets = {kind: pope_questions(pictures, kind) for kind in QUESTION_KINDS}
    # The same question in two sets is asked once.
    asked = list({(q.scene_id, q.text): None for questions in sets.values() for q in questions})
    given = generate_texts(
        model,
        processor,
        [by_id[scene_id] for scene_id, _ in asked],
        [text for _, text in asked],
        max_new_tokens=2,
        batch_size=4 * batch_size,
    )
    answers = dict(zip(asked, given, strict=True))
    return {
        kind: answer_metrics(questions, [answers[q.scene_id, q.text] for q in questions])
        for kind, questions in sets.items()
    }


def evaluate(config: TestbedEvaluation) -> dict[str, Any]:
    """Measure a checkpoint.

    Parameters
    ----------
    config
        What to measure and on how many scenes.

    Returns
    -------
    dict
        ``caption``, ``kinship``, ``by_sentence``, ``swapped`` (captions of other scenes' pictures against these
        scenes), ``pope`` by kind of question, ``probe``, ``control`` (captions under the positive control) and what was
        measured (``checkpoint_sha256``, ``split``, ``images``).

    Raises
    ------
    ConfigError
        If the folder holds no checkpoint or no probe, or one that is damaged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.checkpoint) if config.checkpoint else checkpoint_path()
    try:
        probe = load_probe(folder)
        model, processor = load(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"checkpoint={folder} cannot be measured: {reason}") from error
    pictures = list(scenes(config.split, config.images))
    truths = [made.objects for made in pictures]
    packer = Packer(processor, questions=1, patch_size=int(processor.patch_size))

    def log_odds(chunk: Sequence[Scene]) -> LogitsProcessor:
        features = visual_features(model, packer, list(chunk))
        return AddLogOdds(probe.log_odds(features), probe.token_ids, config.control_scale)

    def captions(change: Callable[[Sequence[Scene]], LogitsProcessor] | None = None) -> list[str]:
        return generate_texts(
            model,
            processor,
            pictures,
            [CAPTION_PROMPT] * len(pictures),
            max_new_tokens=MAX_CAPTION_TOKENS,
            batch_size=config.batch_size,
            change=change,
        )

    plain, controlled = captions(), captions(log_odds)
    report: dict[str, Any] = {
        "checkpoint_sha256": checksum(folder / "model.safetensors"),
        "split": config.split,
        "images": config.images,
        "caption": caption_metrics(plain, truths),
        "kinship": kinship_metrics(plain, truths),
        "by_sentence": rate_by_sentence(plain, truths),
        "swapped": caption_metrics(plain[1:] + plain[:1], truths),
        "pope": _pope(model, processor, pictures, config.batch_size),
        "probe": probe_metrics(probe, visual_features(model, packer, pictures), pictures),
        "control": {
            "scale": config.control_scale,
            **caption_metrics(controlled, truths),
            **chair_difference(plain, controlled, truths),
        },
    }
    if config.card:
        from mitigate.testbed.card import write_card

        write_card(folder, report, Path(config.card))
    return report


BAR: Final[tuple[tuple[str, float, float], ...]] = (
    ("caption.recall", 0.75, 1.0),
    ("caption.chair_i", 0.05, 0.30),
    ("caption.chair_s", 0.20, 1.0),
    ("pope.adversarial.accuracy", 0.70, 0.93),
    ("pope.random.accuracy", 0.80, 1.0),
    ("pope.adversarial.yes_rate", 0.35, 0.65),
    ("pope.popular.yes_rate", 0.35, 0.65),
    ("pope.random.yes_rate", 0.35, 0.65),
    ("probe.f1", 0.95, 1.0),
    ("kinship.related", 0.70, 1.0),
)
"""Measure, lowest and highest value: what a checkpoint has to reach to serve as the testbed."""


def value_of(report: dict[str, Any], path: str) -> float:
    """Return a number of the report by its dotted path."""
    value: Any = report
    for key in path.split("."):
        value = value[key]
    return float(value)


def shortfalls(report: dict[str, Any]) -> list[str]:
    """List what of the quality bar a report misses, one line each; nothing when it is met."""
    lines = [
        f"{path} is {value_of(report, path):.3f}, wanted is {low:.2f} to {high:.2f}"
        for path, low, high in BAR
        if not low <= value_of(report, path) <= high
    ]
    before, after = report["caption"], report["control"]
    if report["swapped"]["recall"] >= before["recall"] / 2:
        lines.append(f"with other pictures the recall is still {report['swapped']['recall']:.3f}: it does not look")
    if after["chair_i"] > before["chair_i"] * 2 / 3 or after["high"] >= 0 or after["recall"] < before["recall"]:
        lines.append(
            f"the positive control takes CHAIR_i from {before['chair_i']:.3f} to {after['chair_i']:.3f} "
            f"and recall from {before['recall']:.3f} to {after['recall']:.3f}"
        )
    return lines
