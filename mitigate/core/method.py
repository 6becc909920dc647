"""What a mitigation method is: a frozen dataclass of plain parameters plus handlers named after the points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self

from mitigate.core.facts import ModelFacts
from mitigate.core.points import Branch, Point, Subscription
from mitigate.errors import ConfigError, UnknownName


class Fidelity(StrEnum):
    """How close a method is to its source."""

    PAPER = "paper"
    RECONSTRUCTED = "reconstructed"
    FROM_ABSTRACT = "from-abstract"
    CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Capabilities and honest costs, checked when a stack is built.

    Parameters
    ----------
    reads, writes
        Points the method subscribes to.
    gradient
        Needs the gradient of the last attention row.
    selects_token
        Chooses the next token itself; such a stack runs with ``handle.generate`` only.
    owns_loop
        Drives the decoding loop; at most one method of a stack can.
    stochastic
        Draws random numbers (from the request's per-sample generators).
    batch
        Serves batches of more than one sample.
    spatial_grid
        Needs image tokens that form a raster.
    forwards_per_sample, forwards_per_token, backwards_per_sample, backwards_per_token
        Extra passes over plain generation: the most it can cost.
    """

    reads: frozenset[Point] = frozenset()
    writes: frozenset[Point] = frozenset()
    gradient: bool = False
    selects_token: bool = False
    owns_loop: bool = False
    stochastic: bool = False
    batch: bool = True
    spatial_grid: bool = False
    forwards_per_sample: float = 0.0
    forwards_per_token: float = 0.0
    backwards_per_sample: float = 0.0
    backwards_per_token: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of every method.

    A subclass adds parameters (plain values only), says where it acts (`subscriptions`) and brings one handler
    ``on_<point>(event, state)`` per point. A handler returns the new value, or ``None`` for "unchanged"; it never edits
    a tensor in place, and keeps what it must remember on ``state``, which lives as long as one request.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    paper: ClassVar[Paper | None] = None
    tags: ClassVar[Tags]
    version: ClassVar[int] = 1
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    preset_fidelity: ClassVar[Mapping[str, Fidelity]] = {}
    """Presets whose fidelity differs from the class's."""

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        """Say where the method acts on a model of this geometry."""
        raise NotImplementedError(f"{type(self).__name__} does not say where it acts: override subscriptions()")

    def branches(self) -> Sequence[Branch]:
        """Return the extra streams these parameters need; none by default.

        Each one costs up to one forward per token, which `Tags.forwards_per_token` must own up to.
        """
        return ()

    def check_model(self, model_name_or_path: str, facts: ModelFacts | None) -> None:
        """Refuse a model the method cannot serve; asked while a run is composed, before anything is loaded.

        Parameters
        ----------
        model_name_or_path
            Hub id or folder, or ``testbed`` for the model packaged with the project.
        facts
            The model's geometry, or ``None`` if it is not known yet.

        Raises
        ------
        ConfigError
            If the method needs another model; the message says which. The default accepts every model.
        """

    @property
    def needs_gradient(self) -> bool:
        """Whether these parameters need the gradient of attention rows; what the tags say by default."""
        return self.tags.gradient

    def ablations(self, telemetry: Mapping[str, float]) -> dict[str, Method]:
        """Return variants of this method that show which part of it matters; none by default.

        Parameters
        ----------
        telemetry
            What this method counted in a finished run, for variants that must match a measured rate.
        """
        return {}

    @classmethod
    def identity(cls) -> Self:
        """Return the method with parameters that must leave the model bit-identical."""
        raise NotImplementedError(f"{cls.__name__} does not define its identity parameters")

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        """Return at least two cheap, non-default parameter sets for the conformance checks."""
        return [{}]

    @classmethod
    def preset(cls, preset_name: str, **values: Any) -> Self:
        """Build the method from a named preset; explicit values win.

        Raises
        ------
        UnknownName
            If the method has no such preset.
        """
        if preset_name not in cls.presets:
            raise UnknownName(f"{cls.name} has no preset {preset_name!r}; it has: {', '.join(cls.presets)}")
        return cls(**{**cls.presets[preset_name], **values})

    @classmethod
    def fidelity_of(cls, preset_name: str) -> Fidelity:
        """Return how close a preset is to the source."""
        return cls.preset_fidelity.get(preset_name, cls.fidelity)

    def require_finite(self, *parameters: str) -> None:
        """Raise a `ConfigError` if one of the parameters is infinite or not a number."""
        for parameter in parameters:
            self.require(math.isfinite(getattr(self, parameter)), parameter, "be a finite number")

    def params(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def require(self, condition: bool, parameter: str, must: str) -> None:
        """Raise a `ConfigError` that names the parameter unless the condition holds."""
        if not condition:
            raise ConfigError(f"methods.{self.name}.{parameter}={getattr(self, parameter)!r} must {must}")

    def require_option(self, parameter: str, options: Sequence[str]) -> None:
        """Raise a `ConfigError` unless the parameter's value is one of the options."""
        self.require(getattr(self, parameter) in options, parameter, "be one of " + ", ".join(options))
