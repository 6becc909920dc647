"""Which extra streams a stack needs, and who shares one. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitigate.core.points import BRANCH_POINTS, DIFFERENTIATES, MAIN, Branch, Point, Subscription
from mitigate.errors import PluginError, UnsupportedModel
from mitigate.registry import suggestion

if TYPE_CHECKING:
    from mitigate.core.method import Method


@dataclass(frozen=True)
class StreamPlan:
    """One extra stream of a stack.

    Parameters
    ----------
    branch
        What it is, under the name its first method gives it.
    owner
        Key of the only method that edits it; empty when it is plain, and then shared.
    users
        Keys of the methods that read it.
    """

    branch: Branch
    owner: str
    users: tuple[str, ...]


def check_branches(key: str, method: Method, subscriptions: Sequence[Subscription]) -> None:
    """Check what a method says about its branches.

    Raises
    ------
    PluginError
        If names are taken twice or unknown, or the tags do not own up to the cost.
    UnsupportedModel
        If a subscription acts where a branch has no such point.
    """
    names = [branch.name for branch in method.branches()]
    for name in names:
        if name == MAIN or names.count(name) > 1:
            raise PluginError(f"{key} has {'two branches' if name != MAIN else 'a branch'} named {name!r}; rename one")
    if method.tags.forwards_per_token < len(names):
        raise PluginError(
            f"{key} runs {len(names)} branch forwards per token but its tags do not say so: set tags.forwards_per_token"
        )
    for subscription in subscriptions:
        point, extra = subscription.point, subscription.branches - {MAIN}
        for name in sorted(extra - set(names)):
            raise PluginError(f"{key} subscribes in branch {name!r}, which it does not have{suggestion(name, names)}")
        if not subscription.branches:
            raise PluginError(f"{key}: a subscription to {point.value} names no branch; '{MAIN}' is the plain one")
        if point is Point.TEXT_INPUT and MAIN in subscription.branches:
            raise UnsupportedModel(f"{key} rewrites the prompt of the main stream; {point.value} is served in branches")
        if extra and (point not in BRANCH_POINTS or subscription.access in DIFFERENTIATES):
            raise UnsupportedModel(f"{key}: {point.value} ({subscription.access.value}) is not served in a branch")


def streams_of(methods: Mapping[str, Method], subscribed: Mapping[str, Sequence[Subscription]]) -> list[StreamPlan]:
    """Return the streams of a stack: one for each branch that is edited, one for all that ask for the same plain one.

    Parameters
    ----------
    methods
        Key -> method, in stack order.
    subscribed
        Key -> its subscriptions.
    """
    found: list[StreamPlan] = []
    plain: dict[bool, int] = {}
    for key, method in methods.items():
        for branch in method.branches():
            if any(branch.name in subscription.branches for subscription in subscribed[key]):
                found.append(StreamPlan(branch, key, (key,)))
            elif branch.images in plain:
                known = found[plain[branch.images]]
                users = known.users if key in known.users else (*known.users, key)
                found[plain[branch.images]] = StreamPlan(known.branch, "", users)
            else:
                plain[branch.images] = len(found)
                found.append(StreamPlan(branch, "", (key,)))
    return found


def find_stream(streams: Sequence[StreamPlan], method: Method, key: str, name: str) -> int | None:
    """Return the index of the stream that serves a method's branch; ``None`` if it has no such branch."""
    branch = next((branch for branch in method.branches() if branch.name == name), None)
    if branch is None:
        return None
    for index, stream in enumerate(streams):
        if stream.owner == key and stream.branch == branch:
            return index
    return next(
        index
        for index, stream in enumerate(streams)
        if not stream.owner and key in stream.users and stream.branch.images == branch.images
    )
