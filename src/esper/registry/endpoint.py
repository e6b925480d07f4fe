"""What guards the calls to one server: a breaker, a few retries, and one deadline for all of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar, final

from esper.contracts.errors import (
    CircuitOpenError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    KernelSourceUnreadable,
    TagMovedError,
)
from esper.registry.upload import SLOWEST_BYTES_PER_S
from esper.resilience.circuit_breaker import CircuitBreaker
from esper.resilience.clock import MonotonicClock
from esper.resilience.deadline import Deadline
from esper.resilience.retry import JITTER, Retry, RetryBudget, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.ports import Clock

R = TypeVar("R")

_ANSWERS: Final = (
    KernelNotFoundError,
    KernelCorruptError,
    KernelSourceRefused,
    KernelSourceUnreadable,
    TagMovedError,
    ValueError,
    TypeError,
)
"""Errors by which a server answers: it was reached, and will answer so again."""

_POLICIES: Final[dict[type[Exception], RetryPolicy]] = {
    KernelSourceUnavailable: RetryPolicy(),
    KernelSourceSuspended: RetryPolicy(max_retries=0),
    KernelSourceRefused: RetryPolicy(max_retries=0),
    KernelSourceUnreadable: RetryPolicy(max_retries=0),
}


@final
class Endpoint:
    """Asks one server: ``retry(breaker(call))`` until one point in time; threads may share it.

    Args:
        name: The server, for messages.
        timeout_s: Seconds for a call with all its retries, above 0.
        clock: Measures them.
        sleep: Waits before a retry, seconds.

    Attributes:
        timeout_s: Seconds for a call with all its retries.
        breaker: Counts failures of the server.
        retry_budget: Bounds the retries of all calls.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout_s: float,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self.breaker = CircuitBreaker(
            name, answers=_ANSWERS, ignored=(KernelSourceSuspended,), clock=self._clock
        )
        self.retry_budget = RetryBudget(clock=self._clock)
        self._sleep = sleep
        self._retry = Retry(_POLICIES, budget=self.retry_budget, sleep=sleep)

    def call(
        self,
        fn: Callable[[float], R],
        *,
        may_repeat: bool,
        waited_s: float = 0.0,
        num_bytes: int = 0,
    ) -> R:
        """Call ``fn`` with the clock's reading at which it has to be over.

        Args:
            fn: Asks the server.
            may_repeat: Whether asking twice is the same as asking once.
            waited_s: How much of its time has passed already, in seconds, at least 0.
            num_bytes: How much it sends, at least 0, which is given time beside.

        Raises:
            KernelSourceSuspended: The server has been failing and was not asked, or wants to be
                left alone for longer than there is time.
            Exception: What ``fn`` raised at last.
        """
        given_s = self.timeout_s + num_bytes / SLOWEST_BYTES_PER_S
        deadline = Deadline.after(max(0.0, given_s - waited_s), self._clock)
        if not may_repeat:
            return self._permitted(fn, deadline.expires_at_s)
        failures: list[Exception] = []
        try:
            return self._retry.call(
                lambda: self._rested(fn, deadline),
                deadline=deadline,
                on_retry=lambda _, error: failures.append(error),
            )
        except KernelSourceSuspended as error:
            if not failures:
                raise
            raise failures[-1] from error  # what it did says more than that it is left alone now

    def _rested(self, fn: Callable[[float], R], deadline: Deadline) -> R:
        """Ask; where the server has said when to come again, and there is time for it, then."""
        try:
            return self._permitted(fn, deadline.expires_at_s)
        except KernelSourceSuspended as error:
            if error.retry_after_s is None:
                raise
            delay_s = error.retry_after_s * JITTER.uniform(1.0, 1.5)  # not all at once
            if delay_s >= deadline.remaining_s():
                raise
            self._sleep(delay_s)
            return self._permitted(fn, deadline.expires_at_s)

    def _permitted(self, fn: Callable[[float], R], until_s: float) -> R:
        try:
            permit = self.breaker.permit()
        except CircuitOpenError as error:
            raise KernelSourceSuspended(str(error)) from error
        with permit:
            return fn(until_s)
