"""Whether stored runs can stand in one table: one model, one set of questions, and nothing but the stack differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mitigate.errors import ConfigError
from mitigate.runner.identity import identity

if TYPE_CHECKING:
    from mitigate.runner.stored import StoredRun


def check_comparable(runs: Sequence[StoredRun]) -> None:
    """Refuse runs that a paired comparison would mix up.

    Raises
    ------
    ConfigError
        Naming two runs and the setting in which they differ.
    """
    first = runs[0]
    stacks: dict[str, StoredRun] = {}
    for run in runs:
        for setting, (here, there) in _differences(first, run).items():
            raise ConfigError(
                f"{first.directory} and {run.directory} cannot be compared, they differ in {setting}: "
                f"{here} in the first, {there} in the second; report them separately"
            )
        other = stacks.setdefault(run.stack, run)
        if other.methods != run.methods:
            raise ConfigError(
                f"{other.directory} and {run.directory} are both called {run.stack!r}, but their methods differ; "
                "report them separately"
            )


def _differences(one: StoredRun, other: StoredRun) -> dict[str, tuple[Any, Any]]:
    """Return the settings, and the hashes of data and prompts, that are not the same in two runs."""
    sides = []
    for run in (one, other):
        own = {
            key: value
            for key, value in identity(run.config).items()
            if key.split(".")[0] not in ("methods", "seed", "stack", "trainer")
        }
        own |= {"the data's sha256": run.record.data_hash, "the prompts' sha256": run.record.prompt_hash}
        sides.append({"the weights": run.record.weights, **own})
    first, second = sides
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}
