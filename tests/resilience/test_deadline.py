"""Deadlines."""

import asyncio
import math

import pytest

from esper.contracts.errors import DeadlineExceededError
from esper.resilience.clock import ManualClock
from esper.resilience.deadline import Deadline


@pytest.fixture
def clock():
    return ManualClock(100.0)


def test_what_is_left_runs_out_and_stays_at_nothing(clock):
    """The remaining time falls with the clock, and ends at 0."""
    deadline = Deadline.after(3.0, clock)
    assert deadline.remaining_s() == 3.0
    clock.advance(2.5)
    assert deadline.remaining_s() == 0.5
    clock.advance(2.5)
    assert deadline.remaining_s() == 0.0


def test_the_time_is_over_at_the_deadline_itself(clock):
    """One instant before, a check passes; at the deadline it raises, as a TimeoutError too."""
    deadline = Deadline.after(1.0, clock)
    clock.advance(0.75)
    deadline.check("a fetch")
    clock.advance(0.25)
    with pytest.raises(DeadlineExceededError, match="the time for a fetch is over"):
        deadline.check("a fetch")
    with pytest.raises(TimeoutError):
        deadline.check("a fetch")


def test_a_call_is_given_the_deadline_and_not_begun_after_it(clock):
    """The callee gets the one total deadline, not a time of its own."""
    deadline = Deadline.after(1.0, clock)
    assert deadline.call("a fetch", lambda given: given) is deadline
    clock.advance(1.0)
    with pytest.raises(DeadlineExceededError):
        deadline.call("a fetch", pytest.fail)


def test_an_awaited_call_is_cancelled_at_the_deadline(clock):
    """What would wait for ever ends, and its task is told."""
    ends = []

    async def wait_for_ever(deadline):
        try:
            await asyncio.Event().wait()
        finally:
            ends.append(deadline)

    deadline = Deadline.after(1e-6, clock)
    with pytest.raises(DeadlineExceededError, match="a fetch"):
        asyncio.run(deadline.call_async("a fetch", wait_for_ever))
    assert ends == [deadline]


def test_a_timeout_of_the_callee_s_own_is_left_alone(clock):
    """Only the deadline's own end is called one."""

    async def fail(deadline):
        raise TimeoutError("the callee's")

    with pytest.raises(TimeoutError, match="the callee's") as caught:
        asyncio.run(Deadline.after(60.0, clock).call_async("a fetch", fail))
    assert type(caught.value) is TimeoutError


def test_no_limit_is_a_deadline_too():
    """It never comes, and does not cancel anything."""

    async def answer(deadline):
        return deadline.remaining_s()

    assert asyncio.run(Deadline.never().call_async("a fetch", answer)) == math.inf
    Deadline.never().check("a fetch")


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_a_deadline_is_not_in_the_past(clock, seconds):
    """A negative time is a mistake of the caller's."""
    with pytest.raises(ValueError, match="at least 0 s away"):
        Deadline.after(seconds, clock)
