"""What experiments say about published tables: rows, columns, and where every setting comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from omegaconf import OmegaConf

from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from mitigate.compose.session import Session

_T = TypeVar("_T")
ORIGINS: Final = ("paper", "code", "chosen")
"""Where a setting is from: the paper, its authors' code, or neither, so that this project had to choose."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A published value.

    Parameters
    ----------
    value
        As printed.
    note
        What is known to be wrong or odd about it.
    """

    value: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a published column is measured.

    Parameters
    ----------
    metric
        Name of the metric.
    scale
        What the metric is multiplied with to give the published unit; ``None``: 100 for rates, else 1.
    complement
        Whether the paper prints 100 minus the metric (an error rate for an accuracy).
    decimals
        Digits printed after the point: a published value stands for everything that rounds to it.
    """

    metric: str
    scale: float | None = None
    complement: bool = False
    decimals: int = 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the value of a setting is from.

    Parameters
    ----------
    origin
        One of `ORIGINS`.
    why
        What the source says, or why this value was chosen.
    models
        The models this holds for; for all others the value was chosen. Empty: for all.
    """

    origin: str
    why: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one benchmark is run for a paper.

    Parameters
    ----------
    name
        The experiment that sets it up.
    benchmark
        Registered name of its benchmark.
    columns
        Published column -> how it is measured.
    settings
        Dotted configuration key -> where its value is from.
    decoding
        Overrides that give its decoding, for another benchmark.
    testbed
        Overrides that choose the same kind of task on the embedded testbed; ``None``: it has none.
    testbed_columns
        As `columns`, on the testbed.
    """

    name: str
    benchmark: str
    columns: Mapping[str, Column]
    settings: Mapping[str, Setting]
    decoding: tuple[str, ...]
    testbed: tuple[str, ...] | None
    testbed_columns: Mapping[str, Column]


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """The rows of one model.

    Parameters
    ----------
    printed
        The model's name in the paper.
    stand_in
        Why the model that runs here is another one, if it is; no verdict is drawn then.
    rows
        Stack -> column -> cell.
    """

    printed: str
    stand_in: str
    rows: Mapping[str, Mapping[str, Cell]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published table, as far as it can be run here.

    Parameters
    ----------
    name
        The experiment.
    paper, arxiv, table
        Title, arXiv number with version, and the table's name.
    protocols
        Experiments that measure its columns.
    vanilla
        The stack of the row without the paper's method.
    names
        Stack -> the row's name in the paper.
    models
        Model of ``conf/model`` -> its rows.
    notes
        Sentences on the whole table.
    left_out
        What of the table cannot be run, and why.
    """

    name: str
    paper: str
    arxiv: str
    table: str
    protocols: tuple[str, ...]
    vanilla: str
    names: Mapping[str, str]
    models: Mapping[str, PublishedModel]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    def stacks(self, model: str, protocol: Protocol) -> list[str]:
        """Return the stacks that have a published value of a model under a protocol, the vanilla one first."""
        rows = self.models[model].rows
        found = [stack for stack in self.names if set(rows.get(stack, {})) & set(protocol.columns)]
        return [self.vanilla, *(stack for stack in found if stack != self.vanilla)] if found else []


def read_tables(hydra: Session) -> dict[str, Published]:
    """Return the published tables among the experiments, by name; as `read_table`."""
    found = {name: read_table(hydra, name) for name in hydra.options("experiment")}
    return {name: table for name, table in found.items() if table is not None}


def read_table(hydra: Session, name: str) -> Published | None:
    """Return the published table an experiment holds, if it does.

    Raises
    ------
    ConfigError
        If it is not written as a table must be; names file and key.
    """
    node = _raw(hydra, name).get("reproduction") or {}
    return _table(name, node) if "models" in node else None


def read_protocol(hydra: Session, name: str) -> Protocol:
    """Return the protocol an experiment describes, with what the experiments it builds on say.

    Raises
    ------
    ConfigError
        If there is none, or it is not written as a protocol must be.
    """
    if name not in hydra.options("experiment"):
        raise ConfigError(f"protocol {name!r} is no experiment; add conf/experiment/{name}.yaml")
    ask = _Reader(name)
    content = _inherited(hydra, name)
    node, benchmark = content.get("reproduction") or {}, content["chosen"].get("benchmark")
    ask.keys(node, "", ("columns", "settings", "testbed"))
    if benchmark is None or not node.get("columns"):
        raise ask.error("", "a protocol needs columns, and `override /benchmark` among the defaults")
    testbed = ask.mapping(node.get("testbed") or {}, "testbed")
    ask.keys(testbed, "testbed", ("overrides", "columns"))
    return Protocol(
        name=name,
        benchmark=benchmark,
        columns=ask.each(node["columns"], "columns", ask.column),
        settings=ask.each(node.get("settings") or {}, "settings", ask.setting),
        decoding=(
            *(f"decoding={option}" for group, option in content["chosen"].items() if group == "decoding"),
            *(f"decoding.{key}={value}" for key, value in (content.get("decoding") or {}).items()),
        ),
        testbed=ask.texts(testbed["overrides"], "testbed.overrides") if testbed else None,
        testbed_columns=ask.each(testbed.get("columns") or {}, "testbed.columns", ask.column),
    )


def _raw(hydra: Session, name: str) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(hydra.load_raw(f"experiment/{name}"))
    return content or {}


def _inherited(hydra: Session, name: str) -> dict[str, Any]:
    """Merge an experiment with those it builds on; ``chosen`` has the options of groups they choose."""
    merged: dict[str, Any] = {"chosen": {}}
    for default in hydra.defaults_of(f"experiment/{name}"):
        group, path = getattr(default, "group", None), getattr(default, "path", None)
        if group is not None:
            merged["chosen"][str(group).lstrip("/")] = str(default.value)
        elif path not in (None, "_self_"):
            merged = _merged(merged, _inherited(hydra, str(path)))
    return _merged(merged, _raw(hydra, name))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in below if isinstance(below[key], dict) and isinstance(above.get(key), dict)}
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def _table(name: str, node: Mapping[str, Any]) -> Published:
    ask = _Reader(name)
    required = ("paper", "arxiv", "table", "protocols", "vanilla", "names", "models")
    # a table also builds on a protocol, whose keys are read where the protocol is
    ask.keys(node, "", (*required, "notes", "left_out"))
    for key in required:
        if not node.get(key):
            raise ask.error(key, "is missing")
    names = {str(stack): str(printed) for stack, printed in ask.mapping(node["names"], "names").items()}
    return Published(
        name=name,
        paper=str(node["paper"]),
        arxiv=str(node["arxiv"]),
        table=str(node["table"]),
        vanilla=str(node["vanilla"]),
        protocols=ask.texts(node["protocols"], "protocols"),
        names=names,
        models=ask.each(node["models"], "models", partial(_model, ask, names)),
        notes=ask.texts(node.get("notes") or [], "notes"),
        left_out=ask.texts(node.get("left_out") or [], "left_out"),
    )


def _model(ask: _Reader, names: Mapping[str, str], value: Any, key: str) -> PublishedModel:
    node = ask.mapping(value, key)
    ask.keys(node, key, ("printed", "stand_in", "rows"))
    rows = ask.each(node.get("rows"), f"{key}.rows", ask.row)
    if unnamed := sorted(set(rows) - set(names)):
        raise ask.error(f"{key}.rows.{unnamed[0]}", "has no name in `names`")
    printed, stand_in = str(node.get("printed", "")), str(node.get("stand_in", ""))
    return PublishedModel(printed=printed, stand_in=stand_in, rows=rows)


@dataclass(frozen=True)
class _Reader:
    """Reads plain values of one experiment's ``reproduction`` node; every complaint names file and key."""

    experiment: str

    def error(self, key: str, problem: str) -> ConfigError:
        place = f"reproduction.{key}" if key else "reproduction"
        return ConfigError(f"conf/experiment/{self.experiment}.yaml: {place} {problem}")

    def keys(self, node: Mapping[str, Any], key: str, known: Sequence[str]) -> None:
        if unknown := [name for name in node if name not in known]:
            place = f"{key}.{unknown[0]}" if key else str(unknown[0])
            raise self.error(place, f"is unknown; known: {', '.join(known)}")

    def mapping(self, value: Any, key: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be a mapping, but is {value!r}")
        return {str(name): item for name, item in value.items()}

    def texts(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"must be a list of texts, but is {value!r}")
        return tuple(value)

    def each(self, value: Any, key: str, read: Callable[[Any, str], _T]) -> dict[str, _T]:
        return {name: read(item, f"{key}.{name}") for name, item in self.mapping(value, key).items()}

    def row(self, value: Any, key: str) -> dict[str, Cell]:
        return self.each(value, key, self.cell)

    def cell(self, value: Any, key: str) -> Cell:
        node = value if isinstance(value, Mapping) else {"value": value}
        self.keys(node, key, ("value", "note"))
        number = node.get("value")
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise self.error(key, f"must be a number, or have a number as `value`, but is {value!r}")
        return Cell(value=float(number), note=str(node.get("note", "")))

    def column(self, value: Any, key: str) -> Column:
        node = value if isinstance(value, Mapping) else {"metric": value}
        self.keys(node, key, tuple(field.name for field in fields(Column)))
        if not isinstance(node.get("metric"), str):
            raise self.error(key, "must name a metric")
        return Column(**{str(name): item for name, item in node.items()})

    def setting(self, value: Any, key: str) -> Setting:
        node = self.mapping(value, key)
        self.keys(node, key, ("from", "why", "models"))
        if node.get("from") not in ORIGINS or not node.get("why"):
            raise self.error(key, f"needs `from` ({', '.join(ORIGINS)}) and `why`")
        models = self.texts(node.get("models") or [], f"{key}.models")
        return Setting(origin=node["from"], why=str(node["why"]), models=models)
