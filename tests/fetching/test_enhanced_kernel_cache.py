"""What the enhanced cache does when its source or its kernels fail."""

import asyncio
import gc
import hashlib
import itertools
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import (
    CacheError,
    CircuitOpenError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.fetching.breaker_source import ANSWERS, behind_breaker
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache, shared_cache
from esper.fetching.kernel_cache import KernelCache
from esper.resilience.circuit_breaker import CircuitBreaker
from esper.resilience.clock import ManualClock

NOBODY = "0" * 64


@dataclass(frozen=True)
class Parcel:
    """Stands for an artifact where only its bytes matter."""

    kernel_binary: bytes


def unpack(data, *, artifact_id):
    if data == b"corrupt":
        raise KernelCorruptError(artifact_id)
    return Parcel(data)


class Shelf:
    """A source whose fetches take a time of their own each, and fail while it is told to."""

    def __init__(self, clock):
        self.clock = clock
        self.kernels = {}
        self.costs_s = {}
        self.fetched = []
        self.failure = None

    def add(self, text, *, cost_s=0.0):
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.kernels[digest] = text.encode()
        self.costs_s[digest] = cost_s
        return digest

    def fetch(self, digest):
        self.fetched.append(digest)
        self.clock.advance(self.costs_s.get(digest, 0.0))
        if self.failure is not None:
            raise self.failure
        if digest not in self.kernels:
            raise KernelNotFoundError(digest)
        return self.kernels[digest]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def shelf(clock):
    return Shelf(clock)


@pytest.fixture
def cache(shelf, clock):
    return cache_of(shelf)


def cache_of(shelf, **settings):
    """Return a cache whose breaker opens for 10 s after 2 failures in a row."""
    breaker = CircuitBreaker(
        "the shelf",
        window_size=2,
        min_calls=2,
        failure_rate=1.0,
        base_wait_s=10.0,
        jitter=0.0,
        answers=ANSWERS,
        clock=shelf.clock,
    )
    given = {"breaker": breaker, "decode": unpack, "clock": shelf.clock, **settings}
    return EnhancedKernelCache(source=shelf, **given)


def break_down(cache, shelf):
    """Let the source fail until it is not asked any more."""
    shelf.failure = KernelSourceUnavailable("down")
    for digest in (shelf.add("one"), shelf.add("two")):
        with pytest.raises(KernelSourceUnavailable, match="down"):
            cache.load_kernel_sync(digest)
    assert cache.get_stats()["breaker_state"] == "open"
    shelf.fetched.clear()


# ---- the breaker


def test_an_open_breaker_keeps_the_source_from_being_asked(cache, shelf, clock):
    """A load of what is not held fails at once; after the wait the source is asked again."""
    break_down(cache, shelf)
    wanted = shelf.add("wanted")

    with pytest.raises(KernelSourceSuspended, match=r"not in the cache, and the shelf") as caught:
        cache.load_kernel_sync(wanted)

    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert shelf.fetched == []
    shelf.failure = None
    clock.advance(10.0)
    assert cache.load_kernel_sync(wanted).kernel_binary == b"wanted"
    assert cache.get_stats()["breaker_state"] == "closed"


def test_what_is_held_is_served_while_the_breaker_is_open(cache, shelf):
    """Kernels in the cache do not depend on their source."""
    held = shelf.add("held")
    artifact = cache.load_kernel_sync(held)
    break_down(cache, shelf)

    assert cache.load_kernel_sync(held) is artifact
    assert asyncio.run(cache.load_kernel(held)) is artifact


def test_a_negative_answer_is_not_stretched_while_the_breaker_is_open(cache, shelf, clock):
    """It is believed for its time; after it, silence is not taken for an answer."""
    assert cache.load_kernel_sync(NOBODY) is None
    clock.advance(25.0)
    break_down(cache, shelf)
    assert cache.load_kernel_sync(NOBODY) is None
    clock.advance(5.0)
    with pytest.raises(KernelSourceUnavailable):
        cache.load_kernel_sync(NOBODY)


@pytest.mark.parametrize("failure", [KernelNotFoundError, KernelCorruptError])
def test_answers_do_not_open_the_breaker_and_close_it(cache, shelf, clock, failure):
    """A source that says no, or has damaged bytes, was reached."""
    break_down(cache, shelf)
    clock.advance(10.0)
    shelf.failure = failure(NOBODY)
    for number in range(5):
        if failure is KernelNotFoundError:
            assert cache.load_kernel_sync(f"{number:064x}") is None
        else:
            with pytest.raises(failure):
                cache.load_kernel_sync(f"{number:064x}")
    assert cache.get_stats()["breaker_state"] == "closed"


def test_a_digest_mismatch_is_no_failure_of_the_source(cache, shelf):
    """Bytes that the codec refuses leave the breaker closed."""
    for number in range(5):
        shelf.kernels[f"{number:064x}"] = b"corrupt"
        with pytest.raises(KernelCorruptError):
            cache.load_kernel_sync(f"{number:064x}")
    assert cache.get_stats()["breaker_state"] == "closed"


def test_one_breaker_for_one_source(shelf, clock):
    """Caches of one source share its breaker, those of another have another's."""
    first, second = EnhancedKernelCache(source=shelf), EnhancedKernelCache(source=shelf)
    assert first.breaker is second.breaker is behind_breaker(shelf).breaker
    assert EnhancedKernelCache(source=Shelf(clock)).breaker is not first.breaker
    assert EnhancedKernelCache().breaker is None
    assert EnhancedKernelCache().get_stats()["breaker_state"] is None


def test_the_control_without_a_breaker_asks_every_time(shelf, clock):
    """The plain cache goes on asking a source that is down."""
    cache = KernelCache(source=shelf, decode=unpack, clock=clock)
    shelf.failure = KernelSourceUnavailable("down")
    for _ in range(10):
        with pytest.raises(KernelSourceUnavailable):
            cache.load_kernel_sync(NOBODY)
    assert len(shelf.fetched) == 10


def test_the_log_says_when_a_source_is_not_asked_any_more(shelf, caplog):
    """An opening breaker is worth a warning that names the source."""
    shelf.failure = KernelSourceUnavailable("down")
    cache = EnhancedKernelCache(source=shelf)
    for _ in range(5):
        with pytest.raises(KernelSourceUnavailable):
            cache.load_kernel_sync(NOBODY)
    assert "the kernel source Shelf fails and is not asked" in caplog.text


# ---- eviction


def survivors(cache, digests, wanted):
    """Load one more kernel than fits, and return which of the others are still there."""
    cache.load_kernel_sync(wanted)
    return {name for name, digest in digests.items() if digest in cache._entries}


def test_of_two_alike_the_idle_one_goes(shelf):
    """With equal cost and health it is least recently used."""
    cache = cache_of(shelf, max_entries=2)
    digests = {name: shelf.add(name) for name in ("idle", "used")}
    cache.prewarm(digests.values())
    assert survivors(cache, digests, shelf.add("more")) == {"used"}


def test_of_two_alike_the_cheap_one_goes(shelf):
    """A kernel that took long to fetch outlives one used a little later that came at once."""
    cache = cache_of(shelf, max_entries=2)
    digests = {"dear": shelf.add("dear", cost_s=1.0), "cheap": shelf.add("cheap")}
    cache.prewarm(digests.values())
    assert survivors(cache, digests, shelf.add("more")) == {"dear"}


def test_of_two_alike_the_unhealthy_one_goes(shelf):
    """A kernel that has failed goes before one that was used less recently and has not."""
    cache = cache_of(shelf, max_entries=2)
    digests = {name: shelf.add(name) for name in ("sound", "failing")}
    cache.prewarm(digests.values())
    cache.record_failure(digests["failing"], "NaN")
    cache.record_failure(digests["failing"], "NaN")
    assert survivors(cache, digests, shelf.add("more")) == {"sound"}


def test_being_dear_does_not_keep_a_kernel_for_ever(shelf):
    """What took ten seconds and is never used again goes in the end."""
    cache = cache_of(shelf, max_entries=32)
    dear = shelf.add("dear", cost_s=10.0)
    cache.load_kernel_sync(dear)
    cache.prewarm(shelf.add(str(number)) for number in range(64))
    assert dear not in cache._entries


def test_a_dear_kernel_that_is_used_is_kept(shelf):
    """Use makes good for the evictions that passed it over."""
    cache = cache_of(shelf, max_entries=4)
    dear = shelf.add("dear", cost_s=0.02)
    cache.load_kernel_sync(dear)
    for number in range(64):
        cache.load_kernel_sync(shelf.add(str(number)))
        if number % 8 == 7:
            cache.load_kernel_sync(dear)
    assert dear in cache._entries
    assert shelf.fetched.count(dear) == 1


def test_a_pinned_kernel_stays_however_little_it_is_worth(shelf):
    """Worth decides among those that may go."""
    cache = cache_of(shelf, max_entries=2)
    digests = {name: shelf.add(name) for name in ("pinned", "sound")}
    cache.pin(digests["pinned"])
    cache.prewarm(digests.values())
    cache.record_failure(digests["pinned"], "NaN")
    assert survivors(cache, digests, shelf.add("more")) == {"pinned"}


@given(
    costs=st.tuples(*[st.integers(0, 10**5)] * 2),
    failures=st.tuples(*[st.integers(0, 20)] * 2),
    successes=st.integers(0, 20),
)
@settings(max_examples=50, deadline=None)
def test_worth_is_monotone_in_idleness_cost_and_health(costs, failures, successes):
    """More idle is worth less, dearer no less, and more failures less; never below 0."""
    shelf = Shelf(ManualClock())
    cache = cache_of(shelf, quarantine_after=10**6)
    numbers = itertools.count()

    def worth(cost_s, num_failures, num_used_later):
        digest = shelf.add(f"kernel {next(numbers)}", cost_s=cost_s)
        cache.load_kernel_sync(digest)
        for _ in range(successes):
            cache.record_success(digest)
        for _ in range(num_failures):
            cache.record_failure(digest, "NaN")
        cache.prewarm(shelf.add(f"{digest} {n}") for n in range(num_used_later))
        return cache.worth(digest)

    cheap, dear = (cost / 1024 for cost in sorted(costs))
    few, many = sorted(failures)
    assert worth(cheap, few, 0) > worth(cheap, few, 1) > worth(cheap, few, 3) > 0
    assert worth(cheap, few, 2) <= worth(dear, few, 2)
    assert worth(cheap, few, 2) >= worth(cheap, many, 2)
    assert few == many or worth(cheap, few, 2) > worth(cheap, many, 2)


def test_what_is_not_held_has_no_worth(cache):
    """Asking for it is a mistake."""
    with pytest.raises(KeyError):
        cache.worth(NOBODY)


# ---- quarantine


def test_three_failures_in_a_row_put_a_kernel_in_quarantine(cache, shelf):
    """It is dropped, refused with the reason, and not fetched, until it is released."""
    digest = shelf.add("kernel")
    cache.load_kernel_sync(digest)
    assert [cache.record_failure(digest, f"NaN {n}") for n in range(3)] == [False, False, True]
    assert cache.quarantined() == {digest: "NaN 2"}
    shelf.fetched.clear()

    with pytest.raises(KernelRefusedError, match=r"quarantine: NaN 2; release it with") as caught:
        cache.load_kernel_sync(digest)

    assert caught.value.check == "quarantine"
    assert shelf.fetched == []
    stats = cache.get_stats()
    assert (stats["entries"], stats["size_bytes"], stats["quarantined"]) == (0, 0, 1)
    cache.release(digest)
    assert cache.load_kernel_sync(digest) is not None
    assert cache.record_failure(digest, "NaN") is False


def test_a_success_ends_a_run_of_failures(cache, shelf):
    """Two failures, a success, two failures: no quarantine."""
    digest = shelf.add("kernel")
    for _ in range(2):
        cache.record_failure(digest, "NaN")
        cache.record_failure(digest, "NaN")
        cache.record_success(digest)
    assert cache.quarantined() == {}


def test_a_kernel_that_is_corrupt_again_and_again_is_put_in_quarantine(cache, shelf):
    """One damaged answer may be an accident; three are not fetched a fourth time."""
    digest = shelf.add("corrupt")
    for _ in range(3):
        with pytest.raises(KernelCorruptError):
            cache.load_kernel_sync(digest)
    with pytest.raises(KernelRefusedError):
        cache.load_kernel_sync(digest)
    assert len(shelf.fetched) == 3


def test_a_kernel_put_in_quarantine_while_it_is_fetched_is_not_kept(cache, shelf):
    """Whoever asked before gets it; nobody after."""
    digest = shelf.add("kernel")

    def fetch(wanted):
        for _ in range(3):
            cache.record_failure(digest, "NaN")
        return shelf.kernels[wanted]

    shelf.fetch = fetch
    assert cache.load_kernel_sync(digest) is not None
    with pytest.raises(KernelRefusedError):
        cache.load_kernel_sync(digest)


def test_releasing_what_is_not_in_quarantine_is_an_error(cache):
    """A typing mistake is not silently nothing."""
    with pytest.raises(CacheError, match=NOBODY):
        cache.release(NOBODY)


def test_records_of_kernels_that_are_not_held_are_bounded(cache, shelf):
    """Ten thousand failing ids do not fill the memory, and what is held keeps its record."""
    held = shelf.add("held", cost_s=2.0)
    cache.load_kernel_sync(held)
    worth = cache.worth(held)
    for number in range(10_000):
        cache.record_failure(f"{number:064x}", "NaN")
    assert len(cache._records) <= 4097
    assert cache.worth(held) == worth


# ---- pre-warming, monitoring, sharing


def test_prewarming_loads_several_at_once_and_says_what_is_not_there(cache, shelf):
    """What was pre-warmed is served with the source gone."""
    digests = [shelf.add(str(number)) for number in range(20)]

    missing = asyncio.run(cache.prewarm_async([*digests, NOBODY], num_at_once=4))

    assert missing == [NOBODY]
    shelf.failure = KernelSourceUnavailable("down")
    assert all(cache.load_kernel_sync(digest) is not None for digest in digests)


def test_stats_hold_those_of_the_plain_cache_and_what_was_measured(cache, shelf):
    """Every key is there, with the right number behind it."""
    plain = KernelCache().get_stats().keys()
    empty = cache.get_stats()
    assert plain < empty.keys()
    assert (empty["hit_rate"], empty["mean_fetch_s"], empty["max_fetch_s"]) == (None, None, None)
    a, b = shelf.add("a", cost_s=1.0), shelf.add("b", cost_s=3.0)
    cache.prewarm([a, b, a, a])
    cache.record_success(a)
    cache.record_failure(b, "NaN")
    cache.record_failure(b, "NaN")
    break_down(cache, shelf)
    with pytest.raises(KernelSourceUnavailable):
        cache.load_kernel_sync(NOBODY)

    found = {key: value for key, value in cache.get_stats().items() if key not in plain}

    assert found == {
        "hit_rate": 2 / 7,
        "fetches": 2,
        "mean_fetch_s": 2.0,
        "max_fetch_s": 3.0,
        "recorded_successes": 1,
        "recorded_failures": 2,
        "quarantined": 0,
        "breaker_state": "open",
        "breaker_openings": 1,
        "breaker_rejected": 1,
        "source_failures": 2,
    }


def test_a_quarantine_begins_after_one_failure_at_least():
    """None at all would refuse every kernel."""
    with pytest.raises(ValueError, match="at least 1, found 0"):
        EnhancedKernelCache(quarantine_after=0)


def test_a_pickled_cache_keeps_its_settings():
    """Also those that the plain cache does not have."""
    cache = EnhancedKernelCache(2, breaker=CircuitBreaker("mine"), quarantine_after=1)
    arrived = pickle.loads(pickle.dumps(cache))
    assert type(arrived) is EnhancedKernelCache
    assert arrived.max_cache_size_mb == 2
    assert arrived._own_breaker.name == "mine"
    assert arrived.record_failure(NOBODY, "NaN") is True


def test_one_shared_cache_for_each_source(shelf, clock):
    """Layers of one source share a cache, those of another have another's; pickling keeps it so."""
    cache = shared_cache(shelf)

    assert type(cache) is EnhancedKernelCache
    assert shared_cache(shelf) is cache
    assert shared_cache(Shelf(clock)) is not cache
    first, second = pickle.loads(pickle.dumps([cache, cache]))
    assert first is second
    assert shared_cache(first.source) is first


def test_a_shared_cache_ends_with_its_last_holder(shelf):
    """A source that nobody uses any more is not kept alive by a table."""
    shared = shared_cache(shelf)
    shared.pin(NOBODY)
    del shared
    gc.collect()
    assert shared_cache(shelf).get_stats()["pinned"] == 0
