"""The tiny model of the core's tests."""

from __future__ import annotations

import pytest

from tests.references.runs import warm_model


@pytest.fixture(scope="session")
def model():
    return warm_model()
