"""Checkpoints that cannot be loaded: one or two lines that name the culprit and the remedy."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from transformers.utils import is_torchvision_available

from mitigate.adapters import load_model
from mitigate.adapters.explaining import explain
from mitigate.adapters.loading import _hub_can_be_reached
from mitigate.adapters.processors import load_processor
from mitigate.errors import ConfigError, DataError, MitigateError, UnsupportedModel
from mitigate.hubcache import cached_instead
from mitigate.testbed.model import checkpoint_path
from mitigate.testing.tiny import tiny_families, tiny_model

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


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (cut, DataError, "weights of .*copy them again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), DataError, "weights of .*copy them again"),
        (wider, DataError, "weights of .*: some have other shapes than its config.json says; .*copy them again"),
        (deeper, DataError, "its weights lack model.language_model.layers.8.* and 8 more"),
        (without("model.safetensors"), DataError, "has no safetensors"),
        (without("config.json"), DataError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "not valid JSON .*copy it again"),
        (without("processor_config.json"), DataError, "processor of .*copy them beside the weights"),
        (without("tokenizer.json", "tokenizer_config.json"), DataError, "processor of .*copy them beside the weights"),
        (lambda folder: (folder / "config.json").write_text(json.dumps(TEXT_MODEL)), UnsupportedModel, "text model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "foo"}'), UnsupportedModel, "`foo`"),
        (
            changed("processor_config.json", patch_size=None),
            DataError,
            "asked about one picture.* TypeError: .*\nits fi",
        ),
        (
            changed("processor_config.json", num_additional_image_tokens=0),
            DataError,
            "tokens in a row, but llava makes",
        ),
        (changed("tokenizer_config.json", pad_token=None), DataError, "asked about one picture.* padding token"),
        (changed("config.json", text_config={"hidden_size": "x"}), DataError, "load model .*expected int, got str"),
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


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere/", "a/b/c", "a/b c", "a/b--c"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_model(path)


def test_a_folder_has_no_revisions() -> None:
    with pytest.raises(ConfigError, match=r"model.revision=abc has no effect on a local folder"):
        load_model(str(checkpoint_path()), revision="abc")


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


def test_another_revision_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here, asked = "a" * 40, "b" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--maker--big"
    (folder / "snapshots" / here).mkdir(parents=True)
    (folder / "snapshots" / here / "config.json").write_text("{}")
    other = "HF_HUB_OFFLINE is set, and the local cache has another revision than {}\n.*model.revision={}, or get it: "
    with pytest.raises(DataError, match=other.format(asked, here) + f"hf download maker/big --revision {asked}"):
        load_model("maker/big", revision=asked)
    with pytest.raises(DataError, match=other.format("main", here) + "hf download maker/big$"):
        load_model("maker/big")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(here)
    with pytest.raises(DataError, match=other.format(asked, "null")):
        load_model("maker/big", revision=asked)
    assert cached_instead("maker/big", None) is cached_instead("maker/big", here) is None  # it has what was asked for


def test_loading_is_silent_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from transformers.utils import logging as bars

    bars.enable_progress_bar()
    names = ("transformers", "huggingface_hub", "accelerate")
    before = [logging.getLogger(name).level for name in names]
    try:
        for place, name in enumerate(names):
            logging.getLogger(name).setLevel(31 + place)
        load_model("testbed")
        assert capfd.readouterr() == ("", "")
        assert bars.is_progress_bar_enabled()
        assert [logging.getLogger(name).level for name in names] == [31, 32, 33]
    finally:
        for name, level in zip(names, before, strict=True):
            logging.getLogger(name).setLevel(level)


def test_what_is_asked_for_reaches_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def noted(what: str) -> Callable[..., Any]:
        return lambda folder, *more, **options: asked.update({what: (folder, *more, options)}) or {}

    def weights(folder: str, **options: Any) -> Any:
        noted("weights")(folder, **options)
        raise OSError("enough")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", weights)
    monkeypatch.setattr("mitigate.adapters.processors.load_processor", noted("processor"))
    for name in ("stored_numbers", "_bring_family"):
        monkeypatch.setattr(f"mitigate.adapters.loading.{name}", noted(name))
    monkeypatch.setattr("mitigate.adapters.loading._hub_can_be_reached", lambda: True)
    with pytest.raises(MitigateError):
        load_model("a/b", dtype="bfloat16", attn_implementation="eager", revision="c1", device="meta")
    common = {"revision": "c1", "trust_remote_code": False, "local_files_only": False}
    given = {"dtype": torch.bfloat16, "attn_implementation": "eager", "device_map": {"": "meta"}}
    assert asked == {
        "stored_numbers": ("a/b", "c1", {"local": False}),
        "_bring_family": ("a/b", common),
        "processor": ("a/b", None, common),
        # other files than safetensors are unpickled
        "weights": ("a/b", {"use_safetensors": True, "output_loading_info": True, **given, **common}),
    }


def test_a_package_that_brings_a_family_is_imported_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of the checkpoint is read: its import registers the classes."""

    def imported(name: str) -> Any:
        raise ImportError(f"{name} came first")

    known = SimpleNamespace(names=lambda: ["mine"], get=imported)
    monkeypatch.setattr("mitigate.adapters.loading.adapters", lambda: known)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(DataError, match="mine came first"):
        load_model(str(folder))


@pytest.mark.parametrize("family", tiny_families())
def test_a_local_folder(family: str, tmp_path: Path) -> None:
    """Saved and loaded, a model of every family answers as before, with the processor it was saved with."""
    tiny = tiny_model(family)
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_model(str(tmp_path))
    without_videos = [str(warning.message) for warning in caught if "videos do not" in str(warning.message)]
    videos = "video_processor" in getattr(transformers, type(tiny.processor).__name__).get_attributes()
    assert len(without_videos) == (videos and not is_torchvision_available())
    assert type(loaded.processor).__name__ == type(tiny.processor).__name__
    assert loaded.adapter.family == family
    picture = Image.effect_noise((40, 28), 80).convert("RGB")
    inputs = loaded.adapter.inputs(tiny.model, tiny.processor, ["what is there"], [[picture]])
    again = loaded.inputs(["what is there"], [[picture]])
    assert inputs.keys() == again.keys()
    for name, value in inputs.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[name])), name
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, loaded.model(**again).logits)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision there is a video processor")
def test_a_processor_without_videos_refuses_them(tmp_path: Path) -> None:
    tiny = tiny_model("internvl")
    tiny.processor.save_pretrained(tmp_path)
    tiny.model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["video_processor"] = {"video_processor_type": "InternVLVideoProcessor"}  # as in the hub's repositories
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"pictures work and videos do not.*pip install 'mitigate\[video\]'"):
        processor = load_processor(str(tmp_path))
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    with pytest.raises(UnsupportedModel, match=r"videos need: pip install 'mitigate\[video\]'"):
        processor(text=["x"], videos=[[Image.new("RGB", (28, 28))]])


# ------------------------------------------------------------------------------------------------------- chat templates

TEMPLATE = (
    "{% for message in messages %}Q:{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}"
    "{% endfor %} A:"
)


def test_another_chat_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    for template in (TEMPLATE, str(tmp_path / "mine.jinja")):
        loaded = load_model("testbed", chat_template=template)
        assert loaded.adapter.prompt_text(loaded.processor, "what", 1) == "Q:<image>what A:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", "model.chat_template=nowhere.jinja cannot be read: No such file"),
        ("{{ messages", "no template that works: unexpected end of template"),
        ("{{ 1 // 0 }}", "no template that works: integer division or modulo by zero"),
        ("hello", "leaves the user's words out: a question becomes 'hello'"),
        (
            "{{ messages[0].content[-1].text }}",
            "does not write a picture as the processor of llava wants it: ",
        ),
    ],
)
def test_a_chat_template_that_does_not_work(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_model("testbed", chat_template=template)


# ------------------------------------------------------------------------------------------------- what the hub answers


def answer(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> OSError:
    """What transformers raises when the hub answers with a status: its own error over the hub's."""
    try:
        try:
            raise kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))
        except HfHubHTTPError as error:
            raise OSError("You cannot have it.\nReally.") from error
    except OSError as error:
        return error


ASKED = {"attn_implementation": "sdpa", "device_map": None, "quantization": None, "revision": None}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(403, GatedRepoError), "is gated\naccept its licence at .*/org/model, then log in with: hf auth login"),
        (answer(403), "is gated\naccept its licence"),
        (answer(401, RepositoryNotFoundError), "no such model, or it is private\ncheck model.path, or .*hf auth login"),
        (answer(404, RevisionNotFoundError), "no such revision; correct model.revision"),
        (ValueError("X does not support torch.nn.functional.scaled_dot_product_attention yet"), "implementation=eager"),
        (ValueError("x contains custom code; pass `trust_remote_code=True`"), "read that code, then set model.trust_"),
        (ImportError("Using bitsandbytes needs it"), "needs bitsandbytes, which is not installed: pip install bits"),
        (ImportError("\nXImageProcessor requires the Torchvision library"), "needs torchvision, .*pip install torch"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory while loading.*\nuse model.dtype=bfloat16"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory while loading"),
    ],
)
def test_what_the_hub_and_packages_say(error: Exception, message: str) -> None:
    explained = explain(error, "org/model", local=False, asked=ASKED)
    assert isinstance(explained, MitigateError)
    assert re.search(message, str(explained)), explained
    assert len(str(explained).splitlines()) <= 2


def test_a_hub_behind_a_proxy_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not _hub_can_be_reached()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert _hub_can_be_reached()


def test_an_offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("an offline hub was looked for"))
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set, and it is not in the local cache"):
        load_model("nobody/nothing-of-this-name")


def test_code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.Net"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UnsupportedModel, match=r"code of its own.*\n.*model.trust_remote_code=true"):
        load_model(str(folder))
