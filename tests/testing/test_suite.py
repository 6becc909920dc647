"""How checks are run: which, on what, what is expected to fail, and what a test run shows."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest

from mitigate.core import Method
from mitigate.errors import ConfigError, DuplicateName, PluginError, UnknownName
from mitigate.registry import methods
from mitigate.testing import (
    Check,
    CheckFailure,
    Skip,
    Subject,
    base,
    check_method,
    ensure,
    fail,
    parametrize_with_checks,
    subjects,
    yield_checks,
)
from mitigate.testing.suite import MODULES, Case, catalogue, plan_cases
from tests.testing import broken_api
from tests.testing.broken_api import AcceptsNaN, MisspeltHandler, OneSet
from tests.testing.gentle import Gentle


def check_fails(subject: Subject) -> None:
    """Never pass."""
    fail(f"{subject.name} fails")


def check_crashes(subject: Subject) -> None:
    """Crash."""
    raise IndexError("out of range")


def check_skips(subject: Subject) -> None:
    """Look at nothing."""
    raise Skip("nothing to look at")


def check_gain_is_small(subject: Subject) -> None:
    """Have a small gain."""
    ensure(subject.method.params()["gain"] < 2.0, f"{subject.name} is loud")


def run(method: Any = Gentle, *extra: Any, **options: Any) -> list[base.CheckResult]:
    """Run the extra checks only."""
    names = [getattr(item, "name", getattr(item, "__name__", "")) for item in extra]
    return check_method(method, families=(), extra_checks=extra, only=names, on_fail=None, **options)


def test_an_instance_is_checked_as_it_is_and_a_class_with_all_its_parameter_sets() -> None:
    assert [row.params for row in run(Gentle(gain=1.75), check_gain_is_small)] == ["gain=1.75"]
    rows = run(Gentle, check_gain_is_small)
    assert [row.params for row in rows] == [
        "",
        "gain=2.0, offset=1, note=1e3, limit=1.5",
        "gain=0.5, side=right, weights=(0.5,)",
    ]
    assert [row.status for row in rows] == ["passed", "failed", "passed"]
    assert {row.method for row in rows} == {"gentle"}


def test_a_check_of_the_class_runs_once() -> None:
    (row,) = run(Gentle, Check("check_once", check_fails, once=True))
    assert (row.params, row.status, row.message) == ("", "failed", "gentle fails")


def test_every_outcome_says_what_happened() -> None:
    failed, crashed, skipped = (run(Gentle(), each)[0] for each in (check_fails, check_crashes, check_skips))
    assert (failed.status, failed.message, failed.bad) == ("failed", "gentle fails", True)
    assert (crashed.status, crashed.bad) == ("failed", True)
    assert crashed.message.startswith("raised IndexError: out of range (")
    assert "test_suite.py:" in crashed.message
    assert (skipped.status, skipped.message, skipped.bad) == ("skipped", "nothing to look at", False)
    assert failed.seconds >= 0.0


def test_a_check_that_does_not_apply_is_skipped_with_its_reason() -> None:
    never = Check("check_never", check_fails, applies=lambda method: f"{method.name} has no such thing")
    (row,) = run(Gentle(), never)
    assert (row.status, row.message) == ("skipped", "gentle has no such thing")
    assert never not in list(yield_checks(Gentle(), extra_checks=[never]))
    assert [known.name for known in yield_checks(Gentle(), extra_checks=[check_fails])][-1] == "check_fails"


def test_expected_failures_are_strict() -> None:
    expected = {"check_fails": "it is made to fail"}
    (row,) = run(Gentle(), check_fails, expected_failures=expected)
    assert (row.status, row.message, row.bad) == ("expected failure", "it is made to fail", False)
    (row,) = run(Gentle(), check_gain_is_small, expected_failures={"check_gain_is_small": "used to be loud"})
    assert (row.status, row.bad) == ("unexpected pass", True)
    assert "take check_gain_is_small out of expected_failures (used to be loud)" in row.message


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"expected_failures": {"check_nam": "x"}},
            UnknownName,
            r"unknown check 'check_nam'; did you mean 'check_name'",
        ),
        ({"expected_failures": {"check_name": " "}}, ConfigError, r"expected_failures: check_name has no reason"),
        ({"only": ["check_tag"]}, UnknownName, r"unknown check 'check_tag'; did you mean 'check_tags'\?"),
        ({"families": ["llama"]}, UnknownName, r"unknown family of tiny models 'llama'"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_method(Gentle(), **options)


def test_a_family_that_a_method_refuses_says_nothing_against_it() -> None:
    scr = methods().get("scr")
    needing = [known for known in catalogue() if known.needs_model and known.once]
    assert [Case(known, scr(), "instructblip").run().status for known in needing] == ["skipped"] * len(needing)


def test_the_class_is_judged_on_one_family() -> None:
    """Whether a parameter shows on every family's random weights is chance; the reference family is made to show it."""
    asked = ["check_parameters_matter", "check_batch"]
    for families in (["gemma3", "llava"], ["paligemma"]):
        cases = plan_cases(methods().get("sgrs")(), families=families, only=asked)
        known = [(case.check.name, case.family) for case in cases]
        assert known == [("check_parameters_matter", "llava"), *(("check_batch", family) for family in families)]


@pytest.mark.parametrize("family", ["internvl", "instructblip"])
def test_a_way_of_decoding_in_which_the_plain_model_fails_says_nothing_against_a_method(family: str) -> None:
    found = check_method(methods().get("locore"), families=[family], only=["check_cache"], on_fail=None)
    assert {row.status for row in found} == {"passed"}


@pytest.mark.parametrize("wrong", ["gentle", int, Method])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with pytest.raises(PluginError, match=r"is no method|cannot be built"):
        plan_cases(wrong)


def test_failures_raise_warn_or_are_returned() -> None:
    with pytest.raises(CheckFailure, match=r"^gentle check_crashes \[gain=1\.75\]: raised IndexError") as caught:
        check_method(Gentle(gain=1.75), families=(), extra_checks=[check_crashes], only=["check_crashes"])
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.warns(UserWarning, match=r"gentle check_fails: gentle fails"):
        check_method(Gentle(), families=(), extra_checks=[check_fails], only=["check_fails"], on_fail="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(Gentle(), check_fails)[0].bad


def test_results_come_one_by_one() -> None:
    seen: list[base.CheckResult] = []
    rows = run(Gentle, check_gain_is_small, callback=seen.append)
    assert seen == rows
    assert len(rows) == 3


def test_the_class_is_registered_while_it_is_checked_and_no_longer() -> None:
    def check_registered(subject: Subject) -> None:
        ensure(methods().get("gentle") is Gentle, "not registered")

    assert run(Gentle(), check_registered)[0].status == "passed"
    assert "gentle" not in methods().names()


def test_a_registered_class_stays_registered() -> None:
    methods().register("gentle", Gentle)
    try:
        assert not run(Gentle(), check_gain_is_small)[0].bad
        assert "gentle" in methods().names()
    finally:
        methods().unregister("gentle")


def test_sets_that_cannot_be_built_do_not_hide_the_others() -> None:
    assert len(subjects.instances(broken_api.WrongSet)) == 3

    class NeverBuilt(Gentle):
        def __post_init__(self) -> None:
            raise ValueError("no")

    with pytest.raises(PluginError, match=r"NeverBuilt cannot be built: ValueError: no"):
        subjects.instances(NeverBuilt)


def test_the_catalogue_is_in_order_and_every_check_says_its_rule() -> None:
    known = catalogue()
    places = [next(i for i, module in enumerate(MODULES) if module.__name__ == each.run.__module__) for each in known]
    assert places == sorted(places)
    assert all(each.summary.endswith(".") and each.name.startswith("check_") for each in known)
    assert len({each.name for each in known}) == len(known) == len(base.CHECKS)


def test_two_checks_cannot_have_one_name() -> None:
    def check_name(subject: Subject) -> None:
        """Clash."""

    with pytest.raises(DuplicateName, match=r"two checks are called check_name: .*checks_api and tests\.testing"):
        base.check()(check_name)


def test_a_check_without_a_model_cannot_use_one() -> None:
    with pytest.raises(RuntimeError, match=r"declare it with @check\(needs_model=True\)"):
        _ = Subject(Gentle()).model


@pytest.mark.parametrize("plugin", [AcceptsNaN, MisspeltHandler, OneSet])
def test_a_broken_method_does_not_conform(plugin: type[Method]) -> None:
    with pytest.raises(CheckFailure, match=r"^gentle check_"):
        check_method(plugin, families=())


# ------------------------------------------------------------------------------------------------------- through pytest


def parametrized(*plugins: Any, **options: Any) -> dict[str, Any]:
    """Return id -> what the decorator gives pytest for that test."""

    def test(method: Method, check: Any) -> None:
        check(method)

    (mark,) = parametrize_with_checks(plugins, families=(), **options)(test).pytestmark
    assert mark.args[0] == ("method", "check")
    found = {each.id: each for each in mark.args[1]}
    assert len(found) == len(mark.args[1]), "two tests have one id"
    return found


def test_ids_are_readable_and_every_instance_has_its_own() -> None:
    ids = list(parametrized(Gentle)) + list(parametrized(AcceptsNaN(gain=0.75)))
    assert [each for each in ids if "check_bad_numbers" in each] == [
        "gentle-check_bad_numbers",
        "gentle[gain=2.0,offset=1,note=1e3,limit=1.5]-check_bad_numbers",
        "gentle[gain=0.5,side=right,weights=(0.5,)]-check_bad_numbers",
        "gentle[gain=0.75]-check_bad_numbers",
    ]


def test_a_check_of_the_class_is_one_test_per_class() -> None:
    once = Check("check_once", check_fails, once=True)
    given = parametrized(Gentle(gain=2.0), Gentle(gain=0.5), extra_checks=[once])
    assert [each for each in given if "check_once" in each] == ["gentle-check_once"]


def test_a_test_fails_skips_or_passes_as_its_check_does() -> None:
    given = parametrized(AcceptsNaN(), extra_checks=[check_skips])
    method, call = given["gentle-check_bad_numbers"].values
    with pytest.raises(CheckFailure, match=r"gentle accepts gain=nan"):
        call(method)
    method, call = given["gentle-check_skips"].values
    with pytest.raises(pytest.skip.Exception, match="nothing to look at"):
        call(method)
    method, call = given["gentle-check_tags"].values
    call(method)
    with pytest.raises(ConfigError, match="with the method of the same test"):
        call(AcceptsNaN())


@pytest.mark.parametrize("strict", [True, False])
def test_expected_failures_are_marked(strict: bool) -> None:
    given = parametrized(AcceptsNaN(), expected_failures={"check_bad_numbers": "to be mended"}, strict=strict)
    (mark,) = given["gentle-check_bad_numbers"].marks
    assert (mark.name, mark.kwargs) == ("xfail", {"reason": "to be mended", "strict": strict})
    assert not any(each.marks for name, each in given.items() if name != "gentle-check_bad_numbers")


def test_pytest_is_needed_by_the_decorator_only() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from mitigate.testing import check_method, parametrize_with_checks\n"
        "from mitigate.registry import methods\n"
        "name = methods().names()[0]\n"
        "print(len(check_method(methods().get(name), families=(), only=['check_tags'])))\n"
        "try:\n    parametrize_with_checks([methods().get(name)])\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "1",
        "this decorator needs pytest: install it, or use check_method or `mitigate check`",
    ], done.stderr


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, mitigate.testing as t; print('torch' in sys.modules, sorted(t.__all__) == t.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
