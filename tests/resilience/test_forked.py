"""What is of one process is set up again in a forked one."""

import gc
import os
import threading

import pytest

from esper.resilience import forked
from esper.resilience.forked import Forked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Counted(Forked):
    def _begin(self):
        self.lock = threading.Lock()


def status_of_child(look):
    """Fork; return 0 where ``look`` is true there."""
    child = os.fork()
    if child == 0:
        os._exit(0 if look() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_lock_that_was_held_is_free_in_the_child():
    """The parent's stays held."""
    counted = Counted()
    with counted.lock:
        assert status_of_child(lambda: counted.lock.acquire(blocking=False)) == 0
        assert counted.lock.locked()


def test_control_a_lock_that_nobody_makes_anew_is_held_there():
    """As any other lock is."""
    lock = threading.Lock()
    with lock:
        assert status_of_child(lambda: lock.acquire(blocking=False)) == 1


def test_what_is_gone_is_not_kept_for_a_fork():
    """Nothing lives longer because it would begin anew."""
    num_before = len(forked._FORKED)
    counted = Counted()
    assert len(forked._FORKED) == num_before + 1
    del counted
    gc.collect()
    assert len(forked._FORKED) <= num_before
