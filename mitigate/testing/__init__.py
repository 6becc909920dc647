"""Conformance suite: whether a method keeps the contract.

Works without pytest: `check_method` returns results, ``mitigate check NAME`` prints them. In a test file of a package,
`parametrize_with_checks` makes one test per check::

    from mitigate.testing import parametrize_with_checks
    from mitigate_foo.foo import Foo

    @parametrize_with_checks([Foo])
    def test_foo_conforms(method, check):
        check(method)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.testing.base import Check as Check
    from mitigate.testing.base import CheckFailure as CheckFailure
    from mitigate.testing.base import CheckResult as CheckResult
    from mitigate.testing.base import Skip as Skip
    from mitigate.testing.base import Subject as Subject
    from mitigate.testing.base import ensure as ensure
    from mitigate.testing.base import fail as fail
    from mitigate.testing.parametrize import parametrize_with_checks as parametrize_with_checks
    from mitigate.testing.suite import check_method as check_method
    from mitigate.testing.suite import yield_checks as yield_checks

_PUBLIC = {
    **dict.fromkeys(("Check", "CheckFailure", "CheckResult", "Skip", "Subject", "ensure", "fail"), "base"),
    **dict.fromkeys(("check_method", "yield_checks"), "suite"),
    "parametrize_with_checks": "parametrize",
}
__all__ = [
    "Check",
    "CheckFailure",
    "CheckResult",
    "Skip",
    "Subject",
    "check_method",
    "ensure",
    "fail",
    "parametrize_with_checks",
    "yield_checks",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562): the checks on models load torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mitigate.testing.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mitigate.testing' has no attribute {name!r}")
