"""A stack: methods in order, attached to a model for the length of a ``with`` block."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mitigate.core.facts import ModelFacts
from mitigate.core.method import Method
from mitigate.core.plan import PlanLine, plan_stack
from mitigate.errors import ConfigError, StackConflict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.core.handle import Handle

_ATTACHED: weakref.WeakSet[Any] = weakref.WeakSet()


class Stack:
    """An ordered stack of methods.

    Parameters
    ----------
    methods
        Methods in order, or a mapping from key to method. Keys name the methods in plans and telemetry; in a sequence
        they are the registered names, numbered when a method occurs twice.

    Examples
    --------
    >>> from mitigate import Stack
    >>> stack = Stack([])  # or [TheMethod(...), AnotherMethod(...)]
    >>> with stack.attach(model, processor) as handle:  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    def __init__(self, methods: Mapping[str, Method] | Sequence[Method] = ()) -> None:
        named = methods.items() if isinstance(methods, Mapping) else ((None, method) for method in methods)
        self.methods: dict[str, Method] = {}
        for key, method in named:
            if not isinstance(method, Method):
                raise ConfigError(f"a stack takes methods, not {method!r}; write Stack([TheMethod(parameter=value)])")
            self.methods[key or self._free_key(method.name)] = method

    def _free_key(self, name: str) -> str:
        """Return the name, numbered when it is taken."""
        copies = (f"{name}_{number}" for number in range(2, len(self.methods) + 3))
        return next(key for key in (name, *copies) if key not in self.methods)

    def __repr__(self) -> str:
        return f"Stack({self.methods!r})"

    @property
    def needs_gradient(self) -> bool:
        """Whether a method asks for attention gradients."""
        return any(method.needs_gradient for method in self.methods.values())

    @property
    def selects_token(self) -> bool:
        """Whether a method chooses tokens."""
        return any(method.tags.selects_token for method in self.methods.values())

    @property
    def batch(self) -> bool:
        """Whether every method serves batches of several samples."""
        return all(method.tags.batch for method in self.methods.values())

    def plan(self, facts: ModelFacts) -> list[PlanLine]:
        """Describe what the stack does on a model; see `plan_stack`."""
        return plan_stack(self.methods, facts)

    @contextmanager
    def attach(self, model: PreTrainedModel, processor: ProcessorMixin | None = None) -> Iterator[Handle]:
        """Attach the stack to a model; leaving the block, in whatever way, restores the model exactly.

        Parameters
        ----------
        model
            A vision-language model of a known family, as transformers loaded it.
        processor
            Its processor; needed by ``handle.ask`` and by methods that must know words.

        Yields
        ------
        Handle
            ``handle.generate`` for every stack; plain ``model.generate`` works too unless the stack selects tokens.

        Raises
        ------
        StackConflict
            If the model already carries a stack, or two methods exclude each other.
        UnsupportedModel
            If the model's family is unknown or lacks what a method needs.
        """
        from mitigate.adapters import adapter_for
        from mitigate.core.bus import HookBus
        from mitigate.core.differentiable import check_gradients
        from mitigate.core.handle import Handle

        if model in _ATTACHED:
            raise StackConflict(
                "the model already carries a stack; put the methods into one Stack, in the order they act"
            )
        with ExitStack() as undo:
            handle = Handle(self, model, processor)
            undo.callback(setattr, handle, "attached", False)
            if self.methods:
                adapter = adapter_for(model, processor)
                handle.bus = HookBus(model, adapter, self.methods, processor)
                if self.needs_gradient:
                    check_gradients(
                        next(key for key, method in self.methods.items() if method.needs_gradient), model, adapter
                    )
                _ATTACHED.add(model)
                undo.callback(_ATTACHED.discard, model)
                handle.bus.install(undo)
                _replace_generate(model, handle, undo)
            yield handle


def _replace_generate(model: PreTrainedModel, handle: Handle, undo: ExitStack) -> None:
    """Give this one model object a ``generate`` that opens a request; the class stays untouched."""
    own = vars(model).get("generate")

    def restore() -> None:
        if own is not None:
            model.generate = own
        else:
            del model.generate

    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return handle.plain_generate(*args, **kwargs)

    generate.__doc__ = model.generate.__doc__
    undo.callback(restore)
    model.generate = types.MethodType(generate, model)
