"""The pytest side of the suite: one test per check, instance and family. Nothing else here needs pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mitigate.core.method import Method
from mitigate.errors import ConfigError
from mitigate.testing.base import Skip, Subject
from mitigate.testing.suite import Case, Extra, plan_cases


@dataclass(frozen=True)
class _Call:
    """What a test gets as ``check``: runs the check on the method; a check that does not apply skips the test."""

    case: Case

    def __call__(self, method: Method) -> None:
        import pytest

        if method is not self.case.method:
            raise ConfigError("call check(method) with the method of the same test")
        try:
            self.case.call()
        except Skip as skip:
            pytest.skip(str(skip))


def parametrize_with_checks(
    methods: Iterable[Method | type[Method]],
    *,
    families: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    extra_checks: Iterable[Extra] = (),
    strict: bool = True,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a test of ``(method, check)``, which calls ``check(method)``; ``-k check_x`` selects one check.

    Parameters
    ----------
    methods
        Instances, or classes for their defaults and every set of their ``test_params()``.
    families, expected_failures, extra_checks
        As for `check_method`.
    strict
        Whether an expected failure that passes fails the test.

    Raises
    ------
    MitigateError
        If the arguments are wrong; see `plan_cases`.
    """
    try:
        import pytest
    except ImportError as error:
        raise ConfigError("this decorator needs pytest: install it, or use check_method or `mitigate check`") from error

    extra, found, seen = list(extra_checks), [], set()
    for method in methods:
        for case in plan_cases(
            method, families=families, expected_failures=expected_failures, extra_checks=extra, strict=strict
        ):
            of_class = (case.check.name, type(case.method), case.family)
            if case.check.once and of_class in seen:
                continue
            seen.add(of_class)
            marks = [pytest.mark.xfail(reason=case.expected, strict=case.strict)] if case.expected else []
            found.append(pytest.param(case.method, _Call(case), id=_id(case), marks=marks))
    return pytest.mark.parametrize(("method", "check"), found)


def _id(case: Case) -> str:
    """Write ``NAME[beta=0.5,window=3]-FAMILY-check_x``."""
    params = case.params.replace(", ", ",")
    parts = (Subject(case.method).name + (f"[{params}]" if params else ""), case.family, case.check.name)
    return "-".join(part for part in parts if part)
