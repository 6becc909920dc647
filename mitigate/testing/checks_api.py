"""Checks without a model: the class, its parameters, its texts."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import pickle  # noqa: TID251  # in memory only: what workers of a run get; nothing is read from disk
import re
import sys
from typing import Any

from mitigate.compose.schemas import annotations_of, defaults_of, parameters_of, plain, schema_of, type_name
from mitigate.core.method import Fidelity, Method, Paper
from mitigate.core.plan import bind
from mitigate.errors import ConfigError, MitigateError, PluginError, UnsupportedModel
from mitigate.registry import methods, suggestion
from mitigate.testing.base import Subject, check, ensure, fail
from mitigate.testing.subjects import geometries, quietly

_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_PLAIN = "int, float, bool, str, an Enum, a Literal of strings, a tuple of one of these, or any of them | None"


@check(once=True)
def check_name(subject: Subject) -> None:
    """Have one name everywhere: in the class, the file and the registry."""
    plugin = subject.plugin
    name = getattr(plugin, "name", None)
    ensure(isinstance(name, str), f"{plugin.__qualname__} has no name: give the class name: ClassVar[str] = '...'")
    ensure(
        _SNAKE.fullmatch(str(name)) is not None and name != "none",
        f"{name!r} cannot be written in configurations: use lower_snake_case, and not 'none'",
    )
    stem = plugin.__module__.rpartition(".")[2].strip("_")  # a notebook is __main__
    ensure(
        stem in (name, "main") or stem.endswith(f"_{name}"),
        f"{name}: its file is called {stem}.py; call it {name}.py, so that a name leads to its file",
    )
    try:
        known = methods().get(str(name))
    except MitigateError as error:
        fail(str(error))
    ensure(
        known is plugin or (known.__module__, known.__qualname__) == (plugin.__module__, plugin.__qualname__),
        f"{name}: the name is taken by {known.__module__}:{known.__qualname__}; choose another",
    )


@check(once=True)
def check_parameters(subject: Subject) -> None:
    """Keep parameters in a frozen keyword-only dataclass, of types a configuration can check."""
    plugin, name = subject.plugin, subject.name
    made = vars(plugin).get("__dataclass_params__")
    if made is None:
        fail(f"{name}: decorate {plugin.__qualname__} with @dataclass(frozen=True, kw_only=True)")
    ensure(made.frozen, f"{name}: parameters can be changed while it runs; write @dataclass(frozen=True, ...)")
    for argument in inspect.signature(plugin).parameters.values():
        ensure(
            argument.kind not in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL),
            f"{name} takes {argument}: every parameter needs a name, or wrong names are swallowed",
        )
    for field in dataclasses.fields(plugin):
        ensure(field.init, f"{name}.{field.name} is no argument of the constructor (init=False): keep state on `state`")
        ensure(field.kw_only is True, f"{name}.{field.name} is positional; write @dataclass(..., kw_only=True)")
    try:
        schema = schema_of(name, plugin)
    except PluginError as error:
        fail(str(error))
    kinds = {field.name: field.type for field in dataclasses.fields(schema)}
    for parameter, annotation in annotations_of(plugin).items():
        shown = type_name(annotation)
        ensure(kinds[parameter] is not Any, f"{name}.{parameter}: {shown} cannot be checked; annotate it as {_PLAIN}")


@check(once=True)
def check_class_attributes(subject: Subject) -> None:
    """Annotate what is meant as a parameter, and keep no state on the class."""
    declared = inspect.get_annotations(Method)  # some without a value, such as the name a notebook's class is given
    known = {*dir(Method), *declared, *(field.name for field in dataclasses.fields(subject.plugin))}
    for attribute, value in vars(subject.plugin).items():
        if attribute.startswith("_") or attribute in known:
            continue
        annotated = attribute in vars(subject.plugin).get("__annotations__", {})
        ensure(
            annotated or not isinstance(value, (bool, int, float, str, tuple, type(None))),
            f"{subject.name}.{attribute} = {value!r} is no parameter without an annotation: "
            f"write {attribute}: {type(value).__name__} = {value!r}, or annotate it as a ClassVar",
        )
        ensure(
            not isinstance(value, (list, dict, set)),
            f"{subject.name}.{attribute} is a {type(value).__name__} shared by all requests: "
            f"keep what a request needs on `state`, and constants in a tuple or frozenset",
        )


@check(once=True)
def check_constructor(subject: Subject) -> None:
    """Keep parameters as they are given, and do nothing else in the constructor."""
    plugin, name = subject.plugin, subject.name
    fields = {field.name for field in dataclasses.fields(plugin)}
    for values in plugin.test_params():
        given = copy.deepcopy(values)
        method = plugin(**values)
        ensure(values == given, f"{name}: the constructor changes what it is given: {given} became {values}")
        for parameter, value in given.items():
            stored = getattr(method, parameter)
            ensure(
                stored == value and type(stored) is type(value),
                f"{name}.{parameter}: given {value!r} but keeps {stored!r}; refuse what does not fit instead",
            )
        extra = sorted(vars(method).keys() - fields)
        ensure(
            not extra,
            f"{name} sets {', '.join(extra)} on itself: a method keeps parameters only; compute it in a property, "
            f"or keep it on `state`",
        )


@check(once=True)
def check_test_params(subject: Subject) -> None:
    """Give at least two parameter sets to test, in which every parameter leaves its default once."""
    plugin, name = subject.plugin, subject.name
    sets = plugin.test_params()
    ensure(
        isinstance(sets, list) and len(sets) >= 2,
        f"{name}.test_params() returns {len(sets)} parameter set(s): return at least two, cheap and different",
    )
    known, defaults = annotations_of(plugin), defaults_of(plugin)
    covered: set[str] = set()
    for values in sets:
        for parameter in values:
            ensure(
                parameter in known, f"{name}.test_params(): no parameter {parameter!r}{suggestion(parameter, known)}"
            )
        try:
            plugin(**values)
        except Exception as error:  # whatever the constructor raises
            fail(f"{name}.test_params(): {values} cannot be built: {error}")
        changed = {key for key, value in values.items() if key not in defaults or plain(value) != defaults[key]}
        ensure(bool(changed), f"{name}.test_params(): {values} is the default; give values that differ from it")
        covered |= changed
    missing = [parameter for parameter in known if parameter not in covered]
    ensure(not missing, f"{name}.test_params(): {', '.join(missing)} never leaves the default, so nothing tests it")


@check(once=True)
def check_presets(subject: Subject) -> None:
    """Have presets that can be built, and say how close each is to the source."""
    plugin, name = subject.plugin, subject.name
    ensure("paper" in plugin.presets, f"{name}.presets has no 'paper': it is the one a run takes if none is asked for")
    ensure(
        isinstance(getattr(plugin, "fidelity", None), Fidelity),
        f"{name}.fidelity must be one of {', '.join(f'Fidelity.{word.name}' for word in Fidelity)}",
    )
    for preset in plugin.presets:
        try:
            method = plugin.preset(preset)
        except (MitigateError, TypeError, ValueError) as error:
            fail(f"{name}: preset {preset!r} cannot be built: {error}")
        refusal = _refused_everywhere(method)
        ensure(not refusal, f"{name}: preset {preset!r} serves no model, not even one of 32 layers: {refusal}")
    for preset, word in plugin.preset_fidelity.items():
        ensure(
            preset in plugin.presets,
            f"{name}.preset_fidelity: {preset!r} is no preset{suggestion(preset, plugin.presets)}",
        )
        ensure(isinstance(word, Fidelity), f"{name}.preset_fidelity: {preset!r} must be a Fidelity, not {word!r}")


def _refused_everywhere(method: Method) -> str:
    """Return why a method cannot be planned for any geometry; empty if it can for one."""
    refusal = ""
    for facts in geometries():
        try:
            quietly(bind, {method.name: method}, facts)
        except (ConfigError, UnsupportedModel) as error:
            refusal = str(error)
        except Exception:  # other checks say what is wrong with that
            return ""
        else:
            return ""
    return refusal


@check(once=True)
def check_docstring(subject: Subject) -> None:
    """Say in the docstring what it does, which paper it is from, and what every parameter means."""
    plugin, name = subject.plugin, subject.name
    text = inspect.cleandoc(vars(plugin).get("__doc__") or "")
    generated = text.startswith(f"{plugin.__name__}(")  # what @dataclass writes where there is none
    lines = [] if generated else text.splitlines()
    ensure(
        bool(lines and lines[0].strip()),
        f"{name}: {plugin.__qualname__} has no docstring; begin with one line on what it does",
    )
    ensure(
        lines[0].endswith(".") and (len(lines) == 1 or not lines[1].strip()),
        f"{name}: the docstring begins with one sentence on one line, then an empty line; it begins {lines[0]!r}",
    )
    summary = getattr(plugin, "summary", "")
    ensure(bool(summary) and "\n" not in summary, f"{name}.summary must say in one line what it does, for tables")
    paper = plugin.paper
    if paper is not None:
        ensure(isinstance(paper, Paper), f"{name}.paper must be a Paper or None, not {paper!r}")
        known = paper.arxiv or paper.title
        ensure(known in text, f"{name}: the docstring does not name its paper ({known}); add it with equation numbers")
    for parameter in parameters_of(plugin):
        ensure(bool(parameter.doc), f"{name}: the docstring's Parameters section does not describe {parameter.name}")


@check(once=True)
def check_example(subject: Subject) -> None:
    """Show an example in the docstring that gives what it shows."""
    plugin, name = subject.plugin, subject.name
    text = inspect.cleandoc(vars(plugin).get("__doc__") or "")
    ensure(">>> " in text, f"{name}: the docstring has no example; add an Examples section with a line '>>> ...'")
    namespace = {**vars(sys.modules[plugin.__module__]), plugin.__name__: plugin}
    example = doctest.DocTestParser().get_doctest(text, namespace, name, None, None)
    said: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    words = " ".join("".join(said).split()).partition("Failed example:")[2].strip()
    ensure(outcome.failed == 0, f"{name}: the docstring's example does not give what it shows: {words}")


@check()
def check_copy_pickle_repr(subject: Subject) -> None:
    """Give equal copies and pickles, and a text with every parameter: workers and records need them."""
    method, plugin, name = subject.method, subject.plugin, subject.name
    ensure(copy.deepcopy(method) == method, f"{name}: a deep copy is not equal to it; compare by parameters only")
    try:
        again = pickle.loads(pickle.dumps(method))
    except Exception as error:  # pickle raises what it likes
        fail(f"{name} cannot be pickled ({error}): define the class at the top of its module, with plain parameters")
    ensure(again == method, f"{name}: a pickled copy is not equal to it; compare by parameters only")
    shown = ", ".join(f"{key}={value!r}" for key, value in method.params().items())
    ensure(
        repr(method) == f"{plugin.__qualname__}({shown})",
        f"{name}: repr gives {method!r}; leave it to the dataclass, which shows every parameter",
    )
