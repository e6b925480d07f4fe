"""A deadline: one point in time by which everything that is done for a call has to be over."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from esper.contracts.errors import DeadlineExceededError
from esper.resilience.clock import MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from esper.contracts.ports import Clock

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """The end of the time for a call and for everything called on its behalf.

    A value that is handed on: each part takes what is left of it, and none gets a time of its own.

    Attributes:
        expires_at_s: Reading of ``clock`` at which the time is over, in seconds.
        clock: What it is measured with.
    """

    expires_at_s: float
    clock: Clock

    @classmethod
    def after(cls, seconds: float, clock: Clock | None = None) -> Self:
        """Return the deadline ``seconds`` from now.

        Args:
            seconds: At least 0; infinity is no limit.
            clock: Measures it.

        Raises:
            ValueError: ``seconds`` is negative or not a number.
        """
        if not seconds >= 0:
            msg = f"a deadline is at least 0 s away, found {seconds}"
            raise ValueError(msg)
        clock = clock or MonotonicClock()
        return cls(expires_at_s=clock.now() + seconds, clock=clock)

    @classmethod
    def never(cls) -> Self:
        """Return the deadline that does not come."""
        return cls(expires_at_s=math.inf, clock=MonotonicClock())

    def remaining_s(self) -> float:
        """Return the seconds that are left, at least 0; infinity where there is no limit."""
        return max(0.0, self.expires_at_s - self.clock.now())

    def check(self, what: str) -> None:
        """Raise if the time is over.

        Args:
            what: What was to be done in it, for the message.

        Raises:
            DeadlineExceededError: It is.
        """
        if self.clock.now() >= self.expires_at_s:
            msg = f"the time for {what} is over"
            raise DeadlineExceededError(msg)

    def call(self, what: str, fn: Callable[[Deadline], R]) -> R:
        """Call ``fn`` with this deadline if there is time left.

        A thread cannot be stopped: it is ``fn`` that has to end in time, by what is left.

        Raises:
            DeadlineExceededError: There was none; ``fn`` was not called.
        """
        self.check(what)
        return fn(self)

    async def call_async(self, what: str, fn: Callable[[Deadline], Awaitable[R]]) -> R:
        """Await ``fn`` with this deadline, and cancel it when the time is over.

        Raises:
            DeadlineExceededError: The time is over.
        """
        self.check(what)
        left_s = self.remaining_s()
        scope = asyncio.timeout(None if math.isinf(left_s) else left_s)
        try:
            async with scope:
                return await fn(self)
        except TimeoutError as error:
            if not scope.expired():
                raise  # the callee's own
            msg = f"the time for {what} is over"
            raise DeadlineExceededError(msg) from error
