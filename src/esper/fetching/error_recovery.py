"""What is done after an error, by its class: tried again off the training thread, or raised."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import math
import threading
import time
from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING, Final, Self, TypeVar, cast

import torch

from esper.contracts.errors import (
    BlueprintError,
    CacheError,
    CircuitOpenError,
    DeadlineExceededError,
    EsperError,
    KernelCorruptError,
    KernelLoadError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    SeedLifecycleError,
)
from esper.contracts.events import Retried
from esper.fetching.incidents import announce
from esper.resilience.attempt import Failed, attempt, attempt_async
from esper.resilience.clock import MonotonicClock
from esper.resilience.deadline import Deadline
from esper.resilience.health_monitor import HealthLimits, HealthMonitor
from esper.resilience.retry import Retry, RetryBudget, RetryPolicy

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from esper.contracts.choices import RetryOutcome
    from esper.contracts.ports import Clock, KernelSource

__all__ = [
    "MAX_FIRST_DELAY_S",
    "ErrorRecoveryManager",
    "ErrorType",
    "HealthLimits",
    "HealthMonitor",
]

R = TypeVar("R")

MAX_FIRST_DELAY_S: Final = 0.005
"""The first retry begins within 10 ms: its wait is at most this, in seconds."""

_logger = logging.getLogger(__name__)


class ErrorType(Enum):
    """What kind of error an error is, by its class.

    Attributes:
        KERNEL_LOAD_FAILURE: Bytes could not be had, and may be later.
        KERNEL_EXECUTION_ERROR: A kernel failed, or nothing else is known.
        OUT_OF_MEMORY: The device or the host has no memory left.
        DEVICE_ERROR: The accelerator failed.
        NETWORK_ERROR: A source did not answer, not in time, or is not asked.
        VALIDATION_ERROR: Something breaks a rule, and will break it again.
    """

    KERNEL_LOAD_FAILURE = "kernel_load_failure"
    KERNEL_EXECUTION_ERROR = "kernel_execution_error"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE_ERROR = "device_error"
    NETWORK_ERROR = "network_error"
    VALIDATION_ERROR = "validation_error"

    @classmethod
    def of(cls, error: BaseException) -> ErrorType:
        """Return the type of the nearest base class of ``error`` that has one."""
        found = (_TYPES[each] for each in type(error).__mro__ if each in _TYPES)
        return next(found, cls.KERNEL_EXECUTION_ERROR)


_T: Final = ErrorType

_TYPES: Final[dict[type[Exception], ErrorType]] = {
    Exception: _T.KERNEL_EXECUTION_ERROR,
    EsperError: _T.KERNEL_EXECUTION_ERROR,
    BlueprintError: _T.VALIDATION_ERROR,
    CacheError: _T.VALIDATION_ERROR,
    SeedLifecycleError: _T.VALIDATION_ERROR,
    CircuitOpenError: _T.NETWORK_ERROR,
    DeadlineExceededError: _T.NETWORK_ERROR,
    KernelLoadError: _T.KERNEL_LOAD_FAILURE,
    KernelCorruptError: _T.VALIDATION_ERROR,
    KernelRefusedError: _T.VALIDATION_ERROR,
    KernelSourceUnavailable: _T.NETWORK_ERROR,
    OSError: _T.KERNEL_LOAD_FAILURE,
    TimeoutError: _T.NETWORK_ERROR,
    ConnectionError: _T.NETWORK_ERROR,
    MemoryError: _T.OUT_OF_MEMORY,
    torch.OutOfMemoryError: _T.OUT_OF_MEMORY,
    torch.AcceleratorError: _T.DEVICE_ERROR,
    ValueError: _T.VALIDATION_ERROR,
    TypeError: _T.VALIDATION_ERROR,
    LookupError: _T.VALIDATION_ERROR,
    AttributeError: _T.VALIDATION_ERROR,
    NameError: _T.VALIDATION_ERROR,
    AssertionError: _T.VALIDATION_ERROR,
}

_TRANSIENT: Final = frozenset({_T.NETWORK_ERROR, _T.KERNEL_LOAD_FAILURE, _T.KERNEL_EXECUTION_ERROR})
"""Types whose errors may go away by themselves; memory is freed and tried once; others stay."""

_PERMANENT: Final = (
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceSuspended,
    CircuitOpenError,
    DeadlineExceededError,
)
"""Classes of a transient type that another try does not help now."""


class ErrorRecoveryManager:
    """Tries again what failed, where the class of the error says that it may help.

    Errors of the network, of loading and of execution are retried; after one of memory, memory is
    freed and it is tried once; errors of validation and of the device, an answer ("not found"), an
    open breaker and a deadline that is over are raised at once. The wait before the n-th retry,
    n from 0, is drawn from ``uniform(0, min(max_delay, base_delay * 2^n))``, that before the
    first from 5 ms at most. No thread of the caller's sleeps or retries.

    Safe for threads; bound to no event loop.

    Args:
        max_retries: Retries of one operation, at least 0; with 0 every error is raised.
        base_delay: Longest wait before the second retry, halved, in seconds, at least 0.
        max_delay: Longest wait of all, in seconds, at least 0.
        timeout_s: Time for all retries of one operation where no deadline is given, in seconds.
        budget: Bounds the retries of all operations; made where not given.
        clock: Measures deadlines.
        sleep: Waits on a worker thread, seconds.
        sleep_async: Waits in an event loop, seconds.
        rng: Draws the waits.
        source: Whose loads are tried again, for those who listen to it; None tells nobody.
    """

    def __init__(
        self,
        max_retries: int = 3,
        base_delay: float = 0.1,
        *,
        max_delay: float = 5.0,
        timeout_s: float = 30.0,
        budget: RetryBudget | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
        sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
        source: KernelSource | None = None,
    ) -> None:
        self.max_retries = max_retries
        self._source = source
        self.base_delay = base_delay
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._budget = budget or RetryBudget(clock=self._clock)
        self._retry = Retry(
            _policies(max_retries, base_delay, max_delay),
            budget=self._budget,
            sleep=sleep,
            sleep_async=sleep_async,
            rng=rng,
        )
        self._lock = threading.Lock()
        self._error_counts = dict.fromkeys(ErrorType, 0)
        self._recovery_success = dict.fromkeys(ErrorType, 0)
        self._recovery_failure = dict.fromkeys(ErrorType, 0)
        self._num_retries = 0

    @property
    def error_counts(self) -> dict[ErrorType, int]:
        """How many errors of each type were reported."""
        with self._lock:
            return dict(self._error_counts)

    @property
    def recovery_success(self) -> dict[ErrorType, int]:
        """How many of them a retry made good."""
        with self._lock:
            return dict(self._recovery_success)

    async def recover_from_error(
        self,
        error: Exception,
        context: Mapping[str, object],
        recovery_fn: Callable[[], Awaitable[R] | R],
        *,
        deadline: Deadline | None = None,
    ) -> R:
        """Try again after ``error``, and return what the first retry that succeeds returns.

        Args:
            error: What was raised.
            context: What it belongs to, for the log.
            recovery_fn: The operation; one that is not a coroutine function runs on a thread.
            deadline: When all retries have to be over; an attempt that is awaited then is
                cancelled.

        Raises:
            Exception: ``error`` itself, where it is not retried; else the error of the last retry,
                with ``error`` at the end of its causes.
        """
        recovery = self._begin(error, context, deadline)
        with recovery:
            return await self._retry.call_async(
                lambda: recovery.try_async(recovery_fn),
                deadline=recovery.deadline,
                on_retry=recovery.prepare,
            )

    def recover_in_background(
        self,
        error: Exception,
        context: Mapping[str, object],
        recovery_fn: Callable[[], R],
        *,
        deadline: Deadline | None = None,
    ) -> Future[R]:
        """Try again on a thread of its own, and return at once; else as the async method.

        Returns:
            What a retry will return, or the error.
        """
        recovery = self._begin(error, context, deadline)
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        if not self._retry.repeats(error):
            self._complete(recovery, recovery_fn, future)
            return future
        work = (recovery, recovery_fn, future)
        threading.Thread(
            target=self._complete, args=work, name="esper-recovery", daemon=True
        ).start()
        return future

    def recover_from_error_sync(
        self,
        error: Exception,
        context: Mapping[str, object],
        recovery_fn: Callable[[], R],
        *,
        deadline: Deadline | None = None,
    ) -> R:
        """Wait for :meth:`recover_in_background`, until the deadline at the latest.

        Raises:
            Exception: As there.
            DeadlineExceededError: An attempt had not ended in time; its thread goes on.
        """
        deadline = deadline or Deadline.after(self._timeout_s, self._clock)
        future = self.recover_in_background(error, context, recovery_fn, deadline=deadline)
        left_s = deadline.remaining_s()
        try:
            return future.result(None if math.isinf(left_s) else left_s)
        except TimeoutError:
            if future.done():
                raise  # the operation's own
            msg = "the time for a recovery is over"
            raise DeadlineExceededError(msg) from error

    async def run(self, fn: Callable[[], Awaitable[R]], context: Mapping[str, object]) -> R:
        """Await ``fn``, and recover from its error; see :meth:`recover_from_error`."""
        first = await attempt_async(fn)
        if isinstance(first, Failed):
            return await self.recover_from_error(first.error, context, fn)
        self._budget.count_call()
        return first.value

    def run_sync(self, fn: Callable[[], R], context: Mapping[str, object]) -> R:
        """Call ``fn``, and recover from its error; see :meth:`recover_from_error_sync`."""
        first = attempt(fn)
        if isinstance(first, Failed):
            return self.recover_from_error_sync(first.error, context, fn)
        self._budget.count_call()
        return first.value

    def get_stats(self) -> dict[str, dict[str, int] | int]:
        """Return counts since the start.

        ``errors``, ``recovered`` and ``failed`` are by the values of :class:`ErrorType`;
        ``retries`` counts attempts. What is in ``errors`` alone is being tried.
        """
        with self._lock:
            return {
                "errors": {t.value: n for t, n in self._error_counts.items()},
                "recovered": {t.value: n for t, n in self._recovery_success.items()},
                "failed": {t.value: n for t, n in self._recovery_failure.items()},
                "retries": self._num_retries,
            }

    def _begin(
        self, error: Exception, context: Mapping[str, object], deadline: Deadline | None
    ) -> _Recovery:
        self._count(self._error_counts, ErrorType.of(error))
        return _Recovery(
            self, error, context, deadline or Deadline.after(self._timeout_s, self._clock)
        )

    def _count(self, counts: dict[ErrorType, int], error_type: ErrorType) -> None:
        with self._lock:
            counts[error_type] += 1

    def _complete(
        self, recovery: _Recovery, recovery_fn: Callable[[], R], future: Future[R]
    ) -> None:
        """Retry on this thread, and hand what comes of it to who waits."""
        try:
            with recovery:
                found = self._retry.call(
                    lambda: recovery.try_sync(recovery_fn),
                    deadline=recovery.deadline,
                    on_retry=recovery.prepare,
                )
        except BaseException as error:  # noqa: BLE001 - raised again where the future is waited for
            future.set_exception(error)
        else:
            future.set_result(found)


class _Recovery:
    """One operation that is tried again, its first try being the error that there is already.

    As a context manager it counts what came of it, and puts the original error behind the last.
    """

    def __init__(
        self,
        manager: ErrorRecoveryManager,
        original: Exception,
        context: Mapping[str, object],
        deadline: Deadline,
    ) -> None:
        self._manager = manager
        self._original = original
        self._context = context
        self._num_retries = 0
        self.deadline = deadline

    def try_sync(self, recovery_fn: Callable[[], R]) -> R:
        """Raise the original error the first time; call the operation after that."""
        if not self._num_retries:
            raise self._original
        return self.deadline.call("a recovery", lambda _: recovery_fn())

    async def try_async(self, recovery_fn: Callable[[], Awaitable[R] | R]) -> R:
        """Raise the original error the first time; await the operation after that."""
        if not self._num_retries:
            raise self._original
        return await self.deadline.call_async("a recovery", _awaited(recovery_fn))

    def prepare(self, number: int, latest: Exception) -> None:
        """Do what a retry after the latest error needs, and count the retry."""
        self._num_retries = number
        with self._manager._lock:  # noqa: SLF001 - the other half of it
            self._manager._num_retries += 1  # noqa: SLF001 - the other half of it
        _logger.info("retry %d after %r, %s", number, latest, dict(self._context))
        self._announce("tried again", latest)
        if ErrorType.of(latest) is ErrorType.OUT_OF_MEMORY:
            _free_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        manager = self._manager
        counts = manager._recovery_success if error is None else manager._recovery_failure  # noqa: SLF001 - as above
        manager._count(counts, ErrorType.of(self._original))  # noqa: SLF001 - as above
        self._announce("recovered" if error is None else "given up", error or self._original)
        if error is not None:
            self._give_up(error)

    def _announce(self, outcome: RetryOutcome, error: BaseException) -> None:
        seed_idx = self._context.get("seed_idx")
        told = Retried(
            update=0,
            time_s=0.0,
            what="load",
            outcome=outcome,
            number=self._num_retries,
            site=str(self._context.get("layer", "")),
            seed_idx=seed_idx if isinstance(seed_idx, int) else None,
            artifact_id=str(self._context.get("artifact_id", "")),
            reason=f"{type(error).__name__}: {error}",
        )
        announce(self._manager._source, told)  # noqa: SLF001 - as above

    def _give_up(self, latest: BaseException) -> None:
        """Log the latest error, and put the original at the end of its causes."""
        _logger.warning(
            "gave up after %d retries: %r, %s", self._num_retries, latest, dict(self._context)
        )
        last = latest
        while last is not self._original and last.__cause__ is not None:
            last = last.__cause__
        if last is not self._original:
            last.__cause__ = self._original


def _policies(
    max_retries: int, base_delay: float, max_delay: float
) -> dict[type[Exception], RetryPolicy]:
    """Return a policy for every class that has a type; the nearest base class decides."""
    never = RetryPolicy(max_retries=0)
    often = RetryPolicy(
        max_retries=max_retries,
        base_delay_s=base_delay,
        max_delay_s=max_delay,
        max_first_delay_s=MAX_FIRST_DELAY_S,
    )
    once = RetryPolicy(max_retries=min(1, max_retries), max_first_delay_s=MAX_FIRST_DELAY_S)
    by_type = dict.fromkeys(_TRANSIENT, often) | {ErrorType.OUT_OF_MEMORY: once}
    by_class = {each: by_type.get(error_type, never) for each, error_type in _TYPES.items()}
    return by_class | dict.fromkeys(_PERMANENT, never)


def _awaited(recovery_fn: Callable[[], Awaitable[R] | R]) -> Callable[[Deadline], Awaitable[R]]:
    """Return one try as a coroutine function; one that is none runs on a thread."""

    async def once(_: Deadline) -> R:
        if inspect.iscoroutinefunction(recovery_fn):
            return cast("R", await recovery_fn())
        found = await asyncio.to_thread(recovery_fn)
        return await found if inspect.isawaitable(found) else found

    return once


def _free_memory() -> None:
    """Give back what nobody refers to, and what the allocator keeps for later."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
