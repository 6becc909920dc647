"""``mitigate trace``: the account is readable, names no method, and wrong input ends in one or two lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mitigate.cli import main
from mitigate.report import overlays, trace
from mitigate.report.trace_text import Known, sections

ASK = "Describe the image."


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def record(method: str, step: int, layer: int | None = None, phase: str = "decode", **values: Any) -> dict[str, Any]:
    return {"method": method, "phase": phase, "step": step, "layer": layer, "values": values}


WORDS = {7: "cup", 8: "pot", 9: "</s>"}
KNOWN = Known(lambda token: WORDS[token], 6, {1: "0,0", 2: "0,1", 3: "1,0", 4: "1,1"}, ["A", " cup", ""])


def cells(records: list[dict[str, Any]], *, every: bool = False) -> list[dict[str, str]]:
    return [
        dict(zip(section.columns, row, strict=True))
        for section in sections(records, KNOWN, every=every)
        for row in section.rows
    ]


def test_candidates_show_what_is_known_of_each_and_which_was_chosen() -> None:
    (row,) = cells(
        [
            record(
                "any",
                1,
                candidates=[7, 8, 9],
                probabilities=[0.5, 0.3, 0.2],
                saliency=[0.1, 0.25, math.nan],
                rejected=[True, False, False],
                per_layer=[[0.1], [0.2], [math.nan]],
                threshold=0.2,
                fallback=False,
                chosen_place=1,
            )
        ]
    )
    assert row == {
        "step": "1",
        "token": "' cup'",
        "candidates (→ chosen)": "'cup' p 0.5 S 0.1 rejected | → 'pot' p 0.3 S 0.25 | '</s>' p 0.2",
        "threshold": "0.2",
        "fallback": "no",
    }


def test_every_value_shows_what_a_candidate_has_per_layer() -> None:
    values = {"candidates": [7, 8], "saliency": [0.1, 0.2], "per_layer": [[0.1, 0.25], [math.nan, 0.5]]}
    (row,) = cells([record("any", 1, **values, chosen_place=0)], every=True)
    assert row["per layer"] == "0.1 0.25 | – 0.5"
    assert set(row) == {"step", "token", "layer", "candidates (→ chosen)", "per layer"}


def test_layers_are_summed_up_or_listed_one_by_one() -> None:
    records = [
        record("any", 0, layer, "prefill", flagged=layer > 0, mass=0.25 * layer, head=3 - layer, low=[True, layer > 1])
        for layer in range(3)
    ]
    (row,) = cells(records)
    assert row == {
        "step": "0",
        "token": "'A'",
        "flagged": "layers 1, 2",
        "mass": "0.25 [0, 0.5]",
        "head": "3 2 1",
        "low": "4 of 6",
    }
    every = cells(records, every=True)
    assert [line["layer"] for line in every] == ["0", "1", "2"]
    assert [line["flagged"] for line in every] == ["no", "yes", "yes"]
    assert [line["low"] for line in every] == ["1 of 2", "1 of 2", "2 of 2"]


def test_values_over_key_columns_name_patches_and_tokens() -> None:
    score = [0.0, 0.1, 0.7, 0.2, 0.0, 0.0, 0.0]
    late = [0.0, 0.1, 0.0, 0.2, 0.0, 0.0, 0.9]
    rows = cells(
        [
            record("any", 1, score=score, anchors=[value > 0.15 for value in score], sources=[1, 3]),
            record("any", 2, score=[*late, 0.0], anchors=[False] * 8),
        ]
    )
    assert rows[0]["score"] == "most 0.7 at patch 0,1"
    assert rows[0]["anchors"] == "2 of 7"
    assert rows[0]["sources"] == "2 columns"
    assert rows[1]["score"] == "most 0.9 at token 0 'A'"
    assert (rows[1]["token"], rows[1]["sources"]) == ("end", "")


def test_methods_keep_their_order_and_undefined_numbers_are_dashes() -> None:
    found = sections([record("b", 0, x=math.nan), record("a", 0, x=None), record("b", 1, x=2e-7)], KNOWN)
    assert [section.method for section in found] == ["b", "a"]
    assert [row[2] for row in found[0].rows] == ["–", "2.0e-07"]


def traced(records: list[dict[str, Any]], grid: tuple[int, int] = (2, 2)) -> trace.Traced:
    picture = Image.new("RGB", (20, 20), (90, 90, 90))
    plain = trace.Answer("A pot", [1, 8], ["A", " pot"])
    stacked = trace.Answer("A cup", [1, 7, 9], ["A", " cup", ""])
    raster = trace.Raster([1, 2, 3, 4], grid, picture)
    return trace.Traced({"stack": "<b>x</b>"}, plain, stacked, records, KNOWN, [raster], {}, ["a note"])


def test_values_over_the_picture_are_collected_by_step_and_averaged_over_layers() -> None:
    records = [
        record("any", 0, 1, score=[9.0, 1.0, 0.0, 0.0, 2.0, 9.0]),
        record("any", 0, 2, score=[9.0, 3.0, 0.0, 0.0, 0.0, 9.0]),
        record("any", 1, 1, score=[9.0, 0.0, 4.0, 0.0, 0.0, 9.0, 9.0]),
        record("any", 0, neighbours=[2, 5], owners=[1, 1], zero=[0.0] * 6, heads=[1.0] * 5),
    ]
    sample = traced(records)
    found = trace.columns_of(sample, sample.rasters[0])
    assert set(found) == {("any", "score"), ("any", "neighbours")}
    np.testing.assert_allclose(found["any", "score"][0], [2, 0, 0, 1])
    np.testing.assert_allclose(found["any", "score"][1], [0, 4, 0, 0])
    np.testing.assert_allclose(found["any", "neighbours"][0], [0, 1, 0, 0])


def test_heat_is_brightest_and_marks_lie_where_the_value_is() -> None:
    picture = Image.new("RGB", (30, 20), (0, 0, 0))
    values = [0.0, 0.0, 0.0, 0.0, 0.0, 5.0]  # row 1, column 2 of 2 x 3
    drawn = np.asarray(overlays.over(picture, values, (2, 3)).convert("L"), dtype=float)
    high, wide = drawn.shape
    assert (wide, high) == (overlays.SIDE, overlays.SIDE * 2 // 3)
    blocks = drawn.reshape(2, high // 2, 3, wide // 3).mean((1, 3))
    assert blocks.argmax() == 5
    assert blocks[1, 2] > 10 * np.delete(blocks.ravel(), 5).max()
    framed = np.asarray(overlays.marked(picture, np.array(values) > 0, (2, 3)), dtype=float).sum(-1)
    assert framed[high // 2 :, 2 * wide // 3 :].sum() == framed.sum() > 0


def test_the_picture_the_model_saw_comes_back_from_its_input() -> None:
    torch = pytest.importorskip("torch")
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)

    class Processor:
        do_normalize, image_mean, image_std = True, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]

    pixels = (torch.from_numpy(colours / 255.0) - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.25])
    seen = overlays.seen_picture(pixels.permute(2, 0, 1), Processor())
    assert seen is not None
    np.testing.assert_array_equal(np.asarray(seen), colours)
    assert overlays.seen_picture(torch.zeros(4, 8), Processor()) is None


def test_the_page_escapes_marks_and_contains_everything(tmp_path: Path) -> None:
    sample = traced([record("attention", 0, attention=[0.0, 0.5, 0.1, 0, 0, 0]), record("any", 1, x=0.5)])
    files = {path.name for path in trace.write(tmp_path, sample)}
    assert files == {"trace.json", "trace.html", "overlay-attention-attention.png"}
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<mark> cup</mark>" in page
    assert "<mark> pot</mark>" in page
    assert "a note" in page
    assert "60 %" in page
    assert "<script" not in page
    assert "http" not in page
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["answers"]["stacked"]["text"] == "A cup"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.png", ASK], "picture nothing.png does not exist"),
        ([".", ASK], "picture . is a folder"),
        (["no.txt", ASK], "no.txt is no picture"),
        (["methods=[toy]", ASK], "takes a picture first"),
        (["testbed:test-0"], "needs a question"),
        (["testbed:test-0", "methods=[toy]"], "needs a question"),
        (["testbed:test-0", "  "], "the question is empty"),
        (["testbed:test-0", "Describe", "the", "image."], "put the whole question in quotes"),
        (["testbed:test-x", ASK], "no scene of the testbed"),
        (["testbed:test-0", ASK, "methods=[tox]"], "did you mean 'toy'?"),
        (["testbed:test-0", ASK, "decoding.num_beams=2"], "a trace follows one sequence"),
        (["testbed:test-0", ASK, "benchmark.limit=3"], "benchmark.limit=3: a trace has one picture and one question"),
        (["testbed:test-0", ASK, "benchmark=testbed"], "no benchmark; drop it"),
        (["testbed:test-0", ASK, "out="], "out= needs a folder"),
        (["testbed:test-0", ASK, "out=no.txt"], "is a file"),
        (["testbed:test-0", ASK, "--jsn"], "mitigate trace has no option '--jsn'"),
    ],
)
@pytest.mark.usefixtures("toys")
def test_wrong_input_is_one_or_two_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.txt").write_text("text", encoding="utf-8")
    code, out, err = outcome(capsys, "trace", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert 1 <= len(err.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["no.txt"]


@pytest.mark.usefixtures("toys")
def test_a_traced_answer_is_the_untraced_one_and_the_attention_is_a_distribution(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(
        capsys, "trace", "testbed:test-0", ASK, "methods=[toy]", "decoding.max_new_tokens=4", "out=here", "--json"
    )
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["answers"]["plain"] == data["answers"]["stacked"]  # the toy changes nothing
    assert len(data["answers"]["plain"]["tokens"]) == 4
    steps = [item for item in data["records"] if item["method"] == "attention"]
    assert [item["step"] for item in steps] == [0, 1, 2, 3]
    for item in steps:
        weights = item["values"]["attention"]
        assert len(weights) == data["prompt_length"] + item["step"]
        assert sum(weights) == pytest.approx(1.0, abs=1e-4)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "trace.json",
        "trace.html",
        "overlay-attention-attention.png",
    }
