"""Every registered method passes the whole conformance suite, in all its parameter sets."""

from __future__ import annotations

from mitigate.registry import methods
from mitigate.testing import parametrize_with_checks


@parametrize_with_checks([methods().get(name) for name in methods().names()])
def test_every_method_conforms(method, check):
    check(method)
