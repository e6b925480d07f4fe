"""The way back of a tag: to where it pointed before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.registry.refusals import no_such_tag, no_way_back

if TYPE_CHECKING:
    from esper.contracts.ports import Registry


def roll_back(registry: Registry, name: str, tag: str, *, actor: str | None = None) -> str:
    """Point a tag to where it pointed before its last move, and return that.

    Raises:
        KernelNotFoundError: It never pointed elsewhere, or what it pointed to was withdrawn.
        TagMovedError: Somebody else has moved it meanwhile.
        ValueError: The name or the tag is malformed.
    """
    now, *before = [move.digest for move in reversed(registry.history(name, tag))] or [None]
    earlier = next((digest for digest in before if digest not in (None, now)), None)
    if earlier is None:
        raise no_such_tag(name, tag) if now is None else no_way_back(name, tag)
    registry.tag(name, tag, earlier, expected=now, actor=actor)
    return earlier
