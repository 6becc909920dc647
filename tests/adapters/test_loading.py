"""Checkpoints that cannot be loaded: one or two lines that name the culprit and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mitigate.adapters import load_model
from mitigate.errors import ConfigError, DataError, MitigateError, UnsupportedModel
from mitigate.testbed.model import checkpoint_path

TEXT_MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))


def deeper(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (cut, DataError, "weights of .*copy them again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), DataError, "weights of .*copy them again"),
        (wider, DataError, "weights of .*copy them again"),
        (deeper, DataError, "its weights lack model.language_model.layers.8.* and 8 more"),
        (without("model.safetensors"), DataError, "has no safetensors"),
        (without("config.json"), DataError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "not valid JSON .*copy it again"),
        (without("processor_config.json"), DataError, "processor of .*copy them beside the weights"),
        (without("tokenizer.json", "tokenizer_config.json"), DataError, "processor of .*copy them beside the weights"),
        (lambda folder: (folder / "config.json").write_text(json.dumps(TEXT_MODEL)), UnsupportedModel, "text model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "foo"}'), UnsupportedModel, "`foo`"),
    ],
)
def test_a_damaged_folder(folder: Path, damage: Callable[[Path], None], kind: type, message: str) -> None:
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        load_model(str(folder))
    assert 1 <= len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["flash_attention_2", "foo"])
def test_the_attention_implementation_is_to_blame(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attn_implementation={name} .*use sdpa or eager"):
        load_model("testbed", attn_implementation=name)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere/", "a/b/c"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_model(path)


def test_a_hub_id_without_a_hub(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_address(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MitigateError, match=r"hub cannot be reached.*\n.*model.path to a local folder"):
        load_model("nobody/nothing-of-this-name")
    assert capfd.readouterr() == ("", "")


def test_loading_is_silent_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from transformers.utils import logging as bars

    bars.enable_progress_bar()
    level = logging.getLogger("transformers").level
    load_model("testbed")
    assert capfd.readouterr() == ("", "")
    assert bars.is_progress_bar_enabled()
    assert logging.getLogger("transformers").level == level
