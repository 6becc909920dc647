"""Flags of the commands that take files and names rather than overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mitigate.errors import ConfigError
from mitigate.registry import suggestion

_HELP = ("-h", "--help")


def wants_help(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments ask for help."""
    return any(argument in _HELP for argument in arguments)


def read_flags(command: str, arguments: Sequence[str], flags: Mapping[str, bool]) -> tuple[list[str], dict[str, str]]:
    """Separate flags from words.

    Parameters
    ----------
    command
        For messages.
    arguments
        What follows the command.
    flags
        Flag, such as ``--json`` -> whether it takes a value (``--data DIR`` or ``--data=DIR``).

    Returns
    -------
    tuple
        The words in order, and flag -> value; a flag without a value has an empty one.

    Raises
    ------
    ConfigError
        At an unknown flag, one that comes twice, a missing value, or a value nobody takes.
    """
    words: list[str] = []
    found: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, given, value = argument.partition("=")
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        if flag not in flags:
            raise ConfigError(f"mitigate {command} has no option {flag!r}{suggestion(flag, flags)}")
        if flag in found:
            raise ConfigError(f"{flag} is given twice; keep one of them")
        if not flags[flag]:
            if given:
                raise ConfigError(f"{argument}: {flag} takes no value")
        elif not given:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value: {flag} VALUE")
            value = remaining.pop(0)
        if flags[flag] and not value:
            raise ConfigError(f"{flag} needs a value: {flag} VALUE")
        found[flag] = value
    return words, found
