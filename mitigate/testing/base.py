"""Building blocks of the conformance suite: what a check is, what it gets and how it says what is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias

from mitigate.core.method import Method
from mitigate.errors import DuplicateName

if TYPE_CHECKING:
    from mitigate.testing.tiny import TinyModel

Status = Literal["passed", "failed", "skipped", "expected failure", "unexpected pass"]


class CheckFailure(Exception):
    """A method breaks a rule. One message: the method, the point and layer where it matters, what is expected."""


class Skip(Exception):
    """Raised by a check that has nothing to look at, with the reason; shown as skipped, never silent."""


def fail(message: str) -> NoReturn:
    """Raise a `CheckFailure`."""
    raise CheckFailure(message)


def ensure(condition: bool, message: str) -> None:
    """Raise a `CheckFailure` with this message unless the condition holds."""
    if not condition:
        raise CheckFailure(message)


@dataclass(frozen=True)
class Subject:
    """What a check gets.

    Parameters
    ----------
    method
        The instance under test.
    tiny
        A tiny random model of one family; ``None`` for checks without a model.
    seed
        Where a check's own random draws start.
    """

    method: Method
    tiny: TinyModel | None = None
    seed: int = 0

    @property
    def plugin(self) -> type[Method]:
        """The class under test."""
        return type(self.method)

    @property
    def name(self) -> str:
        """The method's name, or its class's if it has none."""
        return str(getattr(self.plugin, "name", self.plugin.__name__))

    @property
    def model(self) -> TinyModel:
        """The tiny model of a check that needs one."""
        if self.tiny is None:
            raise RuntimeError("this check needs a model: declare it with @check(needs_model=True)")
        return self.tiny


CheckFunction: TypeAlias = Callable[[Subject], None]
#: Why a check does not apply to a method, or ``None`` if it does.
Applies: TypeAlias = Callable[[Method], "str | None"]


def always(method: Method) -> str | None:
    """Apply a check to every method."""
    return None


@dataclass(frozen=True)
class Check:
    """One rule every method keeps.

    Parameters
    ----------
    name
        Name of the function, ``check_<what>``.
    run
        The function; returns if the rule is kept, raises `CheckFailure` or `Skip` otherwise.
    needs_model
        Whether it is run once per tiny model.
    once
        Whether it looks at the class only, so that one parameter set and one tiny model are enough.
    applies
        Reason for not applying to a method, if there is one.
    """

    name: str
    run: CheckFunction
    needs_model: bool = False
    once: bool = False
    applies: Applies = always

    @property
    def summary(self) -> str:
        """The rule in one line."""
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class CheckResult:
    """What came of a check.

    Parameters
    ----------
    method
        Name of the method.
    check
        Name of the check.
    params
        The parameter set under test, as text; empty for the defaults.
    family
        Family of the tiny model; empty without a model.
    status
        The outcome; ``failed`` and ``unexpected pass`` are failures.
    message
        What is wrong, or the reason of a skip or an expected failure.
    seconds
        Time it took.
    error
        The exception behind a failure, for its traceback.
    """

    method: str
    check: str
    params: str
    family: str
    status: Status
    message: str
    seconds: float
    error: Exception | None = field(default=None, repr=False, compare=False)

    @property
    def bad(self) -> bool:
        """Whether the method does not conform."""
        return self.status in ("failed", "unexpected pass")


#: Every check by name, in the order of definition.
CHECKS: dict[str, Check] = {}


def check(
    *, needs_model: bool = False, once: bool = False, applies: Applies = always
) -> Callable[[CheckFunction], CheckFunction]:
    """Add a function to the catalogue of checks.

    Parameters
    ----------
    needs_model
        Run it with a tiny model of every family.
    once
        Run it for one parameter set and one family only, because it looks at the class.
    applies
        Reason for not applying to a method, if there is one.
    """

    def decorate(function: CheckFunction) -> CheckFunction:
        name = function.__name__
        known = CHECKS.get(name)
        if known is not None and known.run.__module__ != function.__module__:
            raise DuplicateName(f"two checks are called {name}: {known.run.__module__} and {function.__module__}")
        CHECKS[name] = Check(name, function, needs_model, once, applies)
        return function

    return decorate
