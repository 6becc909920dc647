"""Which weights and which code ran: known before a model is loaded, so that a finished run is recognised cheaply."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final

from mitigate.errors import DataError

if TYPE_CHECKING:
    from mitigate.adapters import LoadedModel

#: Files of a checkpoint that decide a reply: weights, configuration, processor and tokenizer, code it brings along.
PATTERNS: Final = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*", "*.py",
)  # fmt: skip
_SHOWN = 12
#: Where methods of this project keep what they share.
_SHARED: Final = "mitigate.ops"


def weights_before_loading(model: Mapping[str, Any]) -> str:
    """Return what identifies a checkpoint, without loading it.

    Parameters
    ----------
    model
        The ``model`` section of a run's configuration.

    Returns
    -------
    str
        ``sha256:...`` over the files of a local folder, ``commit:...`` for a hub id whose commit the local cache
        knows, empty where only loading can tell.

    Raises
    ------
    DataError
        If a file of the folder cannot be read.
    """
    folder = _local_folder(str(model["path"]))
    return f"sha256:{_folder_hash(folder)}" if folder is not None else _cached_commit(model)


def weights_of_loaded(model: Mapping[str, Any], loaded: LoadedModel) -> str:
    """Return what identifies a checkpoint that is loaded; as `weights_before_loading`, and a hub id's commit for sure.

    Raises
    ------
    DataError
        If a file of the folder cannot be read.
    """
    if _local_folder(str(model["path"])) is not None:
        return weights_before_loading(model)
    commit = getattr(getattr(loaded.model, "config", None), "_commit_hash", None)
    return f"commit:{commit}" if commit else ""


def code_hash(plugin: type) -> str:
    """Return a short hash of the source a class stands on.

    That is the file that defines it, those of the plugins it extends, and what they import from the shared operations
    (``mitigate.ops``) or, for a plugin from elsewhere, from its own package. Where there is no file (a notebook), it is
    the class's own functions and those of the notebook that they call.
    """
    try:
        files: set[Path] = set()
        for owner in plugin.__mro__[:-1]:
            if "api" in vars(owner):  # the interface itself; the version of the project tells
                break
            path = inspect.getsourcefile(owner)
            if path is None:
                return _functions_hash(plugin)
            own = owner.__module__.partition(".")[0]
            files |= _sources(Path(path), owner.__module__, _SHARED if own == _SHARED.partition(".")[0] else own)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files)))
        return digest.hexdigest()[:_SHOWN]
    except (OSError, TypeError):
        return _functions_hash(plugin)


def _functions_hash(plugin: type) -> str:
    """Return a short hash of what a class defines itself, from its compiled functions."""
    own = [item for item in sorted(vars(plugin).items()) if item[0] != "__doc__" and "__dataclass_" not in item[0]]
    called = _called([function for _, value in own if isinstance(function := _function(value), FunctionType)])
    parts = [f"{name} {_compiled(value)}" for name, value in [*own, *sorted(called.items())]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_SHOWN]


def _function(value: Any) -> Any:
    """Return the function inside a class or static method or a property, else the value itself."""
    return next((found for part in ("__func__", "fget", "func") if (found := getattr(value, part, None))), value)


def _called(functions: list[FunctionType]) -> dict[str, FunctionType]:
    """Return the functions of the same module that some functions call, directly or through one another."""
    found: dict[str, FunctionType] = {}
    while functions:
        function = functions.pop()
        for name in function.__code__.co_names:
            other = function.__globals__.get(name)
            if isinstance(other, FunctionType) and other.__module__ == function.__module__ and name not in found:
                found[name] = other
                functions.append(other)
    return found


def _compiled(value: Any) -> str:
    """Write a class attribute or a constant so that the same source gives the same text in every process."""
    code = getattr(_function(value), "__code__", value)
    if isinstance(code, CodeType):
        return " ".join([code.co_code.hex(), *code.co_names, *map(_compiled, code.co_consts)])
    if isinstance(value, frozenset | set):
        return str(sorted(map(repr, value)))
    return repr(value) if isinstance(value, str | int | float | bool | tuple | list | dict | None) else ""


def _sources(path: Path, module: str, package: str) -> set[Path]:
    """Return a source file and the files of a package that it imports, directly or through one another."""
    found, waiting = {path}, [(path, module)]
    while waiting:
        for name in _imported(*waiting.pop()):
            if name == package or name.startswith(f"{package}."):
                file = _file_of(name)
                if file is not None and file not in found:
                    found.add(file)
                    waiting.append((file, name))
    return found


def _imported(path: Path, module: str) -> Iterator[str]:
    """Yield the dotted names a file imports; what follows ``import`` may be a module or a name in one."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # a name in a module, not a module
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _local_folder(path: str) -> Path | None:
    if path == "testbed":
        from mitigate.testbed.model import checkpoint_path

        return Path(checkpoint_path())
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def _folder_hash(folder: Path) -> str:
    """Return one hash over the names and contents of a checkpoint's files."""
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PATTERNS):
                facts = path.stat()
                digest.update(f"{path.name}\0{_file_hash(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    except OSError as error:
        raise DataError(f"the checkpoint {folder} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    """Return a file's hash, read piece by piece; size and time only tell whether a remembered one still holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_commit(model: Mapping[str, Any]) -> str:
    """Return the commit the local hub cache has for a hub id: the folder of its snapshot."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(model["path"]), "config.json", revision=model.get("revision"))
    except (HFValidationError, OSError):
        return ""  # no hub id either: loading says what is wrong with it
    return f"commit:{Path(found).parent.name}" if isinstance(found, str) else ""
