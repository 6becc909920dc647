"""Tiny models and stacks for the core's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.references.tiny import PAD, make_inputs, tiny_llava


@pytest.fixture(scope="session")
def model():
    """A tiny random LLaVA with grouped-query attention; its own capture hooks are already installed."""
    model = tiny_llava(seed=0).eval()
    model.generate(**make_inputs(model, [(3, 1, 4)]), max_new_tokens=1, pad_token_id=PAD)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
