"""Memory of the prompt's forward: attention weights of the rows that are read, never the matrix of all of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mitigate.core import Access, HiddenStates, Method, MethodState, ModelFacts, Point, Rows, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.registry import methods
from mitigate.testing.tiny import Prompt, TinyModel, tiny_model

TEXT = "dog car tree " * 100
PROMPTS = [Prompt(TEXT, (1,)), Prompt(f"{TEXT} street", (2,))]
HEADS = 4
STACKS = [["locore"], ["dleaf"], ["clva"], ["sgrs"], ["sgrs", "locore"]]


class Held(TorchDispatchMode):
    """What torch allocates while it is active: the largest storage, and the most that was alive at once, in bytes."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self._alive.get(storage._cdata)
        if storage._cdata in self._known or (known is not None and not known[0].expired()):
            return
        size = storage.nbytes()
        self._alive[storage._cdata] = (StorageWeakRef(storage), size)
        self.largest = max(self.largest, size)
        self._sum += size
        if self._sum > self.peak:  # what has been freed meanwhile is taken off only when it matters
            self._alive = {place: each for place, each in self._alive.items() if not each[0].expired()}
            self._sum = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._sum)


def prefill(tiny: TinyModel, generate: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Held:
    with Held([*tiny.model.parameters(), *tiny.model.buffers(), *inputs.values()]) as held:
        generate(**inputs, max_new_tokens=1, do_sample=False)
    return held


def held_by(tiny: TinyModel, names: list[str], inputs: dict[str, torch.Tensor]) -> Held:
    with Stack([methods().get(name)() for name in names]).attach(tiny.model, tiny.processor) as handle:
        return prefill(tiny, handle.generate, inputs)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_a_stack_that_needs_no_matrix_holds_what_plain_generate_holds(family: str) -> None:
    tiny = tiny_model(family)
    if family == "paligemma":  # the matrix of all rows is the model's own then
        tiny.model.set_attn_implementation("eager")
    inputs = tiny.inputs(PROMPTS)
    rows, columns = inputs["input_ids"].shape
    plain, matrix = prefill(tiny, tiny.model.generate, inputs), rows * HEADS * columns * columns * 4
    assert (plain.largest >= matrix) == (family == "paligemma")
    for names in STACKS:
        own = held_by(tiny, names, inputs)
        assert own.largest <= plain.largest, names
        if "sgrs" not in names or tiny.facts.causal_prompt:  # else one graph over the whole prompt
            assert own.peak <= 1.05 * plain.peak, names


def test_scr_reads_the_rows_of_the_question_alone() -> None:
    tiny = tiny_model("llava")
    inputs = tiny.inputs([Prompt("dog " * 40, (1,) * 8)])
    columns = inputs["input_ids"].shape[1]
    own = held_by(tiny, ["scr"], inputs)
    assert HEADS * 40 * columns * 4 <= own.largest < HEADS * 60 * columns * 4


class Looks(Method):
    """Notes the cache of the request it is in."""

    name: ClassVar[str] = "looks"
    summary: ClassVar[str] = "keeps weak references"
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.HIDDEN_STATES}))
    caches: ClassVar[list[weakref.ref[Any]]] = []

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        return [Subscription(point=Point.HIDDEN_STATES, access=Access.READ, layers=(0,), rows=Rows.LAST)]

    def on_hidden_states(self, event: HiddenStates, state: MethodState) -> None:
        state.count("seen", 1.0)
        self.caches.append(weakref.ref(event.request.cache))


@pytest.mark.parametrize("names", [[], ["sgrs"]], ids=["generate", "own loop"])
def test_nothing_of_a_request_but_what_was_counted_is_held_when_it_has_ended(names: list[str]) -> None:
    tiny = tiny_model("llava")
    Looks.caches.clear()
    with Stack([Looks(), *(methods().get(name)() for name in names)]).attach(tiny.model, tiny.processor) as handle:
        handle.generate(**tiny.inputs(PROMPTS[:1]), max_new_tokens=2, do_sample=False)
        gc.collect()
        assert [cache() for cache in Looks.caches] == [None] * len(Looks.caches)
        assert handle.telemetry()[0]["looks"]["seen"] == len(Looks.caches) >= 2


@pytest.mark.parametrize("bas_scope", ["forward", "sample"])
def test_no_graph_outlives_the_forwards_through_which_another_method_differentiates(bas_scope: str) -> None:
    tiny = tiny_model("llava")
    stack = Stack([methods().get("dleaf")(bas_scope=bas_scope), methods().get("clva")(), methods().get("sgrs")()])
    with stack.attach(tiny.model, tiny.processor) as handle:
        handle.generate(**tiny.inputs(PROMPTS[:1]), max_new_tokens=3, do_sample=False)
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is torch.Tensor and each.grad_fn is not None]
