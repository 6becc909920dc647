"""Hydra, used as a library: generated schemas, composition, and who set which value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from mitigate.compose.schema import RunConfig
from mitigate.compose.schemas import schema_of
from mitigate.compose.search_path import MitigateSearchPath, distribution_of
from mitigate.errors import ConfigError, DuplicateName, UnknownName
from mitigate.registry import Registry, benchmarks, config_packages, methods, suggestion

PRIMARY = "config"
#: Groups whose options are files; the options of ``methods`` and ``benchmark`` come from the registries.
FILE_GROUPS = ("model", "stack", "decoding", "trainer", "tracker", "experiment")
GROUPS = (*FILE_GROUPS, "methods", "benchmark")

#: Values per model that packages add; no group of its own, since nobody chooses there (`mitigate.compose.tuned`).
TUNED = "tuned"
#: Groups whose files set keys of the whole configuration, and so must say that they do.
_GLOBAL = ("stack", "experiment")
#: Groups whose options are generated from the registered classes.
_GENERATED = ("methods", "benchmark")
_SCHEMAS = ("run_schema", "methods/", "benchmark/")
#: What Hydra raises at a file with wrong content; ValueError is also that of a wrong encoding or defaults list.
_UNREADABLE = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


@dataclass(frozen=True)
class Composed:
    """What Hydra makes of a list of overrides.

    Parameters
    ----------
    config
        The merged, typed configuration; methods' values nobody set are missing.
    origins
        Dotted key -> which file set it (``"stack NAME"``); what only a schema sets is absent.
    chosen
        Group -> option, for groups of files.
    """

    config: DictConfig
    origins: Mapping[str, str]
    chosen: Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """One place of the search path: who adds it, its address, and the folder on this machine."""

    provider: str
    path: str
    folder: str


class Session:
    """An open Hydra configuration search path."""

    def __init__(self) -> None:
        self._loader: Any = GlobalHydra.instance().config_loader()
        self._composed: dict[tuple[str, ...], Composed] = {}
        self._options: dict[str, list[str]] = {}
        self._checked: set[str] = set()
        self._files = [(source, _remember_files(source)) for source in self.sources()]

    def options(self, group: str) -> list[str]:
        """Return the options of a group, sorted."""
        if group not in FILE_GROUPS:
            return _registry_of(group).names()
        if group not in self._options:
            self._options[group] = sorted(self._loader.get_group_options(group))
        return self._options[group]

    def sources(self) -> list[Any]:
        """Return the places of configuration files, in the order in which Hydra looks; not the generated schemas."""
        return [source for source in self._loader.repository.get_sources() if source.scheme() != "structured"]

    def search_path(self) -> list[Place]:
        """Return the places Hydra looks for configuration files, in its order."""
        places = []
        for source in self._loader.repository.get_sources():
            package = source.scheme() == "pkg"
            folder = ", ".join(import_module(source.path).__path__) if package else ""
            places.append(Place(source.provider, f"{source.scheme()}://{source.path}", folder))
        return places

    def brought_by(self, path: str) -> list[str]:
        """Return the packages that bring a configuration file (``"stack/NAME"``), in Hydra's order."""
        return [distribution_of(source.provider) for source in self.sources() if source.is_config(path)]

    def check_option(self, path: str) -> None:
        """Refuse a file that Hydra would take from one of several packages, cannot read, or would read as another.

        Raises
        ------
        DuplicateName
            If two packages bring the file.
        ConfigError
            If a package brings a file where options are generated, or one that cannot be read.
        """
        if path in self._checked:
            return
        packages = self.brought_by(path)
        if path.startswith(_GENERATED) and packages:
            raise ConfigError(
                f"conf/{path}.yaml of {packages[0]} stands in the way: options of {path.partition('/')[0]} are made "
                f"from the class; move its values to conf/stack, conf/experiment or conf/{TUNED}"
            )
        if len(packages) > 1:
            raise DuplicateName(
                f"conf/{path}.yaml comes from both {' and '.join(packages)}; rename one (such as PACKAGE_NAME), or "
                f"set MITIGATE_PLUGINS to the packages you want"
            )
        for package in packages:
            try:
                header = self._loader.repository.load_config(path).header
            except _UNREADABLE as error:
                raise ConfigError(f"conf/{path}.yaml of {package} cannot be read: {_explain(error)}") from error
            if path.partition("/")[0] in _GLOBAL and header.get("package") != "_global_":
                raise ConfigError(f"conf/{path}.yaml of {package} must begin with the line: # @package _global_")
        self._checked.add(path)

    def unknown_option(self, group: str, option: str) -> UnknownName:
        """Return the error for an option no file has; it says so if files of a package cannot be read."""
        unread = [f"\n{entry.broken}" for entry in config_packages() if entry.broken is not None]
        return UnknownName(f"{group}={option} is unknown{suggestion(option, self.options(group))}{''.join(unread[:1])}")

    def parse(self, tokens: Sequence[str]) -> list[Override]:
        """Parse overrides.

        Raises
        ------
        ConfigError
            If a token is no ``key=value``.
        """
        parser = OverridesParser.create(config_loader=self._loader)
        parsed = []
        for token in tokens:
            try:
                parsed.extend(parser.parse_overrides([token]))
            except HydraException as error:
                if "=" not in token:
                    raise ConfigError(f"{token!r} is no override; write key=value, such as model=testbed") from error
                raise ConfigError(
                    f"cannot read {token!r} as key=value\n"
                    f"quote it for the shell, and quote special characters again inside: 'name=\"a b\"'"
                ) from error
        return parsed

    def is_group(self, override: Override) -> bool:
        """Tell whether an override chooses an option of a group, rather than setting a value."""
        return override.key_or_group in GROUPS

    def load_raw(self, path: str) -> DictConfig:
        """Return the content of one configuration file as written, without its defaults list."""
        parse = next(parse for source, parse in self._files if source.is_config(path))
        content: DictConfig = copy.deepcopy(parse(path).config)
        content.pop("defaults", None)
        return content

    def defaults_of(self, path: str) -> list[Any]:
        """Return the defaults list of one configuration file."""
        return list(self._loader.repository.load_config(path).defaults_list or [])

    def compose(self, tokens: Sequence[str]) -> Composed:
        """Compose and find out who set what. The result is remembered, so it must not be changed."""
        key = tuple(tokens)
        if key not in self._composed:
            self._composed[key] = self._compose(key)
        return self._composed[key]

    def merge(self, tokens: Sequence[str]) -> DictConfig:
        """Return what Hydra merges from the files and the overrides; its errors become `ConfigError`.

        The schema of a plugin is made when Hydra first asks for it: only what a run selects is imported.
        """
        made: set[str] = set()
        while True:
            try:
                return compose(PRIMARY, overrides=list(tokens))
            except MissingConfigException as error:
                missing = error.missing_cfg_file or ""
                if not missing.startswith(_GENERATED) or missing in made:
                    raise ConfigError(str(error).splitlines()[0]) from error  # the rest is the search path
                made.add(missing)
                _store_schema(*missing.split("/", 1))
            except _UNREADABLE as error:
                raise ConfigError(_explain(error)) from error

    def _compose(self, tokens: Sequence[str]) -> Composed:
        for override in self.parse(tokens):
            if override.key_or_group in FILE_GROUPS and isinstance(override.value(), str):
                self.check_option(f"{override.key_or_group}/{override.value()}")
        config = self.merge(tokens)
        try:
            defaults = self._loader.compute_defaults_list(PRIMARY, list(tokens), RunMode.RUN).defaults
        except _UNREADABLE as error:
            raise ConfigError(_explain(error)) from error
        origins: dict[str, str] = {}
        chosen: dict[str, str] = {}
        for default in defaults:
            path = default.config_path
            if path is None or path.startswith(("hydra/", "_dummy")):
                continue
            self.check_option(path)
            if path.startswith(_SCHEMAS):
                continue
            group, _, option = path.partition("/")
            if option:
                chosen[group] = option
            label = f"{group} {option}" if option else "conf/config.yaml"
            for key in flatten(OmegaConf.to_container(self.load_raw(path)), default.package or ""):
                origins[key] = label
        return Composed(config, origins, chosen)


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value for every leaf of nested mappings; lists and empty mappings are leaves."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


@contextmanager
def session() -> Iterator[Session]:
    """Open Hydra with the project's search path and generated schemas; a Hydra already open is restored afterwards."""
    plugins = Plugins.instance()
    if MitigateSearchPath not in plugins.discover():
        plugins.register(MitigateSearchPath)
    store = ConfigStore.instance()
    for group in _GENERATED:  # a class registered at run time may have changed since
        store.repo[group] = {}
    store.store(name="run_schema", node=RunConfig, provider="mitigate")
    with initialize_config_module("mitigate.conf", job_name="mitigate", version_base="1.3"):
        yield Session()


def _remember_files(source: Any) -> Callable[[str], Any]:
    """Return what parses each file of a source once; Hydra, too, gets its files from there.

    Hydra would parse every file several times in every composition. What an experiment says about a published table
    (`mitigate.reproduction`) is no part of a run, so it is kept from Hydra.
    """
    parse = cache(source.load_config)

    @cache
    def part_of_a_run(path: str) -> Any:
        result = copy.deepcopy(parse(path))
        if path.startswith("experiment/") and isinstance(result.config, DictConfig):
            result.config.pop("reproduction", None)
        return result

    # Hydra changes what it is given
    source.load_config = lambda config_path: copy.deepcopy(part_of_a_run(config_path))
    return parse


def _registry_of(group: str) -> Registry[Any]:
    return methods() if group == "methods" else benchmarks()


def _store_schema(group: str, name: str) -> None:
    """Generate and store the options of one plugin.

    Raises
    ------
    UnknownName, DuplicateName, PluginError
        Why there is no such plugin, or why it cannot be used.
    """
    registry = _registry_of(group)
    plugin, provider = registry.get(name), f"mitigate:{registry.origin(name).distribution}"
    schema = schema_of(name, plugin, extras=("preset",) if group == "methods" else (), unset=group == "methods")
    node: Any = {name: schema} if group == "methods" else schema
    ConfigStore.instance().store(group=group, name=name, node=node, provider=provider)


def _explain(error: BaseException) -> str:
    """Shorten an error of Hydra, OmegaConf or YAML to one or two lines: where, and what."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        known = (line.strip() for line in str(cause).splitlines())
        lines += [
            line for line in known if line and not line.startswith(("full_key:", "object_type=", "reference_type="))
        ]
        cause = cause.__cause__
    return "\n".join(list(dict.fromkeys(lines))[:2])
