"""A family that transformers lacks, from a package of its own: found, loaded from a folder, run."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mitigate.adapters import load_model
from mitigate.adapters.generic import GenericAdapter
from mitigate.cli import main
from mitigate.core.stack import Stack
from mitigate.methods.locore import LocoRE
from mitigate.testing.tiny import tiny_model
from tests.docs.pages import DOCS, blocks
from tests.outside import install, visible

PACKAGE = Path(__file__).parent / "mitigate-pocket"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package on Python's path, with the entry point of its pyproject.toml."""
    source = PACKAGE / "src" / "mitigate_pocket"
    files = {file.name: file.read_text() for file in source.glob("*.py")}
    assert 'pocket_vl = "mitigate_pocket.adapter:PocketAdapter"' in (PACKAGE / "pyproject.toml").read_text()
    site = tmp_path_factory.mktemp("site")
    install(site, "mitigate-pocket", files, {"models": {"pocket_vl": "{}.adapter:PocketAdapter"}})
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PROCESSOR_MAPPING)
    with pytest.MonkeyPatch.context() as patch, visible(patch, site):
        yield
    CONFIG_MAPPING._extra_content.pop("pocket_vl", None)
    for mapping in mappings:
        for config in [config for config in mapping._extra_content if config.__module__.startswith("mitigate_pocket")]:
            del mapping._extra_content[config]


@pytest.fixture(scope="module")
def checkpoint(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as its trainer would have left it on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny = tiny_model("pocket_vl")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def test_its_own_tests_pass(installed: None) -> None:
    tests = runpy.run_path(str(PACKAGE / "tests" / "test_pocket.py"))
    names = [name for name in tests if name.startswith("test_")]
    assert len(names) == 3
    for name in names:
        tests[name]()


def test_its_checkpoint_is_loaded_and_answers_as_before(checkpoint: Path) -> None:
    loaded, tiny = load_model(str(checkpoint)), tiny_model("pocket_vl")
    assert type(loaded.adapter).__module__ == "mitigate_pocket.adapter"
    assert not loaded.facts.spatial_grid
    inputs = loaded.inputs(["is there a dog ?"], [[Image.new("RGB", (30, 20), "red")]])
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with Stack([LocoRE(beta=0.0)]).attach(loaded.model, loaded.processor):
        ours = loaded.model.generate(**inputs, **settings)
    assert torch.equal(ours, tiny.model.generate(**inputs, **settings))


def test_the_command_line_runs_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["list", "families", "--json"]) == 0
    assert "pocket_vl" in capsys.readouterr().out
    chosen = ["model=hf", f"model.path={checkpoint}", "methods=[locore]", "benchmark=testbed", "benchmark.limit=1"]
    assert main(["run", *chosen, "decoding.max_new_tokens=2", "tracker=none", "trainer.accelerator=cpu"]) == 0
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["stack"] == "locore"


def test_the_generic_adapter_finds_the_same(installed: None) -> None:
    """It asks the processor what the package's adapter knows."""
    tiny = tiny_model("pocket_vl")
    pictures = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green")]
    inputs = dict(tiny.adapter.inputs(tiny.model, tiny.processor, ["is there a dog ?"], [pictures]))
    generic = GenericAdapter(tiny.model, tiny.processor)
    assert generic.facts(tiny.model) == tiny.facts
    first, second = (
        adapter.layout(tiny.model, inputs["input_ids"], inputs["attention_mask"], inputs, tiny.processor)
        for adapter in (generic, tiny.adapter)
    )
    assert torch.equal(first.roles, second.roles)
    assert [span.stop for span in first.images[0]] == [span.stop for span in second.images[0]]


def test_the_page_shows_the_adapter() -> None:
    shown = [block.text for block in blocks(DOCS / "contribute" / "add-a-model.md") if block.fragment == "adapter.py"]
    assert shown == [(PACKAGE / "src" / "mitigate_pocket" / "adapter.py").read_text()]
