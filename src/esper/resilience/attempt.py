"""The one broad fence around foreign code: a callback, a sink, a hook that somebody else wrote.

A forward has a fence of its own, inline, because a call more per seed is too much there; and so has
the copy of a call's argument, in ``state``, which may not import this room. Whatever else catches
everything raises it again, as it is or under a class of its own: a probe, a fold, a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """Foreign code returned.

    Attributes:
        value: What it returned.
    """

    value: R


@dataclass(frozen=True, slots=True)
class Failed:
    """Foreign code raised.

    Attributes:
        error: What it raised, with its traceback.
    """

    error: Exception

    def __str__(self) -> str:
        """Return the error's class and message, for people."""
        return f"{type(self.error).__name__}: {self.error}"


def attempt(fn: Callable[[], R]) -> Done[R] | Failed:
    """Call foreign code and return what came of it; the caller has to look at which it was.

    ``KeyboardInterrupt``, ``SystemExit`` and their like pass through: they are no answer of ``fn``.
    """
    try:
        return Done(fn())
    except Exception as error:  # noqa: BLE001 - the one broad fence above the hot path
        return Failed(error)


async def attempt_async(fn: Callable[[], Awaitable[R]]) -> Done[R] | Failed:
    """Await foreign code; else as :func:`attempt`. A cancellation passes through."""
    try:
        return Done(await fn())
    except Exception as error:  # noqa: BLE001 - the same fence, in an event loop
        return Failed(error)
