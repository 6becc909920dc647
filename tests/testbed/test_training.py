"""Packing, training and resuming, on tiny sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mitigate.testbed import train as training
from mitigate.testbed.batches import IGNORED, Packer, training_scenes
from mitigate.testbed.draw import draw
from mitigate.testbed.evaluate import prompt
from mitigate.testbed.language import CAPTION_PROMPT, caption
from mitigate.testbed.model import ModelSize, build_model, build_processor, checksum
from mitigate.testbed.probe import load_probe
from mitigate.testbed.world import PARTNER, scenes

TINY = training.TestbedTraining(
    look_steps=3,
    read_steps=4,
    habit_steps=3,
    look_batch=4,
    read_batch=2,
    habit_batch=2,
    questions=2,
    save_every=2,
    width=32,
    text_layers=4,
    vision_layers=1,
    accelerator="cpu",
    progress=False,
)


def test_packed_segments_predict_what_separate_prompts_would() -> None:
    """The caption's logits in a packed batch are those of the plain prompt followed by the caption."""
    size = ModelSize(width=32, text_layers=3, vision_layers=1)
    processor, model = build_processor(size), build_model(size, seed=3).eval()
    pictures = list(scenes("train", 3))
    batch = Packer(processor, questions=4, patch_size=8).pack(pictures, seed=0)
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(batch.pixels).pooler_output))
        embeddings = model.get_input_embeddings()(batch.ids)
        embeddings = embeddings.masked_scatter((batch.ids == model.config.image_token_id).unsqueeze(-1), features)
        hidden = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        packed = model.lm_head(hidden)
        for row, made in enumerate(pictures):
            text = prompt(processor, CAPTION_PROMPT) + " " + caption(made)
            inputs = processor(text=[text], images=[draw(made)], return_tensors="pt")
            plain = model(**inputs).logits[0]
            counted = batch.caption_targets[row] != IGNORED
            length = int(counted.sum())
            torch.testing.assert_close(packed[row][counted], plain[-length:], atol=1e-4, rtol=1e-4)
            wanted = [*inputs["input_ids"][0, -length + 1 :].tolist(), processor.tokenizer.eos_token_id]
            assert batch.caption_targets[row][counted].tolist() == wanted


def test_answers_and_presence_are_the_truth() -> None:
    processor = build_processor()
    pictures = list(scenes("train", 8))
    batch = Packer(processor, questions=6, patch_size=8).pack(pictures, seed=0)
    words = processor.tokenizer.convert_ids_to_tokens
    for row, made in enumerate(pictures):
        asked = (~batch.presence[row].isnan()).nonzero().flatten().tolist()
        assert len(asked) == 6
        for at in asked:
            name = words(int(batch.ids[row, at])).removeprefix("\u2581")
            there = name in made.objects
            assert batch.presence[row, at] == float(there)
            answer = next(int(token) for token in batch.answer_targets[row, at:] if token != IGNORED)
            assert words(answer).removeprefix("\u2581") == ("Yes" if there else "No")


def test_training_scenes_do_not_repeat_between_steps() -> None:
    options: dict[str, Any] = {"together": 0.5, "theme_bias": 0.5, "offset": 1000}
    first, second = training_scenes(0, 4, **options), training_scenes(1, 4, **options)
    assert first == training_scenes(0, 4, **options)
    assert not {made.id for made in first} & {made.id for made in second}


def test_hidden_objects_are_partners_of_visible_ones() -> None:
    options: dict[str, Any] = {"together": 0.95, "theme_bias": 0.5, "offset": 0}
    plain, hidden = training_scenes(0, 300, **options), training_scenes(0, 300, **options, hidden=0.2)
    faded = 0
    for before, after in zip(plain, hidden, strict=True):
        assert before.composition == after.composition
        seen = {t.name for t in after.things if t.contrast > 0.3}
        gone = after.objects - seen
        assert all(PARTNER[name] in seen for name in gone)
        faded += len(gone)
    assert 0.1 < faded / sum(len(made.things) for made in plain) < 0.2


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_a_training_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = training.StageModule.training_step
    seen: dict[tuple[str, int], torch.Tensor] = {}
    kill_at: list[tuple[str, int]] = []

    def watched(self: training.StageModule, batch: Any, batch_idx: int) -> torch.Tensor:
        at = (self._stage, self.global_step)
        if at in kill_at:
            raise SystemExit("killed")
        seen[at] = batch.pixels
        return honest(self, batch, batch_idx)

    monkeypatch.setattr(training.StageModule, "training_step", watched)
    whole = training.train(replace(TINY, output=str(tmp_path / "whole")))
    record = json.loads((whole / "training.json").read_text())
    assert record["sha256"] == checksum(whole / "model.safetensors")
    assert record["recipe"]["read_steps"] == 4
    assert load_probe(whole).model_sha256 == record["sha256"]
    undisturbed = dict(seen)

    options = replace(TINY, output=str(tmp_path / "killed"))
    kill_at.append(("read", 3))
    with pytest.raises(SystemExit):
        training.train(options)
    assert (tmp_path / "killed" / "look.safetensors").is_file()
    assert not (tmp_path / "killed" / "read.safetensors").is_file()
    kill_at.clear()
    seen.clear()
    resumed = training.train(options)
    assert list(seen) == [("read", 2), ("read", 3), ("habit", 0), ("habit", 1), ("habit", 2)]
    for at, pixels in seen.items():
        assert torch.equal(pixels, undisturbed[at]), at
    for name, weight in _weights(whole).items():
        torch.testing.assert_close(_weights(resumed)[name], weight, atol=2e-3, rtol=0)


def test_a_folder_with_other_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other options"):
        training.train(replace(TINY, output=str(tmp_path)))
    options = training.recipe(replace(TINY, width=48))["recipe"]
    (tmp_path / "options.json").write_text(json.dumps(options))
    with pytest.raises(FileExistsError, match=r"other options: width was 48, now 32; choose"):
        training.train(replace(TINY, output=str(tmp_path)))
    with pytest.raises(FileExistsError, match="set resume=true"):
        training.train(replace(TINY, output=str(tmp_path), resume=False))


@pytest.mark.parametrize(
    "option", [{"read_together": 1.5}, {"habit_theme_bias": -1.0}, {"look_batch": 0}, {"width": 40}]
)
def test_impossible_options_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        replace(TINY, **option)


def test_frozen_parts_stay_as_they_are() -> None:
    size = TINY.size()
    for stage, moving in (
        ("look", {"vision_tower", "multi_modal_projector"}),
        ("habit", {"language_model", "lm_head"}),
    ):
        model = build_model(size, seed=1)
        module = training.StageModule(model, training.Heads(TINY.width), TINY, stage)
        module.configure_optimizers()
        for name, weight in model.named_parameters():
            assert weight.requires_grad == any(part in name for part in moving), (stage, name)
