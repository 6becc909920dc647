"""Checks on a tiny model: attention stays a distribution over real tokens, and edits stay where they were declared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mitigate.core import Access, Method, Point, Role
from mitigate.testing.base import Skip, Subject, check, ensure
from mitigate.testing.running import Call, prompts_for, record, stage

_WEIGHTS = frozenset({Point.ATTENTION_SCORES, Point.ATTENTION_PROBS})
#: Points whose edits have a position each, and the axis of the positions.
_POSITIONS = {Point.HIDDEN_STATES: 1, Point.MLP_OUTPUT: 1, Point.HEAD_OUTPUT: 2}
_PLACED = _WEIGHTS | frozenset(_POSITIONS) | {Point.VALUE_SCALE}
_EPSILON = 1e-5


def writes_no_attention(method: Method) -> str | None:
    """Say why a method has no attention rows to look at."""
    return None if method.tags.writes & _WEIGHTS else "writes no attention"


def writes_no_positions(method: Method) -> str | None:
    """Say why a method's edits have no positions."""
    return None if method.tags.writes & _PLACED else "writes no value that has positions"


def _edits(subject: Subject, points: frozenset[Point]) -> Iterator[Call]:
    """Run the method and yield the calls that replaced a value."""
    tiny = stage(subject)
    _, calls = record([subject.method], tiny, tiny.inputs(prompts_for(subject.method)), steps=3)
    found = [call for call in calls if call.point in points and call.value is not None]
    if not [call for call in found if call.item.subscription.access is Access.WRITE]:
        raise Skip("writes none of these points with these parameters")
    yield from found


@check(needs_model=True, applies=writes_no_attention)
def check_probabilities(subject: Subject) -> None:
    """Leave attention rows without negative weights, on visible keys only, with their sum (unless declared)."""
    for call in _edits(subject, _WEIGHTS):
        mine = call.before["row_mask"][:, None, :].expand(call.before["row_mask"].shape[0], _heads(call), -1)
        old, new = _weights(call)
        hidden = _hidden_keys(call, old.shape[-1])[:, None].expand_as(old)
        what = f"{subject.name}.{call.where}"
        ensure(bool(new[mine].isfinite().all()), f"{what} makes weights that are not finite")
        ensure(bool((new[mine] >= 0).all()), f"{what} makes negative attention weights")
        leak = float((new * hidden)[mine].abs().max())
        ensure(leak < _EPSILON, f"{what} gives weight ({leak:.2g}) to keys that are padding or lie ahead; {_MASK}")
        if call.item.subscription.normalised:
            off = float((new.sum(-1) - old.sum(-1))[mine].abs().max())
            ensure(
                off < 1e-3,
                f"{what} changes the sum of attention rows by {off:.2g}: renormalise (weights / weights.sum(-1)), or "
                f"say so: Subscription(normalised=False)",
            )


_MASK = "leave masked entries as they are (event.layout.valid tells padding)"


def _heads(call: Call) -> int:
    return int(call.pairs()[0][0].shape[1])


def _weights(call: Call) -> tuple[Tensor, Tensor]:
    """Return attention weights before and after, ``[B, H, R, K]`` float64."""
    old, new = (value.detach().double() for value in call.pairs()[0])
    return (old.softmax(-1), new.softmax(-1)) if call.point is Point.ATTENTION_SCORES else (old, new)


def _hidden_keys(call: Call, keys: int) -> Tensor:
    """Keys a row must not see: padding, and what comes after it; ``[B, R, K]``."""
    valid = call.event.layout.valid[:, None, :keys]
    return ~valid | (torch.arange(keys) > call.before["rows"][:, None])


@check(needs_model=True, applies=writes_no_positions)
def check_positions(subject: Subject) -> None:
    """Touch only tokens of the roles that the subscription declares."""
    calls = [call for call in _edits(subject, _PLACED) if call.item.subscription.roles is not None]
    if not calls:
        raise Skip("may touch every token: its subscriptions name no roles")
    for call in calls:
        roles = call.item.subscription.roles or frozenset()
        named = ", ".join(sorted(role.name for role in roles))
        touched = _touched(call) & ~_allowed(call, roles) & call.event.layout.valid
        if bool(touched.any()):
            row, column = touched.nonzero()[0].tolist()
            role = Role(int(call.event.layout.roles[row, column])).name
            ensure(
                False,
                f"{subject.name}.{call.where} touches position {column} of sample {row}, role {role}, but its roles "
                f"are {named}: take positions from event.layout, or declare the role in Subscription(roles=...)",
            )


def _allowed(call: Call, roles: frozenset[Role]) -> Tensor:
    """Positions an edit may touch, ``[B, L]``."""
    known = call.event.layout.roles
    return torch.isin(known, torch.tensor([int(role) for role in roles], dtype=known.dtype))


def _touched(call: Call) -> Tensor:
    """Positions whose value the handler changed, ``[B, L]``."""
    layout = call.event.layout
    touched = torch.zeros(layout.roles.shape, dtype=torch.bool)
    if call.point is Point.VALUE_SCALE:
        changed = (call.value != 1).any(1)
        touched[:, : changed.shape[1]] = changed
        return touched
    old, new = (value.detach() for value in call.pairs()[0])
    if call.point in _WEIGHTS:
        changed = _moved_keys(call, old.double(), new.double())
        touched[:, : changed.shape[1]] = changed
    else:
        axis = _POSITIONS[call.point]
        changed = (old != new).movedim(axis, 1).flatten(2).any(2)
        start = int(call.event.start)  # type: ignore[attr-defined]
        touched[:, start : start + changed.shape[1]] = changed
    return touched & ~call.before["request.finished"][:, None]


def _moved_keys(call: Call, old: Tensor, new: Tensor) -> Tensor:
    """Keys whose weight moved on its own, ``[B, K]``: where all others are scaled alike, a row was renormalised."""
    mine = call.before["row_mask"][:, None, :, None]
    if call.point is Point.ATTENTION_SCORES:
        return ((old - new).abs() > _EPSILON * (1 + old.abs())).logical_and(mine).any(2).any(1)
    if not call.item.subscription.normalised:
        return ((new - old).abs() > _EPSILON).logical_and(mine).any(2).any(1)
    free = ~_allowed(call, call.item.subscription.roles or frozenset())[:, None, None, : old.shape[-1]]
    before, after = ((value * free).sum(-1, keepdim=True) for value in (old, new))
    factor = torch.where(before > 0, after / before.clamp_min(1e-30), 1.0)
    return ((new - old * factor).abs() > _EPSILON).logical_and(mine).any(2).any(1)
