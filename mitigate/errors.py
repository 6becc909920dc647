"""Exceptions of the project: each one names the culprit and the remedy, and the CLI turns it into exit code 2."""

from __future__ import annotations


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
