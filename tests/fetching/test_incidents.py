"""Breakers, caches and retries tell those who listen to their source, and nobody else."""

import gc

import pytest

from esper.contracts.errors import KernelNotFoundError, KernelSourceUnavailable
from esper.contracts.events import BreakerMoved, KernelEmbargoed, KernelQuarantined, Noted, Retried
from esper.fetching.breaker_source import behind_breaker
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.error_recovery import ErrorRecoveryManager
from esper.fetching.incidents import ROOM, Incidents, announce

DIGEST = "ab" * 32


class Down:
    """A source that does not answer."""

    def fetch(self, digest):
        raise KernelSourceUnavailable(f"nobody answers for {digest}")


class Empty:
    """A source that has nothing."""

    def fetch(self, digest):
        raise KernelNotFoundError(digest)


@pytest.fixture
def source():
    return Down()


@pytest.fixture
def incidents(source):
    return Incidents([source])


def test_a_breaker_that_opens_is_told_by_its_source(source, incidents):
    """Once, with how long nothing is asked."""
    cache = EnhancedKernelCache(source=source)
    for _ in range(6):
        with pytest.raises(KernelSourceUnavailable):
            cache.load_kernel_sync(DIGEST)
    (found,) = incidents.take()
    assert isinstance(found, BreakerMoved)
    assert (found.before, found.after) == ("closed", "open")
    assert found.wait_s > 0
    assert incidents.take() == []


def test_control_who_listens_to_another_source_hears_nothing(source):
    """Two runs in one process have a log each."""
    other = Incidents([Down()])
    test_a_breaker_that_opens_is_told_by_its_source(source, Incidents([source]))
    assert other.take() == []


def test_a_breaker_is_listened_to_for_as_long_as_somebody_asks_through_it(source):
    """What stands before it goes when nobody holds it, and its breaker tells nobody then."""
    behind = behind_breaker(source)
    breaker = behind.breaker
    assert len(breaker._listeners) == 1
    del behind
    gc.collect()
    assert breaker._listeners[0]() is None


def test_quarantine_and_release_are_told(source, incidents):
    """With the reason of the last failure."""
    cache = EnhancedKernelCache(source=source, quarantine_after=2)
    cache.record_failure(DIGEST, "NaN")
    assert incidents.take() == []
    cache.record_failure(DIGEST, "NaN")
    cache.release(DIGEST)
    put_in, released = incidents.take()
    assert isinstance(put_in, KernelQuarantined)
    assert (put_in.artifact_id, put_in.reason, put_in.released) == (DIGEST, "NaN", False)
    assert released.released


def test_what_a_source_does_not_have_is_told_with_how_long_that_is_believed():
    """An embargo on one digest."""
    source = Empty()
    incidents = Incidents([source])
    cache = EnhancedKernelCache(source=source, negative_ttl_s=5.0)
    assert cache.load_kernel_sync(DIGEST) is None
    assert cache.load_kernel_sync(DIGEST) is None
    (found,) = incidents.take()
    assert isinstance(found, KernelEmbargoed)
    assert (found.artifact_id, found.for_s) == (DIGEST, 5.0)


@pytest.mark.parametrize(
    ("num_failures", "outcomes"),
    [(1, ["tried again", "recovered"]), (5, ["tried again", "tried again", "given up"])],
)
def test_retries_are_told_with_what_became_of_them(source, incidents, num_failures, outcomes):
    """Each retry, and the end; with the layer, the seed and the kernel."""
    left = [num_failures]

    def load():
        left[0] -= 1
        if left[0] >= 0:
            raise KernelSourceUnavailable("down")
        return "kernel"

    manager = ErrorRecoveryManager(max_retries=2, base_delay=0.0, source=source)
    context = {"layer": "fc", "seed_idx": 1, "artifact_id": DIGEST}
    try:
        manager.run_sync(load, context)
    except KernelSourceUnavailable:
        assert outcomes[-1] == "given up"
    found = incidents.take()
    assert all(isinstance(event, Retried) and event.what == "load" for event in found)
    assert [event.outcome for event in found] == outcomes
    assert {(e.site, e.seed_idx, e.artifact_id) for e in found} == {("fc", 1, DIGEST)}


def test_what_nobody_takes_is_bounded(source, incidents):
    """The oldest goes, and is counted."""
    for i in range(ROOM + 3):
        announce(source, Noted(update=i, time_s=0.0, text="x"))
    found = incidents.take()
    assert len(found) == ROOM
    assert found[0].update == 3
    assert incidents.num_lost == 3
