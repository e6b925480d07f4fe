"""Trying again after an error, by its class."""

import asyncio
import gc
import random
import threading
import weakref

import pytest
import torch

from esper.contracts.errors import (
    BlueprintError,
    CircuitOpenError,
    DeadlineExceededError,
    GradientSyncError,
    KernelCorruptError,
    KernelExecutionError,
    KernelLoadError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    SeedLifecycleError,
)
from esper.fetching.error_recovery import MAX_FIRST_DELAY_S, ErrorRecoveryManager, ErrorType
from esper.resilience.clock import ManualClock
from esper.resilience.deadline import Deadline
from esper.resilience.retry import RetryBudget

DOORS = ["async", "async of a plain function", "sync", "background"]


class Operation:
    """Raises its errors one after the other, then answers; knows on which thread it ran."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.threads = []

    def __call__(self):
        self.threads.append(threading.get_ident())
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    async def later(self):
        return self()


class LongestRandom(random.Random):
    """Draws the longest wait that is allowed."""

    def uniform(self, a, b):
        return b


class Sleeps:
    """Advances a clock instead of sleeping; knows on which thread it was asked to."""

    def __init__(self, clock):
        self.clock = clock
        self.seconds = []
        self.threads = []

    def __call__(self, seconds):
        self.threads.append(threading.get_ident())
        self.seconds.append(seconds)
        self.clock.advance(seconds)

    async def later(self, seconds):
        self(seconds)


@pytest.fixture
def sleeps():
    return Sleeps(ManualClock())


def manager_of(sleeps, *args, **settings):
    given = {
        "clock": sleeps.clock,
        "sleep": sleeps,
        "sleep_async": sleeps.later,
        "rng": LongestRandom(),
        **settings,
    }
    return ErrorRecoveryManager(*args, **given)


def recover(manager, door, error, operation, **settings):
    """Recover through one of the doors, with a layer as the context."""
    args = (error, {"layer": "fc"})
    if door == "sync":
        return manager.recover_from_error_sync(*args, operation, **settings)
    if door == "background":
        return manager.recover_in_background(*args, operation, **settings).result(60)
    fn = operation.later if door == "async" else operation
    return asyncio.run(manager.recover_from_error(*args, fn, **settings))


# ---- classes


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (KernelLoadError(), ErrorType.KERNEL_LOAD_FAILURE),
        (KernelNotFoundError(), ErrorType.KERNEL_LOAD_FAILURE),
        (KernelCorruptError(), ErrorType.VALIDATION_ERROR),
        (KernelRefusedError("", check="shape"), ErrorType.VALIDATION_ERROR),
        (KernelSourceUnavailable(), ErrorType.NETWORK_ERROR),
        (CircuitOpenError("", 0.0), ErrorType.NETWORK_ERROR),
        (DeadlineExceededError(), ErrorType.NETWORK_ERROR),
        (ConnectionResetError(), ErrorType.NETWORK_ERROR),
        (TimeoutError(), ErrorType.NETWORK_ERROR),
        (FileNotFoundError(), ErrorType.KERNEL_LOAD_FAILURE),
        (KernelExecutionError(), ErrorType.KERNEL_EXECUTION_ERROR),
        (GradientSyncError(), ErrorType.KERNEL_EXECUTION_ERROR),
        (RuntimeError("CUDA out of memory"), ErrorType.KERNEL_EXECUTION_ERROR),
        (torch.OutOfMemoryError(), ErrorType.OUT_OF_MEMORY),
        (MemoryError(), ErrorType.OUT_OF_MEMORY),
        (torch.AcceleratorError(), ErrorType.DEVICE_ERROR),
        (BlueprintError(), ErrorType.VALIDATION_ERROR),
        (SeedLifecycleError(), ErrorType.VALIDATION_ERROR),
        (UnicodeDecodeError("utf-8", b"", 0, 1, ""), ErrorType.VALIDATION_ERROR),
        (KeyError(), ErrorType.VALIDATION_ERROR),
    ],
    ids=lambda value: value.name if isinstance(value, ErrorType) else type(value).__name__,
)
def test_the_type_is_read_off_the_class(error, error_type):
    """The nearest base class decides, and no text does."""
    assert ErrorType.of(error) is error_type


# ---- retries


@pytest.mark.parametrize("door", DOORS)
def test_a_transient_error_is_retried_until_it_is_gone(sleeps, door):
    """Two more failures and an answer are three attempts; the caller gets the answer."""
    manager = manager_of(sleeps)
    operation = Operation(KernelSourceUnavailable(), ConnectionError())

    assert recover(manager, door, KernelSourceUnavailable(), operation) == "answer"

    assert len(operation.threads) == 3
    assert sleeps.seconds == [MAX_FIRST_DELAY_S, 0.2, 0.4]
    assert manager.error_counts[ErrorType.NETWORK_ERROR] == 1
    assert manager.recovery_success[ErrorType.NETWORK_ERROR] == 1
    assert manager.get_stats()["retries"] == 3


@pytest.mark.parametrize("base_delay", [0.0001, 0.1, 60.0])
def test_the_first_retry_begins_within_ten_milliseconds(sleeps, base_delay):
    """However long the later waits may be."""
    manager = manager_of(sleeps, base_delay=base_delay)
    recover(manager, "sync", KernelSourceUnavailable(), Operation())
    (waited_s,) = sleeps.seconds
    assert waited_s <= 0.01


@pytest.mark.parametrize("door", DOORS)
def test_the_original_error_is_at_the_end_of_the_causes(sleeps, door):
    """The last error is raised with its own cause, and behind that what began it all."""
    original, cause = KernelSourceUnavailable("first"), OSError("broken pipe")
    last = KernelSourceUnavailable("last")
    last.__cause__ = cause
    operation = Operation(ConnectionError(), ConnectionError(), last)

    with pytest.raises(KernelSourceUnavailable, match="last") as caught:
        recover(manager_of(sleeps), door, original, operation)

    assert caught.value.__cause__ is cause
    assert cause.__cause__ is original


@pytest.mark.parametrize("door", DOORS)
def test_no_retries_raise_the_original(sleeps, door):
    """With max_retries=0 the operation is not tried, and its error is not lost."""
    original = KernelSourceUnavailable("first")
    operation = Operation()
    with pytest.raises(KernelSourceUnavailable) as caught:
        recover(manager_of(sleeps, 0), door, original, operation)
    assert caught.value is original
    assert caught.value.__cause__ is None
    assert operation.threads == []


@pytest.mark.parametrize(
    "error",
    [
        KernelNotFoundError(),
        KernelCorruptError(),
        KernelRefusedError("", check="shape"),
        KernelSourceSuspended(),
        CircuitOpenError("", 1.0),
        DeadlineExceededError(),
        BlueprintError(),
        ValueError(),
        TypeError(),
        torch.AcceleratorError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_another_try_cannot_help_is_not_tried(sleeps, error):
    """An answer, a mistake, a broken device and an open breaker are raised at once."""
    operation = Operation()
    with pytest.raises(type(error)) as caught:
        recover(manager_of(sleeps), "sync", error, operation)
    assert caught.value is error
    assert operation.threads == []
    assert sleeps.seconds == []


@pytest.mark.parametrize("door", DOORS)
def test_the_class_of_each_attempt_s_error_decides_anew(sleeps, door):
    """Retries end when the breaker opens in between."""
    operation = Operation(KernelSourceUnavailable(), KernelSourceSuspended())
    with pytest.raises(KernelSourceSuspended):
        recover(manager_of(sleeps), door, KernelSourceUnavailable(), operation)
    assert len(operation.threads) == 2


class Knot:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self):
        self.me = self


@pytest.mark.slow
def test_memory_is_freed_before_the_one_retry_after_its_error(sleeps):
    """What only the collector finds is gone when the operation runs again."""
    gc.disable()
    try:
        knot = weakref.ref(Knot())
        manager = manager_of(sleeps)
        found = manager.recover_from_error_sync(torch.OutOfMemoryError(), {}, knot)
    finally:
        gc.enable()
    assert found is None
    operation = Operation(*[torch.OutOfMemoryError() for _ in range(9)])
    with pytest.raises(torch.OutOfMemoryError):
        recover(manager_of(sleeps), "sync", torch.OutOfMemoryError(), operation)
    assert len(operation.threads) == 1


def test_a_budget_is_shared_by_managers(sleeps):
    """Three retries of two managers together, where few calls were made."""
    budget = RetryBudget(clock=sleeps.clock)
    first, second = (manager_of(sleeps, budget=budget) for _ in range(2))
    recover(first, "sync", ConnectionError(), Operation(ConnectionError()))
    operation = Operation(*[ConnectionError() for _ in range(9)])
    with pytest.raises(ConnectionError):
        recover(second, "sync", ConnectionError(), operation)
    assert len(operation.threads) == 1


# ---- threads and time


def test_the_caller_s_thread_neither_sleeps_nor_retries(sleeps):
    """Through every door but a coroutine's own, another thread does."""
    for door in ("sync", "background", "async of a plain function"):
        operation = Operation(ConnectionError())
        recover(manager_of(sleeps), door, ConnectionError(), operation)
        assert threading.get_ident() not in operation.threads
        if door != "async of a plain function":
            assert threading.get_ident() not in sleeps.threads
        sleeps.threads.clear()


def test_in_the_background_nobody_waits_and_no_thread_stays(sleeps):
    """The call returns while the retry is held up, and its thread ends with it."""
    held_up = threading.Event()
    manager = manager_of(sleeps)

    future = manager.recover_in_background(ConnectionError(), {}, lambda: held_up.wait(60))

    (worker,) = [t for t in threading.enumerate() if t.name == "esper-recovery"]
    assert not future.done()
    held_up.set()
    assert future.result(60) is True
    worker.join(60)
    assert not worker.is_alive()


def test_an_event_loop_goes_on_while_a_plain_function_is_retried(sleeps):
    """A function that blocks its thread does not block the loop."""

    async def main():
        loop_ran = threading.Event()
        manager = manager_of(sleeps)
        recovery = asyncio.create_task(
            manager.recover_from_error(ConnectionError(), {}, lambda: loop_ran.wait(60))
        )
        await asyncio.sleep(0)
        loop_ran.set()
        return await recovery

    assert asyncio.run(main()) is True


def test_no_retry_begins_after_the_deadline(sleeps):
    """One total deadline bounds all waits: 0.005 and 0.2 fit into 0.3 s, and 0.4 does not."""
    deadline = Deadline.after(0.3, sleeps.clock)
    operation = Operation(*[ConnectionError() for _ in range(9)])
    with pytest.raises(ConnectionError):
        recover(manager_of(sleeps), "sync", ConnectionError(), operation, deadline=deadline)
    assert sleeps.seconds == [MAX_FIRST_DELAY_S, 0.2]


def test_an_awaited_attempt_is_cancelled_at_the_deadline(sleeps):
    """What would hang for ever ends, and the original error is at the end of the causes."""
    original = ConnectionError()
    manager = manager_of(sleeps, base_delay=0.0)
    deadline = Deadline.after(1e-6, sleeps.clock)

    async def hang():
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError) as caught:
        asyncio.run(manager.recover_from_error(original, {}, hang, deadline=deadline))
    assert caught.value.__cause__.__cause__.__cause__ is original


def test_who_waits_is_free_at_the_deadline(sleeps):
    """A thread that hangs cannot be stopped, but nobody has to wait for it."""
    hangs = threading.Event()
    manager = manager_of(sleeps, base_delay=0.0)
    original = ConnectionError()
    try:
        with pytest.raises(DeadlineExceededError) as caught:
            manager.recover_from_error_sync(
                original, {}, lambda: hangs.wait(60), deadline=Deadline.after(1e-6, sleeps.clock)
            )
        assert caught.value.__cause__ is original
    finally:
        hangs.set()


def test_an_interrupt_of_an_attempt_reaches_who_waits(sleeps):
    """What is no Exception is not retried, and not lost on the thread either."""
    operation = Operation(SystemExit(3))
    with pytest.raises(SystemExit):
        recover(manager_of(sleeps), "sync", ConnectionError(), operation)
    assert len(operation.threads) == 1


# ---- whole operations


def test_run_calls_first_and_recovers_then(sleeps):
    """The first attempt is the caller's own; only an error needs another thread."""
    manager = manager_of(sleeps)
    operation = Operation(ConnectionError())
    assert manager.run_sync(operation, {}) == "answer"
    assert operation.threads[0] == threading.get_ident() != operation.threads[1]
    operation = Operation(ConnectionError())
    assert asyncio.run(manager.run(operation.later, {})) == "answer"
    assert manager.error_counts[ErrorType.NETWORK_ERROR] == 2


def test_calls_that_went_well_fill_the_budget(sleeps):
    """After thirty of them there are six retries instead of three."""
    manager = manager_of(sleeps, max_retries=99)
    for _ in range(28):
        manager.run_sync(Operation(), {})
    asyncio.run(manager.run(Operation().later, {}))
    operation = Operation(*[ConnectionError() for _ in range(99)])
    with pytest.raises(ConnectionError):
        manager.run_sync(operation, {})
    assert len(operation.threads) == 1 + 6


def test_stats_account_for_every_error(sleeps):
    """Each error is recovered, failed, or being tried."""
    manager = manager_of(sleeps)
    manager.run_sync(Operation(ConnectionError()), {})
    with pytest.raises(ValueError, match="wrong"):
        manager.run_sync(Operation(ValueError("wrong")), {})
    stats = manager.get_stats()
    assert {k: v for k, v in stats["errors"].items() if v} == {
        "network_error": 1,
        "validation_error": 1,
    }
    assert {k: v for k, v in stats["recovered"].items() if v} == {"network_error": 1}
    assert {k: v for k, v in stats["failed"].items() if v} == {"validation_error": 1}
    assert stats["retries"] == 1
    assert stats["errors"].keys() == {each.value for each in ErrorType}


def test_the_log_says_what_was_given_up_and_where(sleeps, caplog):
    """A failed recovery is a warning with its context."""
    with pytest.raises(ValueError, match="wrong"):
        recover(manager_of(sleeps), "sync", ValueError("wrong"), Operation())
    assert "gave up after 0 retries: ValueError('wrong'), {'layer': 'fc'}" in caplog.text


def test_settings_have_ranges():
    """A negative number of retries or a negative wait is refused."""
    with pytest.raises(ValueError, match="at least 0"):
        ErrorRecoveryManager(-1)
    with pytest.raises(ValueError, match="at least 0"):
        ErrorRecoveryManager(base_delay=-0.1)
