"""From overrides to resolved runs: one run, a sweep of runs, a comparison of stacks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from mitigate.compose.checks import check_stack, check_values_in_range
from mitigate.compose.facts import facts_of
from mitigate.compose.overrides import check_values, expand_sweeps, method_keys, parse_checked
from mitigate.compose.resolved import ResolvedRun
from mitigate.compose.schemas import check_value, native
from mitigate.compose.session import Composed, Session, flatten, session
from mitigate.compose.tuned import tuned_for, tuned_values
from mitigate.compose.values import COMMAND_LINE, DEFAULT, MethodValues, decide
from mitigate.errors import ConfigError, UnknownName
from mitigate.registry import benchmarks, methods, suggestion


def compose_run(overrides: Sequence[str] = ()) -> ResolvedRun:
    """Compose one run from Hydra overrides.

    Parameters
    ----------
    overrides
        Such as ``["model=testbed", "benchmark.limit=50"]``.

    Raises
    ------
    ConfigError
        Or another `MitigateError`: whatever is wrong, before anything is loaded or run.
    """
    with session() as hydra:
        return _run(hydra, overrides)


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep; one job where nothing is swept."""
    with session() as hydra:
        return expand_sweeps(hydra, overrides, one=True)


def compose_sweep(overrides: Sequence[str], *, one: bool = False) -> list[ResolvedRun]:
    """Compose every job of a sweep such as ``seed=0,1``; all are checked before any is returned.

    A sweep of ``one`` job is refused unless that is allowed.
    """
    with session() as hydra:
        jobs = expand_sweeps(hydra, overrides, one=one)
        runs = [_run(hydra, job) for job in jobs]
        _refuse_repeated(jobs, [[run] for run in runs])
        return runs


def compose_comparison(
    overrides: Sequence[str] = (), notes: list[str] | None = None, hydra: Session | None = None
) -> list[ResolvedRun]:
    """Compose a comparison: one run per entry of ``stacks``, the baseline ``none`` first.

    Parameters
    ----------
    overrides
        As for `compose_run`; ``stacks=[none,a,a+b]`` (or ``stack=[...]``) names presets or methods joined by ``+``. A
        value of a method goes to the stacks that select the method.
    notes
        Receives a sentence for everything done that was not asked for.
    hydra
        An open session, for several comparisons: files are read once.
    """
    with nullcontext(hydra) if hydra is not None else session() as opened:
        return _comparison(opened, overrides, notes if notes is not None else [])


def compose_comparison_sweep(
    overrides: Sequence[str], notes: list[str] | None = None, *, one: bool = False
) -> list[list[ResolvedRun]]:
    """Compose every comparison of a sweep, as `compose_sweep` does."""
    with session() as hydra:
        jobs = expand_sweeps(hydra, overrides, one=one)
        comparisons = [_comparison(hydra, job, notes if notes is not None else []) for job in jobs]
        _refuse_repeated(jobs, comparisons)
        return comparisons


def _refuse_repeated(jobs: Sequence[Sequence[str]], composed: Sequence[Sequence[ResolvedRun]]) -> None:
    """Refuse jobs that compute the same: they would share a folder."""
    seen: dict[Any, int] = {}
    for number, runs in enumerate(composed, start=1):
        place = (runs[0].config["runs_dir"], runs[0].config["name"])
        key = (place, tuple((run.stack_name, run.digest) for run in runs))
        if key in seen:
            raise ConfigError(
                f"-m: job {number} ({' '.join(jobs[number - 1])}) repeats job {seen[key]}: "
                f"both compute the same, in one folder; give every swept key different values"
            )
        seen[key] = number


def _run(hydra: Session, tokens: Sequence[str]) -> ResolvedRun:
    parsed = parse_checked(hydra, tokens)
    by_hand = {override.key_or_group: str(override.input_line) for override in parsed}
    if "stack" in by_hand and "methods" in by_hand:
        raise ConfigError(
            f"{by_hand['stack']} and {by_hand['methods']} both choose the methods; give one of the two "
            f"(~methods.NAME takes one out of a stack)"
        )
    for override in parsed:
        if override.key_or_group == "stacks":
            raise ConfigError(
                f"{override.input_line}: a run has one stack; use stack=NAME or methods=[...], "
                f"or `mitigate compare` for several"
            )
    return _resolve(hydra, parsed)


def _resolve(hydra: Session, parsed: Sequence[Override]) -> ResolvedRun:
    groups = [str(override.input_line) for override in parsed if hydra.is_group(override)]
    chosen = hydra.compose(groups)
    _refuse_orphans(chosen, groups)
    check_values(parsed, chosen.config)
    # values change neither the choices nor what the files say
    values = len(groups) < len(parsed)
    config = hydra.merge([_forced(override) for override in parsed]) if values else copy.deepcopy(chosen.config)
    origins = {**chosen.origins, **_set_by_hand(hydra, parsed)}
    if _is_of_another_path(origins):
        config.model.revision = None
        del origins["model.revision"]
    tuned = tuned_values(hydra, chosen.chosen.get("model"), config.model)
    try:
        decided = {
            key: decide(key, config.methods[key], tuned_for(str(config.methods[key].name), tuned), origins)
            for key in method_keys(config)
        }
        config.methods = {key: values.node() for key, values in decided.items()}
        config.model.tuned = {}
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        decided = {key: values.resolved(key, plain["methods"][key]) for key, values in decided.items()}
        plain["methods"] = {key: values.node() for key, values in decided.items()}
    except OmegaConfBaseException as error:
        raise ConfigError(_missing_or_interpolation(error)) from error
    by_hand = any(override.key_or_group == "methods" for override in parsed)
    preset = None if by_hand or list(decided) != method_keys(chosen.config) else chosen.chosen.get("stack")
    try:
        return _build(plain, decided, origins, preset or "+".join(decided) or "none")
    except ConfigError as error:
        raise _with_source(error, decided) from error


def _is_of_another_path(origins: Mapping[str, str]) -> bool:
    """Say whether the revision is from a model's file, but the path is not: a commit belongs to its own repository."""
    path, revision = (origins.get(key, "") for key in ("model.path", "model.revision"))
    return revision.startswith("model ") and not path.startswith("model ")


def _with_source(error: ConfigError, decided: Mapping[str, MethodValues]) -> ConfigError:
    """Say where a refused value came from if the user did not write it."""
    for key, method in decided.items():
        for parameter, source in method.provenance.items():
            blamed = str(error).startswith(f"methods.{method.name}.{parameter}=")
            if blamed and source not in (COMMAND_LINE, DEFAULT):
                hint = f"the value comes from {source}; set methods.{key}.{parameter}=VALUE to replace it"
                return type(error)(f"{error}\n{hint}")
    return error


def _build(
    config: dict[str, Any], decided: Mapping[str, MethodValues], origins: Mapping[str, str], name: str
) -> ResolvedRun:
    check_values_in_range(config)
    if config["model"]["max_memory"] is not None:  # a GPU is a number here, and records have keys of text only
        config["model"]["max_memory"] = {str(key): limit for key, limit in config["model"]["max_memory"].items()}
    if config["benchmark"] is None:
        raise ConfigError(f"a run needs a benchmark; known: {', '.join(benchmarks().names())}")
    plugin = benchmarks().get(config["benchmark"]["name"])
    parameters = {
        key: check_value(plugin, key, value, f"benchmark.{key}={value}")
        for key, value in config["benchmark"].items()
        if key != "name"
    }
    config["benchmark"] |= parameters
    built = {key: values.build() for key, values in decided.items()}
    facts = facts_of(config["model"])
    check_stack(built, facts, config)
    del config["model"]["tuned"]
    config |= {"stack": name, "stacks": []}
    provenance = {
        key: origins.get(key, DEFAULT) for key in flatten(config) if key != "stacks" and not key.startswith("methods")
    }
    for key, values in decided.items():
        provenance |= {f"methods.{key}.{parameter}": source for parameter, source in values.provenance.items()}
    benchmark = plugin(**native(plugin, parameters))
    benchmark.all_metrics()  # a metric that is unknown, or cannot be added, is refused before anything runs
    return ResolvedRun(config, built, benchmark, facts, provenance, name)


def _forced(override: Override) -> str:
    """Return the override's text; values of methods are forced in, since copies under other keys have no schema yet."""
    text = str(override.input_line)
    plain_value = override.key_or_group.startswith("methods.") and not override.is_delete()
    return f"++{text.lstrip('+')}" if plain_value else text


def _set_by_hand(hydra: Session, parsed: Sequence[Override]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for override in parsed:
        if override.is_delete():
            continue
        if hydra.is_group(override):
            keys |= dict.fromkeys((override.key_or_group, f"{override.key_or_group}.name"), COMMAND_LINE)
        else:
            keys |= dict.fromkeys(flatten(override.value(), override.key_or_group), COMMAND_LINE)
            keys[override.key_or_group] = COMMAND_LINE
    return keys


def _refuse_orphans(chosen: Composed, groups: Sequence[str]) -> None:
    """Refuse values of methods that are not selected, and presets that name unknown methods."""
    selected = method_keys(chosen.config)
    for key, node in chosen.config.methods.items():
        if key in selected:
            methods().get(str(node.name))
            continue
        parameters = list(node) if isinstance(node, DictConfig) else []
        culprit = f"methods.{key}.{parameters[0]}" if parameters else f"methods.{key}"
        source = chosen.origins.get(culprit, "a configuration file")
        by_hand = next((text for text in groups if text.startswith("methods=")), "its own methods")
        raise ConfigError(
            f"{source} sets {culprit}, but {by_hand} does not select {key}; "
            f"select {key}, or leave out what chooses {source}"
        )


def _missing_or_interpolation(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or "a value")
    if isinstance(error, InterpolationResolutionError) or "nterpolation" in str(error):
        return f"{key}: {str(error).splitlines()[0]}"
    return f"{key} has no value; set {key}=VALUE"


def _comparison(hydra: Session, tokens: Sequence[str], notes: list[str]) -> list[ResolvedRun]:
    parsed = parse_checked(hydra, _plural(hydra, tokens))
    shared: list[Override] = []
    for override in parsed:
        key = override.key_or_group
        whole_method = key.startswith("methods.") and (key.count(".") == 1 or override.is_delete())
        if key in ("methods", "stack") or whole_method:
            raise ConfigError(
                f"{override.input_line}: a comparison takes stacks=[none,NAME,NAME+NAME] instead; "
                f"`mitigate run` takes methods= and stack="
            )
        if key != "stacks":
            shared.append(override)
    asked = next((override.value() for override in reversed(parsed) if override.key_or_group == "stacks"), None)
    groups = [str(override.input_line) for override in shared if hydra.is_group(override)]
    if asked is None:
        asked = list(hydra.compose(groups).config.stacks)
    stacks = _stack_list(asked, notes)
    choices = {stack: hydra.parse(_stack_choice(hydra, stack)) for stack in stacks}
    keys = {
        stack: method_keys(hydra.compose([*groups, *(str(item.input_line) for item in choice)]).config)
        for stack, choice in choices.items()
    }
    for override in shared:
        parts = override.key_or_group.split(".")
        if parts[0] == "methods" and not any(parts[1] in selected for selected in keys.values()):
            known = sorted({key for selected in keys.values() for key in selected})
            if parts[1] not in methods().names():
                raise UnknownName(f"{override.input_line}: unknown method {parts[1]!r}{suggestion(parts[1], known)}")
            raise ConfigError(
                f"{override.input_line}: no stack of the comparison has {parts[1]}; add it to stacks=[...] or drop it"
            )
    runs = []
    for stack, choice in choices.items():
        mine = [item for item in shared if not _is_foreign(item, keys[stack])]
        runs.append(_resolve(hydra, [*mine, *choice]))
    return runs


def _plural(hydra: Session, tokens: Sequence[str]) -> list[str]:
    """Return the overrides with ``stack=[...]`` written as ``stacks=[...]``: a comparison takes both.

    Raises
    ------
    ConfigError
        If the stacks are given twice.
    """
    parsed = hydra.parse(tokens)
    listed = [item for item in parsed if item.key_or_group == "stack" and isinstance(item.value(), list)]
    given = [*listed, *(item for item in parsed if item.key_or_group == "stacks")]
    if len(given) > 1:
        both = " and ".join(str(item.input_line) for item in parsed if item in given)
        raise ConfigError(f"{both}: a comparison takes one list of stacks; drop one of the two")
    return [
        str(item.input_line).replace("stack=", "stacks=", 1) if item in listed else str(item.input_line)
        for item in parsed
    ]


def _is_foreign(override: Override, selected: Sequence[str]) -> bool:
    parts = override.key_or_group.split(".")
    return parts[0] == "methods" and parts[1] not in selected


def _stack_list(asked: Any, notes: list[str]) -> list[str]:
    if not isinstance(asked, list) or not all(isinstance(stack, (str, type(None))) for stack in asked):
        raise ConfigError(f"stacks={asked} must be a list of names; write 'stacks=[none,NAME,NAME+NAME]'")
    if not asked:
        raise ConfigError("stacks=[] compares nothing; write 'stacks=[none,NAME,NAME+NAME]'")
    stacks = ["none" if stack is None else "+".join(part.strip() for part in str(stack).split("+")) for stack in asked]
    for stack in stacks:
        if stacks.count(stack) > 1:
            also = " (null is none, too)" if stack == "none" and None in asked else ""
            raise ConfigError(f"stacks names {stack} twice{also}; every stack of a comparison has one row: drop one")
    if stacks[:1] != ["none"]:
        where = "moved to the front" if "none" in stacks else "added"
        notes.append(f"The baseline none was {where}: every difference is measured against it.")
        stacks = ["none", *(stack for stack in stacks if stack != "none")]
    return stacks


def _stack_choice(hydra: Session, stack: str) -> list[str]:
    """Return the overrides that select a stack: a preset of that name, else methods joined by ``+``."""
    if stack in hydra.options("stack"):
        return [f"stack={stack}"]
    parts = stack.split("+")
    if "none" in parts and "none" not in methods().names():
        rest = "+".join(part for part in parts if part != "none")
        raise ConfigError(f"stacks: {stack} adds to none, the stack without methods; write {rest or 'none'}")
    for part in parts:
        if parts.count(part) > 1:
            raise ConfigError(
                f"stacks: {stack} names {part} twice; name it once, or put a stack with a second copy "
                f"into a file of conf/stack"
            )
    unknown = [part for part in parts if part not in methods().names()]
    if unknown:
        known = {*hydra.options("stack"), *methods().names()}
        raise UnknownName(f"unknown stack {stack!r} ({unknown[0]!r}){suggestion(unknown[0], known)}")
    return ["stack=none", f"methods=[{','.join(parts)}]"]
