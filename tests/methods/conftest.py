"""The tiny model of the methods' tests."""

from __future__ import annotations

import pytest

from tests.references.runs import warm_model


@pytest.fixture(scope="session")
def model():
    return warm_model()
