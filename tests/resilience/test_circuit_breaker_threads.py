"""The circuit breaker under many threads, and across a fork."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.contracts.errors import CircuitOpenError
from esper.resilience.circuit_breaker import BreakerState, CircuitBreaker
from esper.resilience.clock import ManualClock

NUM_THREADS, NUM_CALLS = 16, 10_000


class EndpointDownError(Exception):
    """What a failing endpoint raises."""


@pytest.fixture
def eager_switching():
    """Let threads take turns as often as the interpreter can."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def on_threads(work):
    """Run ``work(thread number)`` on 16 threads that begin together; return what each returned."""
    start = threading.Barrier(NUM_THREADS)

    def run(number):
        start.wait(60)
        return work(number)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(run, range(NUM_THREADS)))


def outcomes(breaker, num_calls, fails):
    """Make calls; return how many were let through, rejected and failed."""
    done = {"through": 0, "rejected": 0, "failed": 0}

    def endpoint(number):
        done["through"] += 1
        if fails(number):
            raise EndpointDownError

    for number in range(num_calls):
        try:
            breaker.call(endpoint, number)
        except CircuitOpenError:
            done["rejected"] += 1
        except EndpointDownError:
            done["failed"] += 1
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("eager_switching")
def test_no_call_of_sixteen_threads_is_lost_or_counted_twice():
    """With a window as large as all calls, each of 160,000 outcomes is counted exactly once."""
    total = NUM_THREADS * NUM_CALLS
    breaker = CircuitBreaker("endpoint", window_size=total, min_calls=total, failure_rate=0.5)

    on_threads(lambda thread: outcomes(breaker, NUM_CALLS, lambda number: number % 4 == 0))

    stats = breaker.stats()
    assert (stats.permitted, stats.rejected) == (total, 0)
    assert (stats.succeeded, stats.failed) == (total * 3 // 4, total // 4)
    assert (len(breaker._outcomes), breaker._num_failures) == (total, total // 4)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_switching")
def test_counts_stay_exact_while_it_opens_and_closes():
    """Callers and breaker agree on every call that was let through, rejected or failed."""
    breaker = CircuitBreaker(
        "endpoint", window_size=10, min_calls=5, base_wait_s=1e-5, max_wait_s=1e-4, num_probes=2
    )

    found = on_threads(
        lambda thread: outcomes(breaker, NUM_CALLS, lambda number: number // 100 % 2 == thread % 2)
    )

    stats = breaker.stats()
    assert stats.openings > 0
    assert stats.permitted == sum(done["through"] for done in found)
    assert stats.rejected == sum(done["rejected"] for done in found)
    assert stats.permitted + stats.rejected == NUM_THREADS * NUM_CALLS
    assert stats.permitted == stats.succeeded + stats.failed + stats.late
    assert stats.failed <= sum(done["failed"] for done in found) <= stats.failed + stats.late


class NaiveBreaker:
    """The control: half-open is a state that lets calls through until one of them has ended."""

    def __init__(self, num_probes):
        self._is_closed = False

    def call(self, fn):
        result = fn()
        self._is_closed = True
        return result


def half_open(num_probes):
    """Return a breaker whose wait is over."""
    clock = ManualClock()
    breaker = CircuitBreaker(
        "endpoint", window_size=1, min_calls=1, num_probes=num_probes, clock=clock
    )
    breaker.permit().fail()
    clock.advance(60.0)
    return breaker


def num_admitted_together(breaker):
    """Let 16 threads call an endpoint that answers when all are served or sent off."""
    admitted, sent_off, all_came = [], [], threading.Event()

    def come(where):
        where.append(threading.get_ident())
        if len(admitted) + len(sent_off) == NUM_THREADS:
            all_came.set()

    def endpoint():
        come(admitted)
        assert all_came.wait(60)

    def call(thread):
        try:
            breaker.call(endpoint)
        except CircuitOpenError:
            come(sent_off)

    on_threads(call)
    return len(admitted)


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.usefixtures("eager_switching")
def test_half_open_admits_exactly_its_probes_of_sixteen(num_probes):
    """However many threads come at once, so many and no more are let through, and close it."""
    for _ in range(20):
        breaker = half_open(num_probes)
        assert num_admitted_together(breaker) == num_probes
        assert breaker.state == BreakerState.CLOSED


def test_control_a_naive_breaker_lets_all_sixteen_through():
    """What half-open is for can be seen to fail."""
    assert num_admitted_together(NaiveBreaker(1)) == NUM_THREADS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_use_it_and_owes_nothing_to_probes_of_the_parent():
    """A fork while a thread holds the only probe leaves the child a breaker that can close."""
    breaker = half_open(1)
    begun, end = threading.Event(), threading.Event()

    def endpoint():
        begun.set()
        assert end.wait(60)

    with ThreadPoolExecutor(1) as threads:
        probing = threads.submit(breaker.call, endpoint)
        begun.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            breaker.call(int)
            stats = breaker.stats()  # opened, half-open, the probe forgotten, closed
            os._exit(0 if (stats.state, stats.generation) == (BreakerState.CLOSED, 4) else 1)
        end.set()
        probing.result()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert breaker.state == BreakerState.CLOSED


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("eager_switching")
def test_a_fork_in_the_middle_of_calls_leaves_a_whole_breaker():
    """Children forked while four threads call can all use it, and their counts add up."""
    breaker = CircuitBreaker("endpoint", window_size=8, min_calls=8, failure_rate=1.0)
    stop = threading.Event()

    def call_on():
        while not stop.is_set():
            breaker.permit().fail()
            breaker.call(int)

    with ThreadPoolExecutor(4) as threads:
        busy = [threads.submit(call_on) for _ in range(4)]
        children = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                breaker.call(int)
                stats = breaker.stats()
                is_whole = breaker._num_failures == sum(breaker._outcomes)
                is_whole &= stats.permitted - stats.succeeded - stats.failed in range(5)
                os._exit(0 if is_whole else 1)
            children.append(child)
        stop.set()
        for worker in busy:
            worker.result()
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_of_a_closed_breaker_keeps_its_state():
    """There is no probe to forget, so nothing has changed."""
    breaker = CircuitBreaker("endpoint")
    child = os.fork()
    if child == 0:
        os._exit(breaker.stats().generation)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
