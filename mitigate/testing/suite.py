"""Running the checks: which apply to a method, one by one, with what is expected to fail."""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mitigate.core.method import Method
from mitigate.errors import ConfigError, HookError, MitigateError, PluginError, UnknownName, described
from mitigate.registry import suggestion
from mitigate.testing import (
    checks_api,
    checks_beams,
    checks_composition,
    checks_conduct,
    checks_config,
    checks_cost,
    checks_effect,
    checks_import,
    checks_lifecycle,
    checks_numerics,
    checks_parameters,
    checks_places,
    checks_tags,
)
from mitigate.testing.base import CHECKS, Check, CheckFailure, CheckFunction, CheckResult, Skip, Status, Subject
from mitigate.testing.subjects import instances, params_text, registered

#: Modules that fill the catalogue, in the order in which their checks run.
MODULES = (
    checks_api,
    checks_config,
    checks_tags,
    checks_import,
    checks_lifecycle,
    checks_conduct,
    checks_effect,
    checks_parameters,
    checks_numerics,
    checks_beams,
    checks_places,
    checks_cost,
    checks_composition,
)

OnFail: TypeAlias = Literal["raise", "warn"] | None
Extra: TypeAlias = Check | CheckFunction


@dataclass(frozen=True)
class Case:
    """One check of one instance, on one family of models.

    Parameters
    ----------
    check
        The rule.
    method
        The instance under test.
    family
        Family of the tiny model; empty without a model.
    expected
        Why the check is expected to fail; empty if it is not.
    strict
        Whether passing in spite of that is a failure.
    """

    check: Check
    method: Method
    family: str = ""
    expected: str = ""
    strict: bool = True

    @property
    def params(self) -> str:
        """The parameters of the instance as text; empty for its defaults and where any instance does."""
        return "" if self.check.once else params_text(self.method)

    def call(self) -> None:
        """Run the check: it returns, or raises `CheckFailure`, `Skip` or whatever the method raises."""
        reason = self.check.applies(self.method)
        if reason is not None:
            raise Skip(reason)
        subject = Subject(self.method)
        if self.check.needs_model:
            from mitigate.testing.tiny import tiny_model

            subject = Subject(self.method, tiny_model(self.family))
        with registered(type(self.method)):
            self.check.run(subject)

    def run(self) -> CheckResult:
        """Run the check and say what came of it."""
        began, status, message = time.perf_counter(), "passed", ""
        failure: Exception | None = None
        try:
            self.call()
        except Skip as skip:
            return self._result("skipped", str(skip), began)
        except Exception as error:  # a method under test may raise anything
            status, message, failure = "failed", explain(error, _file(self.method)), error
        if self.expected and failure is not None:
            status, message = "expected failure", self.expected
        elif self.expected and self.strict:
            status = "unexpected pass"
            message = f"passes now: take {self.check.name} out of expected_failures ({self.expected})"
        return self._result(status, message, began, failure)  # type: ignore[arg-type]

    def _result(self, status: Status, message: str, began: float, error: Exception | None = None) -> CheckResult:
        name = Subject(self.method).name
        seconds = time.perf_counter() - began
        return CheckResult(name, self.check.name, self.params, self.family, status, message, seconds, error)


def explain(error: Exception, source: str = "") -> str:
    """Write an exception in one message: a check's own words, or what the method raised and where in its file."""
    if isinstance(error, CheckFailure):
        return str(error)
    if isinstance(error, MitigateError):  # its message names the place
        return f"raised {type(error).__name__}: {error}"
    return f"raised {described(error, source)}"


def own_error(error: BaseException | None) -> str:
    """Return what is behind a failure if it is not a check's own verdict: one mistake fails many checks alike."""
    known = ""
    while error is not None:
        if isinstance(error, HookError) and error.__cause__ is not None:
            return repr(error.__cause__)
        if not isinstance(error, CheckFailure):
            known = repr(error)
        error = error.__cause__ or error.__context__
    return known


def catalogue(extra_checks: Iterable[Extra] = ()) -> list[Check]:
    """Return every check in order, then the extra ones; a plain function becomes a check without a model."""
    extra = [item if isinstance(item, Check) else Check(item.__name__, item) for item in extra_checks]
    own = [known for module in MODULES for known in CHECKS.values() if known.run.__module__ == module.__name__]
    return [*own, *extra]


def yield_checks(method: Method, *, extra_checks: Iterable[Extra] = ()) -> Iterator[Check]:
    """Yield the checks that apply to a method."""
    for known in catalogue(extra_checks):
        if known.applies(method) is None:
            yield known


def plan_cases(
    method: Method | type[Method],
    *,
    families: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    extra_checks: Iterable[Extra] = (),
    strict: bool = True,
    only: Sequence[str] = (),
) -> list[Case]:
    """Return what `check_method` runs, in order: check by check, all instances and families of each.

    Parameters
    ----------
    method, families, expected_failures, extra_checks
        As for `check_method`.
    strict
        Whether an expected failure that passes is a failure.
    only
        Names of the checks to run; empty for all.

    Raises
    ------
    UnknownName
        If a check or a family is unknown.
    ConfigError
        If an expected failure has no reason.
    PluginError
        If ``method`` is no method, or cannot be built.
    """
    checks = catalogue(extra_checks)
    subjects = _subjects(method)
    expected = dict(expected_failures or {})
    _known([*expected, *only], [known.name for known in checks], "check")
    for name, reason in expected.items():
        if not (isinstance(reason, str) and reason.strip()):
            raise ConfigError(f"expected_failures: {name} has no reason; write why it is expected to fail")
    chosen = [known for known in checks if not only or known.name in only]
    on = _families(families) if families or any(known.needs_model for known in chosen) else []
    once_on = _one_family(subjects[0], on) if any(known.needs_model and known.once for known in chosen) else []
    return [
        Case(known, subject, family, expected.get(known.name, ""), strict)
        for known in chosen
        for subject in (subjects[:1] if known.once else subjects)
        for family in ((once_on if known.once else on) if known.needs_model else [""])
    ]


def check_method(
    method: Method | type[Method],
    *,
    families: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    extra_checks: Iterable[Extra] = (),
    on_fail: OnFail = "raise",
    callback: Callable[[CheckResult], None] | None = None,
    only: Sequence[str] = (),
) -> list[CheckResult]:
    """Check that a method keeps the contract.

    Parameters
    ----------
    method
        An instance; or a class, for its defaults and every set of its ``test_params()``.
    families
        Families of the tiny models; ``None`` for the reference family, ``tiny_families()`` for all, empty for the
        checks without a model.
    expected_failures
        Check -> reason, for rules the method cannot keep. Strict: a check that passes although it is listed fails.
    extra_checks
        Further checks: functions of a `Subject`, or `Check` for those that need a model.
    on_fail
        ``"raise"`` stops at the first failure, ``"warn"`` warns about each, ``None`` only returns them.
    callback
        Called with every result as it comes.
    only
        Names of the checks to run; empty for all.

    Returns
    -------
    list of CheckResult
        In the order in which the checks ran.

    Raises
    ------
    CheckFailure
        At the first failure, with ``on_fail="raise"``.
    MitigateError
        If the arguments are wrong; see `plan_cases`.
    """
    cases = plan_cases(
        method, families=families, expected_failures=expected_failures, extra_checks=extra_checks, only=only
    )
    results = []
    for case in cases:
        result = case.run()
        results.append(result)
        if callback is not None:
            callback(result)
        if result.bad and on_fail == "raise":
            raise CheckFailure(headline(result)) from result.error
        if result.bad and on_fail == "warn":
            warnings.warn(headline(result), stacklevel=2)
    return results


def headline(result: CheckResult) -> str:
    """Write a result in one line: ``NAME check_x [params] on FAMILY: message``."""
    params = f" [{result.params}]" if result.params else ""
    family = f" on {result.family}" if result.family else ""
    return f"{result.method} {result.check}{params}{family}: {result.message or result.status}"


def _subjects(method: Method | type[Method]) -> list[Method]:
    if isinstance(method, Method):
        return [method]
    if inspect.isclass(method) and issubclass(method, Method) and method is not Method:
        return instances(method)
    raise PluginError(f"{method!r} is no method: give a subclass of mitigate.core.Method, or an instance of one")


def _families(families: Sequence[str] | None) -> list[str]:
    if families is not None and not families:
        return []
    from mitigate.testing.tiny import reference_family, tiny_families

    if families is None:
        return [reference_family()]
    _known(families, tiny_families(), "family of tiny models")
    return list(families)


def _one_family(method: Method, families: Sequence[str]) -> list[str]:
    """Return the family on which the class is judged, if any is asked for.

    What shows on one model is there: the reference family stands for all, or the first asked for if it is refused.
    """
    from mitigate.testing.running import stage
    from mitigate.testing.tiny import reference_family, tiny_model

    try:
        if families:
            stage(Subject(method, tiny_model(reference_family())))
    except Skip:
        return list(families[:1])
    except Exception:  # the checks will say what is wrong
        return [reference_family()]
    return [reference_family()][: len(families)]


def _file(method: Method) -> str:
    return getattr(sys.modules.get(type(method).__module__), "__file__", None) or ""


def _known(wanted: Iterable[str], known: Sequence[str], kind: str) -> None:
    for name in wanted:
        if name not in known:
            raise UnknownName(f"unknown {kind} {name!r}{suggestion(name, known)}")
