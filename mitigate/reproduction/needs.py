"""What a run needs that is not on this machine. Nothing is downloaded to find out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mitigate.errors import ConfigError, MitigateError
from mitigate.hubcache import cached_instead, download_command

if TYPE_CHECKING:
    from mitigate.benchmarks.base import Benchmark
    from mitigate.compose import ResolvedRun
    from mitigate.compose.session import Session
    from mitigate.data.sources import Source
    from mitigate.reproduction.planning import Job

#: Weights in one file, and the lists of files of weights in several.
_SINGLE: Final = ("model.safetensors", "pytorch_model.bin")
_INDEX: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that is not here.

    Parameters
    ----------
    kind
        ``model``, ``weights``, ``words`` or ``data``.
    what
        What is missing, in a few words.
    remedy
        How to get it.
    """

    kind: str
    what: str
    remedy: str


def missing_of(jobs: Sequence[Job]) -> dict[Missing, list[Job]]:
    """Return what comparisons need and do not find on this machine, with those that need it."""
    found: dict[Missing, list[Job]] = {}
    known: dict[str, list[Missing]] = {}
    for job in jobs:
        run = job.runs[0]
        # the same model or data in several comparisons is looked for once
        key = f"{run.config['model']} {run.config['benchmark']}"
        if key not in known:
            known[key] = missing_for(run)
        for missing in known[key]:
            found.setdefault(missing, []).append(job)
    return found


def refuse_missing(jobs: Sequence[Job]) -> None:
    """Refuse to start if anything is missing.

    Raises
    ------
    ConfigError
        Naming the first thing that is missing, how to get it, and how to see the others.
    """
    missing = missing_of(jobs)
    if not missing:
        return
    first, *others = missing
    more = f"; {len(others)} more things are missing" if others else ""
    raise ConfigError(
        f"{first.what} (get it: {first.remedy}){more}\n"
        f"`mitigate reproduce {jobs[0].published.name} --dry-run` lists all; model= and benchmark= choose among the "
        f"table's, model=testbed tries it in small"
    )


def missing_for(run: ResolvedRun) -> list[Missing]:
    """Return what a run needs and does not find."""
    from mitigate.compose.checks import check_served

    found = []
    try:
        check_served(run.config, run.facts)
    except MitigateError as error:
        found.append(Missing(kind="model", what=str(error), remedy="add an adapter for the family"))
    weights = missing_weights(run.config["model"])
    words = missing_words(run.benchmark)
    return [*found, *(item for item in (weights, words) if item is not None), *missing_data(run.benchmark)]


def missing_words(benchmark: Benchmark) -> Missing | None:
    """Return what reading captions takes and is not installed: seen now, and not when all captions are there."""
    from mitigate.metrics.lemmatizers import lemmatize

    lemmatizer = getattr(benchmark, "lemmatizer", None)
    if lemmatizer is None:
        return None
    try:
        lemmatize("a dog", lemmatizer)
    except MitigateError as error:
        what, _, remedy = str(error).partition("; get it with: ")
        return Missing(kind="words", what=f"{benchmark.name}: {what}", remedy=remedy or "as the line above says")
    return None


def missing_in_short(hydra: Session, models: Sequence[str], names: Sequence[str]) -> list[str]:
    """Say in a few words which weights and files of whole benchmarks are missing, without composing anything."""
    from mitigate.data.sources import data_folder
    from mitigate.registry import adapters, benchmarks

    known = {name: hydra.load_raw(f"model/{name}") for name in models}
    absent = [name for name, model in known.items() if missing_weights(model) is not None]
    unserved = [name for name, model in known.items() if model.get("family") not in (None, *adapters().names())]
    without = [name for name in names if _missing_sources(benchmarks().get(name).sources, data_folder(name, None))]
    lines = [("weights", absent), ("an adapter", unserved), ("data", without)]
    return [f"{what}: {', '.join(found)}" for what, found in lines if found]


def missing_weights(model: Mapping[str, Any]) -> Missing | None:
    """Return why a checkpoint cannot be loaded without a network; ``None`` if it can.

    Parameters
    ----------
    model
        The ``model`` section of a run's configuration.
    """
    path = str(model["path"])
    if path == "testbed":
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        lacking = _lacking(folder)
        remedy = f"copy the whole checkpoint into {folder}"
    else:
        revision = model.get("revision")
        cached = _snapshot(path, revision)
        other = cached_instead(path, revision) if cached is None else None
        lacking = "no copy in the hub cache" if cached is None else _lacking(cached)
        remedy = f"{download_command(path, revision)}, or model.path=FOLDER for a local copy"
        if other is not None:
            lacking = f"the hub cache has another revision than {revision or 'main'}"
            remedy = f"{download_command(path, revision)}, or model.revision={other} for the one that is there"
    if not lacking:
        return None
    return Missing(kind="weights", what=f"weights of {model['name']} ({path}): {lacking}", remedy=remedy)


def _snapshot(path: str, revision: str | None) -> Path | None:
    """Return the folder of a hub id's cached files."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _lacking(folder: Path) -> str:
    """Return what a checkpoint's folder lacks; empty if it has its configuration and all its weights."""
    from mitigate.jsonfiles import read_object

    if not (folder / "config.json").is_file():
        return f"no config.json in {folder}"
    if any((folder / name).is_file() for name in _SINGLE):
        return ""
    index = next((folder / name for name in _INDEX if (folder / name).is_file()), None)
    if index is None:
        return f"no weights in {folder}"
    try:
        shards = sorted(set(read_object(index)["weight_map"].values()))
    except (MitigateError, KeyError, AttributeError):
        return f"{index} cannot be read"
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    return f"{len(absent)} of {len(shards)} files of weights are missing, first {absent[0]}" if absent else ""


def missing_data(benchmark: Benchmark) -> list[Missing]:
    """Return the files and pictures a benchmark needs with its settings and does not find."""
    from mitigate.data.checking import check_pictures
    from mitigate.data.sources import data_folder

    folder = data_folder(benchmark.name, getattr(benchmark, "data_dir", None))
    fetch = f"mitigate data fetch {benchmark.name}"
    if absent := _missing_sources(benchmark.sources, folder):
        return [
            Missing(
                kind="data",
                what=f"{benchmark.name}: {source.location(folder)}",
                remedy=fetch if source.url else source.instruction,
            )
            for source in absent
        ]
    pictures = check_pictures(benchmark, decode=False)
    if isinstance(pictures, str):
        what, _, remedy = pictures.partition("\n")
        check = f"mitigate data check {benchmark.name}"
        return [Missing(kind="data", what=f"{benchmark.name}: {what}", remedy=remedy or check)]
    if pictures.problems:
        what = f"{benchmark.name}: {len(pictures.problems)} of {pictures.needed} pictures, first {pictures.problems[0]}"
        return [Missing(kind="data", what=what, remedy=fetch)]
    return []


def _missing_sources(sources: Sequence[Source], folder: Path) -> list[Source]:
    """Return what every setting of a benchmark needs and is not there."""
    return [
        source
        for source in sources
        if not source.optional
        and not (source.location(folder).is_dir() if source.is_folder else source.location(folder).is_file())
    ]
