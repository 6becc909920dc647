"""Every registered method passes the conformance suite.

All parameter sets of all methods are checked by ``scripts/make_docs.py --conformance``, whose stored result is tied to
the code of the methods, and on all families by ``scripts/support_matrix.py``. Here every check meets one parameter set
of every method, another one from check to check, and every method meets some checks on every family, so that a change
anywhere else is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mitigate.registry import methods
from mitigate.testing.base import Skip
from mitigate.testing.suite import Case, plan_cases
from mitigate.testing.tiny import reference_family, tiny_families


def one_set_each(name: str) -> Iterator[Case]:
    """Yield one case per check and family; which instance it is goes round."""
    of_check: dict[tuple[str, str], list[Case]] = {}
    for case in plan_cases(methods().get(name)):
        of_check.setdefault((case.check.name, case.family), []).append(case)
    for index, cases in enumerate(of_check.values()):
        yield cases[index % len(cases)]


def some_checks(number: int, name: str) -> Iterator[Case]:
    """Yield a few of a method's checks on every other family; which ones goes round."""
    others = [family for family in tiny_families() if family != reference_family()]
    for place, family in enumerate(others, start=number):
        cases = plan_cases(methods().get(name)(), families=[family])
        cases = [case for case in cases if case.check.needs_model and not case.check.once]
        yield from cases[place % STRIDE :: STRIDE]


#: One of so many checks on models runs on each family that is not the reference.
STRIDE = 23
CASES = [case for name in methods().names() for case in one_set_each(name)]
FAMILY_CASES = [case for number, name in enumerate(methods().names()) for case in some_checks(number, name)]


def _id(case: Case) -> str:
    return f"{case.method.name}-{case.check.name}-{case.family}"


@pytest.mark.parametrize("case", [*CASES, *FAMILY_CASES], ids=_id)
def test_every_method_conforms(case: Case) -> None:
    try:
        case.call()
    except Skip as skip:
        pytest.skip(str(skip))


def test_every_parameter_set_meets_a_check() -> None:
    met = {repr(case.method) for case in CASES if case.check.needs_model}
    for name in methods().names():
        every = {repr(case.method) for case in plan_cases(methods().get(name)) if case.check.needs_model}
        assert every <= met, name
