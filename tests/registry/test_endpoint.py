"""What guards the calls to one server: when it is asked again."""

import random

import pytest

from esper.contracts.errors import KernelSourceSuspended
from esper.registry.endpoint import Endpoint
from esper.resilience.clock import ManualClock


def rested(clock, *, until_s, asked):
    """Return what asks a server that wants to be left alone until a time."""

    def ask(_):
        asked.append(clock.now())
        if clock.now() < until_s:
            error = KernelSourceSuspended("left alone")
            error.retry_after_s = until_s - clock.now()
            raise error
        return "kernel"

    return ask


def test_a_call_waits_for_as_long_as_the_server_says_where_there_is_time():
    """It is asked again once that is over, a little apart from others, and charges no breaker."""
    clock, asked = ManualClock(), []
    drawn = random.getstate()
    endpoint = Endpoint("urza", timeout_s=10.0, clock=clock, sleep=clock.advance)
    assert endpoint.call(rested(clock, until_s=4.0, asked=asked), may_repeat=True) == "kernel"
    assert asked[0] == 0.0
    assert 4.0 <= asked[1] <= 6.0
    assert len(asked) == 2
    assert random.getstate() == drawn  # a training draws from it


@pytest.mark.parametrize(("until_s", "may_repeat"), [(30.0, True), (4.0, False)])
def test_a_call_without_the_time_or_the_right_to_wait_ends_at_once(until_s, may_repeat):
    """A rest that is longer than the deadline is not begun, and what may not be repeated is not."""
    clock, asked = ManualClock(), []
    endpoint = Endpoint("urza", timeout_s=10.0, clock=clock, sleep=clock.advance)
    with pytest.raises(KernelSourceSuspended):
        endpoint.call(rested(clock, until_s=until_s, asked=asked), may_repeat=may_repeat)
    assert (asked, clock.now()) == ([0.0], 0.0)
