"""The checkpoint that ships: what it is made of, and that it is good enough to test with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mitigate.testbed import evaluate as evaluation
from mitigate.testbed import train as training
from mitigate.testbed.batches import Packer
from mitigate.testbed.card import METRICS_FILE, render_card, write_card
from mitigate.testbed.draw import draw
from mitigate.testbed.language import CAPTION_PROMPT, WORDS, pope_questions, question_text
from mitigate.testbed.model import build_tokenizer, checkpoint_path, checksum, load
from mitigate.testbed.probe import Probe, load_probe, visual_features
from mitigate.testbed.scores import answer_metrics, caption_metrics
from mitigate.testbed.world import OBJECTS, Scene, scenes

FOLDER = checkpoint_path()
PAGE = Path(__file__).parents[2] / "docs" / "testbed.md"
PICTURES = list(scenes("test", 60))
TRUTHS = [made.objects for made in PICTURES]


@pytest.fixture(scope="module")
def loaded() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return load()


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load_probe()


@pytest.fixture(scope="module")
def plain(loaded: tuple[Any, Any]) -> list[str]:
    return _captions(*loaded)


def _captions(model: Any, processor: Any, **options: Any) -> list[str]:
    return evaluation.generate_texts(
        model, processor, PICTURES, [CAPTION_PROMPT] * len(PICTURES), max_new_tokens=96, **options
    )


def test_the_folder_loads_like_any_other_checkpoint() -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert isinstance(processor.tokenizer, PreTrainedTokenizerFast)
    assert processor.tokenizer.padding_side == "left"
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.text_config.num_attention_heads >= 8
    assert model.config.vision_config.model_type == "clip_vision_model"


def test_sizes_and_checksum() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    model, _ = load()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    assert record["parameters"] == sum(weight.numel() for weight in model.parameters()) <= 4_000_000
    assert record["sha256"] == checksum(FOLDER / "model.safetensors")
    assert {path.suffix for path in FOLDER.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_the_recipe_is_what_training_does_by_default() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["recipe"] == training.recipe(training.TestbedTraining())["recipe"]


def test_every_word_is_one_token_and_text_survives() -> None:
    tokenizer = build_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    text = "The cup at top left is red. The pot at middle center is blue."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_have_text_before_and_after_the_picture(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    text = evaluation.prompt(processor, question_text("cup"))
    assert text == "USER: <image>\nIs there a cup in the image? ASSISTANT:"
    inputs = processor(text=[text], images=[draw(PICTURES[0])], return_tensors="pt")
    ids = inputs["input_ids"][0]
    at = (ids == model.config.image_token_id).nonzero().flatten()
    assert len(at) == 64 == int(at[-1] - at[0]) + 1
    assert int(at[0]) >= 3
    assert len(ids) - int(at[-1]) > 6
    assert processor.tokenizer.unk_token_id not in ids


def test_pictures_reach_the_model_unresized(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    packed = Packer(processor, questions=1, patch_size=8).pixels(PICTURES[:4])
    inputs = processor(text=["<image>"] * 4, images=[draw(made) for made in PICTURES[:4]], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], packed, atol=1e-5, rtol=0)


def test_batches_with_left_padding_answer_as_one_by_one(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    texts = [CAPTION_PROMPT, question_text("cup"), question_text("boat"), CAPTION_PROMPT]
    options = {"max_new_tokens": 40}
    together = evaluation.generate_texts(model, processor, PICTURES[:4], texts, **options)
    alone = evaluation.generate_texts(model, processor, PICTURES[:4], texts, batch_size=1, **options)
    assert together == alone
    assert together[1] in ("Yes", "No")


def test_captions_hallucinate_but_look(plain: list[str]) -> None:
    scores = caption_metrics(plain, TRUTHS)
    assert scores["recall"] > 0.68
    assert 0.04 < scores["chair_i"] < 0.35
    assert scores["chair_s"] > 0.15
    assert caption_metrics(plain[1:] + plain[:1], TRUTHS)["recall"] < scores["recall"] / 2


@pytest.mark.parametrize(("kind", "low", "high"), [("adversarial", 0.65, 0.96), ("random", 0.75, 1.0)])
def test_questions_are_answered_from_the_picture(loaded: tuple[Any, Any], kind: str, low: float, high: float) -> None:
    by_id = {made.id: made for made in PICTURES}
    questions = pope_questions(PICTURES, kind)
    answers = evaluation.generate_texts(
        *loaded, [by_id[q.scene_id] for q in questions], [q.text for q in questions], max_new_tokens=2, batch_size=400
    )
    scores = answer_metrics(questions, answers)
    assert low < scores["accuracy"] <= high
    assert 0.3 < scores["yes_rate"] < 0.7
    assert scores["unclear"] == 0.0


def test_the_probe_reads_the_visual_tokens(loaded: tuple[Any, Any], probe: Probe) -> None:
    model, processor = loaded
    features = visual_features(model, Packer(processor, questions=1, patch_size=8), PICTURES)
    assert features.shape[:2] == (len(PICTURES), 64)
    assert evaluation.probe_metrics(probe, features, PICTURES)["f1"] > 0.93
    assert evaluation.probe_metrics(probe, features.roll(1, 0), PICTURES)["f1"] < 0.6
    words = processor.tokenizer.convert_ids_to_tokens(list(probe.token_ids))
    assert [word.removeprefix("\u2581") for word in words] == list(probe.objects) == list(OBJECTS)


def test_the_positive_control_lowers_hallucination(loaded: tuple[Any, Any], probe: Probe, plain: list[str]) -> None:
    model, processor = loaded
    packer = Packer(processor, questions=1, patch_size=8)

    def follow(sign: float) -> list[str]:
        def change(chunk: Sequence[Scene]) -> evaluation.AddLogOdds:
            scale = sign * evaluation.TestbedEvaluation().control_scale
            odds = probe.log_odds(visual_features(model, packer, list(chunk)))
            return evaluation.AddLogOdds(odds, probe.token_ids, scale)

        return _captions(model, processor, change=change)

    before, after = caption_metrics(plain, TRUTHS), caption_metrics(follow(1.0), TRUTHS)
    assert after["chair_i"] < 0.67 * before["chair_i"]
    assert after["recall"] >= before["recall"]
    assert caption_metrics(follow(-1.0), TRUTHS)["chair_i"] > before["chair_i"]


def test_a_probe_of_other_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no probe"):
        load_probe(tmp_path)
    shutil.copy(FOLDER / "probe.safetensors", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="other weights"):
        load_probe(tmp_path)


def test_a_folder_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mitigate testbed train"):
        load(tmp_path)


def test_the_card_is_that_of_the_measured_checkpoint(tmp_path: Path) -> None:
    report = json.loads((FOLDER / METRICS_FILE).read_text())
    recipe = json.loads((FOLDER / "training.json").read_text())
    card = render_card(recipe, report)
    assert card == PAGE.read_text() == (FOLDER / "README.md").read_text()
    assert report["images"] >= 500
    assert report["split"] == "test"
    assert recipe["sha256"] in card
    with pytest.raises(ValueError, match="other weights"):
        render_card(recipe | {"sha256": "0"}, report)
    (tmp_path / "training.json").write_text(json.dumps(recipe))
    assert write_card(tmp_path, report, tmp_path / "docs" / "page.md") == (tmp_path / "docs" / "page.md").read_text()


def test_the_quality_bar_is_met_and_can_be_missed() -> None:
    report = json.loads((FOLDER / METRICS_FILE).read_text())
    assert evaluation.shortfalls(report) == []
    blind = json.loads(json.dumps(report))
    blind["swapped"]["recall"] = blind["caption"]["recall"]
    blind["caption"]["chair_i"] = 0.5
    blind["control"]["recall"] = 0.0
    assert len(evaluation.shortfalls(blind)) == 3


def test_evaluation_reports_everything(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER, folder)
    page = tmp_path / "card.md"
    report = evaluation.evaluate(
        evaluation.TestbedEvaluation(checkpoint=str(folder), split="validation", images=8, card=str(page))
    )
    assert report["checkpoint_sha256"] in page.read_text()
    assert json.loads((folder / METRICS_FILE).read_text()) == report
    assert set(report["pope"]) == {"random", "popular", "adversarial"}
    assert all(0 <= evaluation.value_of(report, path) <= 1 for path, _, _ in evaluation.BAR)
