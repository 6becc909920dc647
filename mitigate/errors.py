"""Exceptions of the project: each one names the culprit and the remedy, and the CLI turns it into exit code 2."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import Path


class MitigateError(Exception):
    """Base class: a problem the user can fix. Its message is one or two lines."""


class ConfigError(MitigateError):
    """A configuration value, key or combination that cannot be right."""


class UnknownName(ConfigError):
    """A name no registry knows (the message lists the nearest known ones)."""


class DuplicateName(ConfigError):
    """Two plugins claim one name."""


class PluginError(MitigateError):
    """A selected plugin cannot be imported or breaks the plugin contract."""


class StackConflict(ConfigError):
    """Two methods of one stack, or a method and a way of decoding, exclude each other."""


class UnsupportedModel(MitigateError):
    """The model cannot serve what a method or the bus needs."""


class LayoutError(MitigateError):
    """Token roles cannot be derived from the processor's output; they are never guessed."""


class HookError(MitigateError):
    """A method's handler failed; the message names method, point, layer and step."""


class DataError(MitigateError):
    """A data file, record or artefact is missing, damaged or does not belong to this run."""


def described(error: BaseException, source: str = "") -> str:
    """Write an exception in one line: ``TypeError: reason (file.py:12)``.

    Parameters
    ----------
    error
        A raised exception.
    source
        File of the culprit: the place is the last line of it that the exception came through; without one, or where
        there is none, the line that raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == source] or frames
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    reason = textwrap.shorten(str(error), 300, placeholder=" ...")
    return f"{type(error).__name__}{': ' if reason else ''}{reason}{place}"
