"""Retries: by error class, with full jitter, within a budget and a deadline.

The order is ``retry(breaker(deadline(call)))``: every attempt asks the breaker anew, and an open
breaker ends the retries, because its error has no policy.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from esper.resilience.clock import MonotonicClock
from esper.resilience.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from esper.contracts.ports import Clock

    OnRetry = Callable[[int, Exception], None]

R = TypeVar("R")


class _Jitter(random.SystemRandom):
    """Draws waits: neither from the generator a training draws from, nor alike in forks."""

    def __reduce__(self) -> str:
        """Be the same one where what draws from it is copied or pickled."""
        return "JITTER"


JITTER: Final = _Jitter()

_NUM_SPANS: Final = 10
_MAX_DOUBLINGS: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how late a call is repeated after one class of error.

    The wait before the n-th retry, n from 0, is drawn from
    ``uniform(0, min(max_delay_s, base_delay_s * 2^n))`` ("full jitter").

    Attributes:
        max_retries: Attempts after the first, at least 0.
        base_delay_s: Longest first wait in seconds, at least 0.
        max_delay_s: Longest wait of all in seconds, at least 0.
        max_first_delay_s: Longest first wait in seconds where that is to be shorter yet.
    """

    max_retries: int = 3
    base_delay_s: float = 0.1
    max_delay_s: float = 5.0
    max_first_delay_s: float = float("inf")

    def __post_init__(self) -> None:
        if (
            not min(self.max_retries, self.base_delay_s, self.max_delay_s, self.max_first_delay_s)
            >= 0
        ):
            msg = f"numbers of a retry policy are at least 0, found {self}"
            raise ValueError(msg)

    def longest_delay_s(self, retry: int) -> float:
        """Return the longest wait before retry number ``retry``, from 0, in seconds."""
        longest = min(self.max_delay_s, self.base_delay_s * 2.0 ** min(retry, _MAX_DOUBLINGS))
        return min(longest, self.max_first_delay_s) if retry == 0 else longest


class RetryBudget:
    """Keeps retries from multiplying the load on what is failing already.

    Of the calls of the latest ``window_s`` seconds a share may be repeated, and a few in any case.

    Args:
        share: Retries for each call, at least 0.
        min_retries: So many are allowed however few calls there were, at least 0.
        window_s: How long a call and a retry count, in seconds, above 0; kept in tenths.
        clock: Measures it.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        share: float = 0.2,
        min_retries: int = 3,
        window_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        if not (share >= 0 and min_retries >= 0 and window_s > 0):
            msg = f"a budget needs numbers of at least 0, found {share}, {min_retries}, {window_s}"
            raise ValueError(msg)
        self._share = share
        self._min_retries = min_retries
        self._span_s = window_s / _NUM_SPANS
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._spans: deque[_Span] = deque()

    def count_call(self) -> None:
        """Count one call, which is not a retry."""
        number = int(self._clock.now() // self._span_s)
        with self._lock:
            self._span(number).calls += 1

    def take_retry(self) -> bool:
        """Count one retry and return True, or return False where the budget is spent."""
        number = int(self._clock.now() // self._span_s)
        with self._lock:
            span = self._span(number)
            num_calls = sum(each.calls for each in self._spans)
            num_retries = sum(each.retries for each in self._spans)
            if num_retries + 1 > max(self._min_retries, self._share * num_calls):
                return False
            span.retries += 1
            return True

    def __reduce__(self) -> tuple[object, ...]:
        return _budget, (self._share, self._min_retries, self._span_s * _NUM_SPANS, self._clock)

    def _span(self, number: int) -> _Span:
        """Return the latest span, after dropping those that have left the window."""
        if not self._spans or self._spans[-1].number < number:
            self._spans.append(_Span(number))
        latest = self._spans[-1]
        while self._spans[0].number <= latest.number - _NUM_SPANS:
            self._spans.popleft()
        return latest


def _budget(share: float, min_retries: int, window_s: float, clock: Clock) -> RetryBudget:
    return RetryBudget(share=share, min_retries=min_retries, window_s=window_s, clock=clock)


class _Span:
    """What was counted in a tenth of the window."""

    __slots__ = ("calls", "number", "retries")

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0
        self.retries = 0


class Retry:
    """Repeats a call after errors whose class says that another try may help.

    A last error is raised as it came. There is no retry that would begin after the deadline.
    Threads and event loops differ in how they call and wait, and in nothing that is decided.

    Args:
        policies: What to do after an error: the entry of its class, or of the nearest base class
            that has one; without one it is raised at once.
        budget: How many retries there may be; made where not given, and shared where several
            share an endpoint.
        sleep: Waits on a thread, seconds.
        sleep_async: Waits in an event loop, seconds.
        rng: Draws the waits.
    """

    def __init__(
        self,
        policies: Mapping[type[Exception], RetryPolicy],
        *,
        budget: RetryBudget | None = None,
        sleep: Callable[[float], None] = time.sleep,
        sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._policies = dict(policies)
        self._classes = tuple(self._policies)
        self._budget = budget or RetryBudget()
        self._sleep = sleep
        self._sleep_async = sleep_async
        self._rng = rng or JITTER

    def call(
        self,
        fn: Callable[[], R],
        *,
        deadline: Deadline | None = None,
        on_retry: OnRetry | None = None,
    ) -> R:
        """Call ``fn`` until it returns, or until nothing speaks for another try.

        Args:
            fn: What is called.
            deadline: When all tries and waits have to be over.
            on_retry: Told of each retry, from 1, and of the error before it, before the wait.
        """
        tries = self._begin(deadline, on_retry)
        while True:
            try:
                return fn()
            except self._classes as error:
                delay_s = tries.delay_s_after(error)
                if delay_s is None:
                    raise
            self._sleep(delay_s)

    async def call_async(
        self,
        fn: Callable[[], Awaitable[R]],
        *,
        deadline: Deadline | None = None,
        on_retry: OnRetry | None = None,
    ) -> R:
        """Await ``fn`` until it returns, or until nothing speaks for another try; as above."""
        tries = self._begin(deadline, on_retry)
        while True:
            try:
                return await fn()
            except self._classes as error:
                delay_s = tries.delay_s_after(error)
                if delay_s is None:
                    raise
            await self._sleep_async(delay_s)

    def _begin(self, deadline: Deadline | None, on_retry: OnRetry | None) -> _Tries:
        self._budget.count_call()
        return _Tries(self, deadline or Deadline.never(), on_retry)

    def repeats(self, error: Exception) -> bool:
        """Say whether an error of this class is repeated at all, time and budget left aside."""
        policy = self.policy_for(error)
        return policy is not None and policy.max_retries > 0

    def next_delay_s(self, error: Exception, retry: int, deadline: Deadline) -> float | None:
        """Take retry number ``retry``, from 0, from the budget, and return the wait before it.

        Returns:
            Seconds, or None where there is to be no retry.
        """
        policy = self.policy_for(error)
        if policy is None or retry >= policy.max_retries:
            return None
        delay_s = self._rng.uniform(0.0, policy.longest_delay_s(retry))
        if delay_s >= deadline.remaining_s():
            return None
        return delay_s if self._budget.take_retry() else None

    def policy_for(self, error: Exception) -> RetryPolicy | None:
        """Return what is done after an error, or None where it is not repeated."""
        for error_class in type(error).__mro__:
            if error_class in self._policies:
                return self._policies[error_class]
        return None


class _Tries:
    """The tries of one call: what a thread and an event loop decide alike."""

    def __init__(self, retry: Retry, deadline: Deadline, on_retry: OnRetry | None) -> None:
        self._retry = retry
        self._deadline = deadline
        self._on_retry = on_retry
        self._num_retries = 0

    def delay_s_after(self, error: Exception) -> float | None:
        """Return the wait before the next try, in seconds; None where there is to be none."""
        delay_s = self._retry.next_delay_s(error, self._num_retries, self._deadline)
        if delay_s is not None:
            self._num_retries += 1
            if self._on_retry is not None:
                self._on_retry(self._num_retries, error)
        return delay_s
