"""Collecting broken methods, each with the check that must fail and what its message must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mitigate.core import Method


@dataclass(frozen=True)
class Broken:
    plugin: type[Method]
    check: str
    message: str
    params: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.plugin.__name__}-{self.check}"


#: Module -> what is broken there.
BROKEN: list[Broken] = []


def caught_by(check: str, message: str, **params: Any) -> Callable[[type[Any]], type[Any]]:
    """Note that a check must fail for a class with these parameters, with a message that matches."""

    def note(plugin: type[Any]) -> type[Any]:
        BROKEN.append(Broken(plugin, check, message, params))
        return plugin

    return note
