"""Methods that each break one rule that is seen without a model, with the check and the words that must catch them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mitigate.core import Access, Fidelity, Method, ModelFacts, Paper, Point, Rows, Subscription, Tags
from mitigate.errors import ConfigError, UnsupportedModel
from tests.testing.gentle import Gentle

#: Broken class, the check that must fail, what its message must say.
BROKEN: list[tuple[type[Method], str, str]] = []

_HIDDEN, _PROBS = Point.HIDDEN_STATES, Point.ATTENTION_PROBS
_WRITES = frozenset({_HIDDEN})


def caught_by(check: str, message: str) -> Callable[[type[Any]], type[Any]]:
    def note(plugin: type[Any]) -> type[Any]:
        BROKEN.append((plugin, check, message))
        return plugin

    return note


# ------------------------------------------------------------------------------------------------------------- the name


@caught_by("check_name", r"'Gentle-2' cannot be written .* lower_snake_case")
class CamelName(Gentle):
    name: ClassVar[str] = "Gentle-2"


@caught_by("check_name", r"'none' cannot be written")
class CalledNone(Gentle):
    name: ClassVar[str] = "none"


@caught_by("check_name", r"gently: its file is called broken_api\.py; call it gently\.py")
class OtherFile(Gentle):
    name: ClassVar[str] = "gently"


@caught_by("check_name", r"locore: the name is taken by mitigate\.methods\.locore:LocoRE; choose another")
class TakenName(Gentle):
    name: ClassVar[str] = "locore"
    __module__ = "somebody.locore"


# ------------------------------------------------------------------------------------------------------- the parameters


@caught_by("check_parameters", r"gentle: decorate NotDecorated with @dataclass\(frozen=True, kw_only=True\)")
class NotDecorated(Gentle):
    """Its own parameter is silently none."""

    more: float = 1.0


@dataclass
class _Thawed:
    gain: float = 1.0


@caught_by("check_parameters", r"gentle: parameters can be changed while it runs; write @dataclass\(frozen=True")
class NotFrozen(Gentle):
    __dataclass_params__ = _Thawed.__dataclass_params__  # type: ignore[attr-defined]


@caught_by("check_parameters", r"gentle\.more is positional; write @dataclass\(\.\.\., kw_only=True\)")
@dataclass(frozen=True)
class Positional(Gentle):
    more: float = 1.0


@caught_by("check_parameters", r"gentle\.seen is no argument of the constructor .* keep state on `state`")
@dataclass(frozen=True, kw_only=True)
class NotInit(Gentle):
    seen: int = field(default=0, init=False)


@caught_by("check_parameters", r"gentle takes \*\*more.*: every parameter needs a name")
@dataclass(frozen=True, kw_only=True, init=False)
class Swallows(Gentle):
    def __init__(self, **more: Any) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, more.get(each.name, each.default))


@caught_by("check_parameters", r"gentle\.anything: Any cannot be checked; annotate it as int, float")
@dataclass(frozen=True, kw_only=True)
class Untyped(Gentle):
    anything: Any = None


@caught_by("check_parameters", r"annotations cannot be read .*NoSuchName")
@dataclass(frozen=True, kw_only=True)
class Unresolved(Gentle):
    value: NoSuchName = 1.0  # type: ignore[name-defined]  # noqa: F821


@caught_by("check_class_attributes", r"gentle\.strength = 0\.5 is no parameter .* write strength: float = 0\.5")
@dataclass(frozen=True, kw_only=True)
class NotAnnotated(Gentle):
    strength = 0.5


@caught_by("check_class_attributes", r"gentle\.history is a dict shared by all requests: keep .* on `state`")
@dataclass(frozen=True, kw_only=True)
class StateOnClass(Gentle):
    history: ClassVar[dict[str, float]] = {}


@caught_by("check_constructor", r"gentle\.gain: given 2\.0 but keeps 1\.0; refuse what does not fit instead")
@dataclass(frozen=True, kw_only=True)
class Clamps(Gentle):
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gain", min(self.gain, 1.0))


@caught_by("check_constructor", r"gentle sets log_gain on itself: a method keeps parameters only")
@dataclass(frozen=True, kw_only=True)
class KeepsMore(Gentle):
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "log_gain", math.log(abs(self.gain) + 1.0))


@caught_by("check_constructor", r"gentle: the constructor changes what it is given: .*0\.5.* became .*0\.25")
@dataclass(frozen=True, kw_only=True)
class EditsItsInput(Gentle):
    parts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, part in enumerate(self.parts):
            self.parts[index] = part / 2

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [{"parts": [0.5]}, {"parts": [1.0]}]


# ------------------------------------------------------------------------------------ parameter sets, presets and texts


@caught_by("check_test_params", r"gentle\.test_params\(\) returns 1 parameter set\(s\): return at least two")
class OneSet(Gentle):
    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [{"gain": 2.0}]


@caught_by("check_test_params", r"no parameter 'gian'; did you mean 'gain'\?")
class MisspeltSet(Gentle):
    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [*super().test_params(), {"gian": 2.0}]


@caught_by("check_test_params", r"\{'side': 'up'\} cannot be built: methods\.gentle\.side='up' must be one of")
class WrongSet(Gentle):
    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [*super().test_params(), {"side": "up"}]


@caught_by("check_test_params", r"\{'gain': 1\.5\} is the default; give values that differ")
class DefaultSet(Gentle):
    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [*super().test_params(), {"gain": 1.5}]


@caught_by("check_test_params", r"gentle\.test_params\(\): side, limit never leaves the default")
class UntestedParameter(Gentle):
    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [{"gain": 2.0, "offset": 1}, {"gain": 0.5, "note": "x", "weights": (0.5,)}]


@caught_by("check_presets", r"gentle\.presets has no 'paper'")
class NoPaperPreset(Gentle):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"loud": {"gain": 4.0}}


@caught_by("check_presets", r"gentle: preset 'loud' cannot be built: .*'gian'")
class MisspeltPreset(Gentle):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "loud": {"gian": 4.0}}


@caught_by("check_presets", r"preset 'deep' serves no model, not even one of 32 layers: .*wants layer 39")
class PresetForNobody(Gentle):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "deep": {"note": "layer 39"}}

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        layers = (39,) if self.note else (model.layers - 1,)
        return [Subscription(point=_HIDDEN, access=Access.WRITE, layers=layers)]


@caught_by("check_presets", r"gentle\.preset_fidelity: 'lout' is no preset; did you mean 'loud'\?")
class FidelityOfNoPreset(Gentle):
    preset_fidelity: ClassVar[dict[str, Fidelity]] = {"lout": Fidelity.PAPER}


@caught_by("check_presets", r"gentle\.preset_fidelity: 'loud' must be a Fidelity, not 'paper'")
class FidelityOfNoKind(Gentle):
    preset_fidelity: ClassVar[dict[str, Any]] = {"loud": "paper"}


@caught_by("check_presets", r"gentle\.fidelity must be one of Fidelity\.PAPER")
class NoFidelity(Gentle):
    fidelity: ClassVar[Any] = "high"


@caught_by("check_docstring", r"gentle: NoDocstring has no docstring")
@dataclass(frozen=True, kw_only=True)
class NoDocstring(Gentle):
    pass


@caught_by("check_docstring", r"begins with one sentence on one line, then an empty line; it begins 'Multiplies the'")
class LongFirstLine(Gentle):
    """Multiplies the
    output.
    """


@caught_by("check_docstring", r"gentle: the docstring does not name its paper \(1234\.56789\)")
class PaperNotNamed(Gentle):
    __doc__ = Gentle.__doc__
    paper: ClassVar[Paper | None] = Paper(title="Another", arxiv="1234.56789", where="Eq. 2")


@caught_by("check_docstring", r"Parameters section does not describe depth")
@dataclass(frozen=True, kw_only=True)
class UndescribedParameter(Gentle):
    """Multiplies. Paper: arXiv 0000.00000."""

    depth: int = 1


@caught_by("check_docstring", r"gentle\.summary must say in one line what it does")
class NoSummary(Gentle):
    __doc__ = Gentle.__doc__
    summary: ClassVar[str] = ""


@caught_by("check_example", r"gentle: the docstring has no example; add an Examples section")
class NoExample(Gentle):
    """Multiplies."""


@caught_by("check_example", r"example does not give what it shows: Gentle\(gain=2\.0\)\.gain Expected: 3\.0 Got: 2\.0")
class WrongExample(Gentle):
    """Multiplies.

    >>> Gentle(gain=2.0).gain
    3.0
    """


@caught_by("check_copy_pickle_repr", r"gentle: a deep copy is not equal to it")
class NotEqual(Gentle):
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Gentle.__hash__


def _local() -> type[Gentle]:
    class Local(Gentle):
        pass

    return Local


caught_by("check_copy_pickle_repr", r"gentle cannot be pickled \(.*\): define the class at the top of its module")(
    _local()
)


@caught_by("check_copy_pickle_repr", r"gentle: a pickled copy is not equal to it")
class ForgetsWhenPickled(Gentle):
    def __deepcopy__(self, memo: Any) -> ForgetsWhenPickled:
        return self

    def __reduce__(self) -> Any:
        return dataclasses.replace, (Gentle(),)


@caught_by("check_copy_pickle_repr", r"gentle: repr gives gentle method; leave it to the dataclass")
class OwnRepr(Gentle):
    def __repr__(self) -> str:
        return "gentle method"


# --------------------------------------------------------------------------- values from files, and those to be refused


@caught_by("check_config_round_trip", r"after a configuration file points=\[1\] became \(1,\)")
@dataclass(frozen=True, kw_only=True)
class ListForTuple(Gentle):
    points: tuple[int, ...] = (2,)

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [*super().test_params(), {"points": [1]}]


@caught_by("check_config_round_trip", r"cannot be composed from a file: methods\.gentle\.step: Value .0\.5. ")
@dataclass(frozen=True, kw_only=True)
class WrongAnnotation(Gentle):
    step: int = 1

    @classmethod
    def test_params(cls) -> list[dict[str, Any]]:
        return [*super().test_params(), {"step": 0.5}]


@caught_by("check_bad_numbers", r"gentle accepts gain=nan: call self\.require_finite\('gain', \.\.\.\)")
class AcceptsNaN(Gentle):
    def __post_init__(self) -> None:
        self.require_option("side", ("left", "right"))


@caught_by("check_bad_numbers", r"gentle accepts gain=inf")
class AcceptsInfinity(Gentle):
    def __post_init__(self) -> None:
        self.require(self.gain > -1e9, "gain", "be above the floor")


@caught_by("check_bad_numbers", r"gentle accepts weights=nan")
class AcceptsNaNInTuple(Gentle):
    def __post_init__(self) -> None:
        self.require_finite("gain")
        self.require(self.weights[0] != math.inf, "weights", "be finite")


@caught_by("check_bad_numbers", r"gentle: gain=nan raises AssertionError: .*; refuse it .* with self\.require")
class Asserts(Gentle):
    def __post_init__(self) -> None:
        assert math.isfinite(self.gain), "not finite"


@caught_by("check_bad_numbers", r"gentle: gain=nan is refused without naming gain: something is wrong")
class DoesNotName(Gentle):
    def __post_init__(self) -> None:
        if not math.isfinite(self.gain):
            raise ConfigError("something is wrong")


@caught_by("check_bad_numbers", r"gentle: offset=-1000000 raises IndexError when planned")
class CrashesWhenPlanned(Gentle):
    def __post_init__(self) -> None:
        self.require_finite("gain")

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        layer = list(range(model.layers))[self.offset]
        return [Subscription(point=_HIDDEN, access=Access.WRITE, layers=(layer,))]


@caught_by("check_bad_options", r"gentle accepts side='no such option': call self\.require_option\('side', .*free text")
class AcceptsAnyOption(Gentle):
    def __post_init__(self) -> None:
        self.require_finite("gain")


@caught_by("check_bad_options", r"gentle accepts layers='no such option'")
@dataclass(frozen=True, kw_only=True)
class IgnoresLayers(Gentle):
    layers: str = "all"


# ---------------------------------------------------------------------------------------- tags, handlers, subscriptions


@caught_by("check_tags", r"gentle has no tags: give the class tags")
class NoTags(Gentle):
    tags: ClassVar[Any] = None


@caught_by("check_tags", r"tags\.writes must be a frozenset of Point, not \{'hidden_states'\}")
class TagsOfStrings(Gentle):
    tags: ClassVar[Tags] = Tags(writes={"hidden_states"})  # type: ignore[arg-type]


@caught_by("check_tags", r"tags\.forwards_per_token=-1 must be a number of passes, at least 0")
class NegativeCost(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, forwards_per_token=-1)


@caught_by("check_tags", r"tags\.batch='no' must be True or False")
class TagOfWrongType(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, batch="no")  # type: ignore[arg-type]


@caught_by("check_tags", r"tags name no point it reads or writes, so it can do nothing")
class EmptyTags(Gentle):
    tags: ClassVar[Tags] = Tags()


@caught_by("check_handlers", r"gentle\.on_attention_prob is called by nobody: .*did you mean 'on_attention_probs'\?")
class MisspeltHandler(Gentle):
    def on_attention_prob(self, event: Any, state: Any) -> None:
        return None


@caught_by("check_handlers", r"gentle has a handler on_attention_probs but its tags do not say so")
class UndeclaredHandler(Gentle):
    def on_attention_probs(self, event: Any, state: Any) -> None:
        return None


@caught_by("check_handlers", r"gentle\.on_hidden_states must take \(event, state\)")
class HandlerWithoutState(Gentle):
    def on_hidden_states(self, event: Any) -> None:  # type: ignore[override]
        return None


@caught_by("check_handlers", r"gentle: tags declare attention_probs but there is no handler on_attention_probs")
class NoHandler(Gentle):
    tags: ClassVar[Tags] = Tags(writes=frozenset({_HIDDEN, _PROBS}))


class _Asks(Gentle):
    """Subscribes as `asks` says, with handlers for it."""

    asks: ClassVar[tuple[Subscription, ...]] = ()

    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        return self.asks

    def on_attention_probs(self, event: Any, state: Any) -> None:
        return None

    def on_select_token(self, event: Any, state: Any) -> None:
        return None


@caught_by("check_subscriptions", r"raised NotImplementedError: .* does not say where it acts: override subscriptions")
class NoSubscriptions(Gentle):
    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        return Method.subscriptions(self, model)


@caught_by("check_subscriptions", r"gentle\.subscriptions\(\) must return at least one Subscription, not \(\)")
class SubscribesToNothing(_Asks):
    pass


@caught_by("check_subscriptions", r"gentle reads hidden_states but its tags do not say so: add it to tags\.reads")
class ReadsUndeclared(_Asks):
    asks: ClassVar[tuple[Subscription, ...]] = (Subscription(point=_HIDDEN, layers=(0,)),)


@caught_by("check_subscriptions", r"gentle: a subscription to hidden_states needs layers")
class NoLayers(_Asks):
    asks: ClassVar[tuple[Subscription, ...]] = (Subscription(point=_HIDDEN, access=Access.WRITE),)


@caught_by("check_subscriptions", r"gentle asks for gradients but its tags do not say so: set tags\.gradient")
class UndeclaredGradient(_Asks):
    tags: ClassVar[Tags] = Tags(reads=frozenset({_PROBS}))
    asks: ClassVar[tuple[Subscription, ...]] = (
        Subscription(point=_PROBS, access=Access.GRADIENT, layers=(0,), rows=Rows.LAST),
    )


@caught_by("check_subscriptions", r"gentle selects tokens but its tags do not say so: set tags\.selects_token")
class UndeclaredSelection(_Asks):
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.SELECT_TOKEN}))
    asks: ClassVar[tuple[Subscription, ...]] = (Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE),)


@caught_by("check_subscriptions", r"gentle serves no model: not even this one")
class ServesNothing(Gentle):
    def subscriptions(self, model: ModelFacts) -> Sequence[Subscription]:
        raise UnsupportedModel("not even this one")


@caught_by(
    "check_declared_points", r"tags\.writes has attention_probs, but no parameter set or preset subscribes to it"
)
class IdlePoint(Gentle):
    tags: ClassVar[Tags] = Tags(writes=frozenset({_HIDDEN, _PROBS}))


@caught_by("check_declared_points", r"tags\.reads has hidden_states, but no parameter set or preset subscribes")
class DeclaredAsRead(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, reads=frozenset({_HIDDEN}))


@caught_by("check_capabilities", r"tags\.gradient=True, but no subscription has access=Access\.GRADIENT")
class GradientForNothing(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, gradient=True)


@caught_by("check_capabilities", r"gentle\.needs_gradient is True but its tags do not say so: set tags\.gradient")
class NeedsUndeclaredGradient(Gentle):
    @property
    def needs_gradient(self) -> bool:
        return True


@caught_by("check_capabilities", r"tags\.backwards_per_token=2 without tags\.gradient")
class BackwardsWithoutGradient(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, backwards_per_token=2)


@caught_by("check_capabilities", r"tags\.selects_token=True, but tags\.writes lacks select_token: they go together")
class SelectsNothing(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES, selects_token=True)


@caught_by("check_capabilities", r"tags\.owns_loop=False, but tags\.writes has drive_decoding: they go together")
class UndeclaredLoop(Gentle):
    tags: ClassVar[Tags] = Tags(writes=_WRITES | {Point.DRIVE_DECODING})
