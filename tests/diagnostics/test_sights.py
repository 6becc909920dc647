"""What observers take for the picture: patches alone, and only in layers where the row can still see some."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mitigate.core.roles import Role
from mitigate.core.stack import Stack
from mitigate.diagnostics.credit import Credit, _seen
from mitigate.diagnostics.drift import Drift
from mitigate.diagnostics.entropy import Entropy
from mitigate.testing.tiny import PROMPTS, tiny_model
from tests.diagnostics.worlds import row

WINDOW, FULL = 24, 1  # of the tiny Gemma 3: the latest keys, except in one layer


def observed(family: str, diagnostic: Any, steps: int) -> tuple[Any, Any]:
    """The observer's state after a request of one sample with one picture, and the request's layout."""
    tiny = tiny_model(family)
    with Stack({"o": diagnostic.observer(tiny.facts)}).attach(tiny.model, tiny.processor) as handle:
        handle.generate(**tiny.inputs(PROMPTS[:1]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        assert handle.bus is not None
        assert handle.bus.last_request is not None
        return handle.bus.last_request.state("o"), handle.bus.last_request.layout


@pytest.mark.parametrize("diagnostic", [Entropy(), Drift(objects=False)], ids=lambda item: item.name)
def test_a_layer_that_has_let_the_picture_go_measures_nothing(diagnostic: Any) -> None:
    state, layout = observed("gemma3", diagnostic, 16)
    last_patch, gone = int(layout.images[0][0].positions.max()), 0
    for step, measures in enumerate(diagnostic.measure(state, 0)):
        out_of_sight = layout.prompt_length - 1 + step - last_patch >= WINDOW
        gone += out_of_sight
        # Drift compares with the early layer, which is one of those that let go
        expected = [out_of_sight and (layer != FULL or diagnostic.name == "drift") for layer in range(4)]
        name = "entropy" if diagnostic.name == "entropy" else "bhattacharyya_noise"
        assert [math.isnan(value) for value in measures[name]] == expected
    assert 0 < gone < 16


def test_line_breaks_of_a_picture_are_no_patches() -> None:
    state, layout = observed("llava_next", Entropy(), 1)
    patches = sum(len(span.positions) for span in layout.images[0])
    assert Entropy().measure(state, 0)[0]["image_tokens"] == patches < int((layout.roles == Role.IMAGE).sum())
    assert _seen(observed("llava_next", Credit(), 1)[0], 0)["image_tokens"] == patches


def test_words_that_see_no_picture_somewhere_are_left_out_and_counted() -> None:
    def words(blind: bool) -> list[Any]:
        found = []
        for image, label in enumerate(("grounded", "hallucinated", "other") * 4):
            value = [None if blind else 1.0 + image, 2.0, 1.5]
            entropy = {
                "entropy": value,
                "mass": [0.5 + 0.01 * image, 0.4, 0.3 + 0.02 * image],
                "abnormal": [1] * 3,
                "image_tokens": 9,
            }
            sides = {f"bhattacharyya_{side}": value for side in ("noise", "anchors")}
            others = {
                f"{name}_{side}": value for name in ("jensen_shannon", "hellinger") for side in ("noise", "anchors")
            }
            found.append(row(f"i{image}", label, {**entropy, **sides, **others, "contrast": 0.1}))
        return found

    for diagnostic in (Entropy(resamples=100), Drift(resamples=100, early="0", middle="1", deep="2")):
        sighted, both = diagnostic.analyse(words(False)), diagnostic.analyse(words(False) + words(True))
        assert both.numbers == sighted.numbers
        assert both.data["counts"] == sighted.data["counts"]
        assert both.notes[0].startswith("12 words do not count")
        assert not diagnostic.analyse(words(True)).numbers
