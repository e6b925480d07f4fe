"""What both caches keep, count and let go."""

import copy
import hashlib
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.compiler.catalog import capacity_free
from esper.compiler.compile import compile_blueprint
from esper.contracts.errors import (
    CacheError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceUnavailable,
)
from esper.contracts.site import SiteSpec
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.kernel_cache import KernelCache
from esper.resilience.clock import ManualClock

MIB = 2**20
NOBODY = "0" * 64
SITE = SiteSpec(kind="linear", in_features=4, out_features=3)


@dataclass(frozen=True)
class Parcel:
    """Stands for an artifact where only its bytes matter."""

    artifact_id: str
    kernel_binary: bytes


def unpack(data, *, artifact_id):
    if hashlib.sha256(data).hexdigest() != artifact_id:
        msg = f"{artifact_id} has other bytes"
        raise KernelCorruptError(msg)
    return Parcel(artifact_id, data)


class Shelf:
    """A source that counts, and fails while it is told to."""

    def __init__(self):
        self.kernels = {}
        self.fetched = []
        self.failure = None

    def add(self, size_bytes, *, fill=b"x"):
        data = fill * size_bytes
        self.kernels[hashlib.sha256(data).hexdigest()] = data
        return hashlib.sha256(data).hexdigest()

    def fetch(self, digest):
        self.fetched.append(digest)
        if self.failure is not None:
            raise self.failure
        if digest not in self.kernels:
            raise KernelNotFoundError(digest)
        return self.kernels[digest]


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture(params=[KernelCache, EnhancedKernelCache])
def cache_class(request):
    """Each class of cache that the promises are checked on."""
    return request.param


@pytest.fixture
def cache_of(cache_class):
    """Make a cache; on a clock that stands still, all fetches cost the same."""

    def make(shelf, size_bytes=100, max_entries=128, **settings):
        settings = {"clock": ManualClock(), **settings}
        return cache_class(size_bytes / MIB, max_entries, source=shelf, decode=unpack, **settings)

    return make


def holds(cache, *digests):
    """Say which of the digests a load would not fetch, without changing their order."""
    return [digest in cache._entries for digest in digests]


def test_a_kernel_is_fetched_once(shelf, cache_of):
    """The second load returns the same immutable artifact and asks nobody."""
    cache, digest = cache_of(shelf), shelf.add(10)

    first, second = cache.load_kernel_sync(digest), cache.load_kernel_sync(digest)

    assert first is second
    assert shelf.fetched == [digest]
    assert (cache.get_stats()["hits"], cache.get_stats()["misses"]) == (1, 1)


def test_the_least_recently_used_goes_first(shelf, cache_of):
    """Loading again counts as use."""
    a, b, c = shelf.add(40), shelf.add(41), shelf.add(42)
    cache = cache_of(shelf)
    for digest in (a, b, a, c):
        cache.load_kernel_sync(digest)

    assert holds(cache, a, b, c) == [True, False, True]
    assert cache.get_stats()["evictions"] == 1


def test_bytes_are_counted_exactly(shelf, cache_of):
    """The budget may be filled to the last byte; one byte more evicts."""
    a, b, c = shelf.add(60), shelf.add(40), shelf.add(1)
    cache = cache_of(shelf)
    cache.prewarm([a, b])
    assert holds(cache, a, b) == [True, True]
    assert cache.get_stats()["size_bytes"] == cache.get_stats()["max_size_bytes"] == 100

    cache.load_kernel_sync(c)

    assert holds(cache, a, b, c) == [False, True, True]
    assert cache.get_stats()["size_bytes"] == 41


def test_entries_are_limited_too(shelf, cache_of):
    """Many small artifacts are limited by their number."""
    digests = [shelf.add(n) for n in (1, 2, 3)]
    cache = cache_of(shelf, max_entries=2)
    cache.prewarm(digests)

    assert holds(cache, *digests) == [False, True, True]
    assert cache.get_stats()["entries"] == 2


def test_what_is_larger_than_the_budget_is_served_and_evicts_nobody(shelf, cache_of):
    """An oversize artifact is returned, counted, and fetched again next time."""
    small, large = shelf.add(50), shelf.add(101)
    cache = cache_of(shelf)
    cache.load_kernel_sync(small)

    assert cache.load_kernel_sync(large).kernel_binary == b"x" * 101
    assert cache.load_kernel_sync(large) is not None

    assert holds(cache, small, large) == [True, False]
    stats = cache.get_stats()
    assert (stats["oversize"], stats["evictions"], stats["size_bytes"]) == (2, 0, 50)


def test_pinned_kernels_stay(shelf, cache_of):
    """Eviction passes over what is pinned, and takes it once every pin is gone."""
    a, b, c = shelf.add(40), shelf.add(41), shelf.add(42)
    cache = cache_of(shelf)
    cache.pin(a)
    cache.pin(a)
    cache.prewarm([a, b, c])
    assert holds(cache, a, b, c) == [True, False, True]
    assert cache.get_stats()["pinned"] == 1

    cache.unpin(a)
    cache.prewarm([b])
    assert holds(cache, a, b, c) == [True, True, False]

    cache.unpin(a)
    cache.prewarm([c])
    assert holds(cache, a, b, c) == [False, True, True]


def test_what_does_not_fit_beside_the_pinned_is_served_and_evicts_nobody(shelf, cache_of):
    """Where pins leave too little room, nothing is evicted in vain."""
    pinned, loose, wanted = shelf.add(60), shelf.add(20), shelf.add(41)
    cache = cache_of(shelf)
    cache.pin(pinned)
    cache.prewarm([pinned, loose])

    assert cache.load_kernel_sync(wanted) is not None

    assert holds(cache, pinned, loose, wanted) == [True, True, False]
    assert cache.get_stats()["oversize"] == 1


class User:
    """Something that uses a kernel."""


def test_a_kernel_is_pinned_as_long_as_any_of_its_users_lives(shelf, cache_of):
    """Nobody has to unpin it; with the last of them it may go."""
    a, b = shelf.add(60), shelf.add(61)
    cache = cache_of(shelf)
    users = [User(), User()]
    for user in users:
        cache.pin_while(a, user)
    cache.prewarm([a, b])
    assert holds(cache, a, b) == [True, False]
    del user, users[0]
    cache.prewarm([b])
    assert holds(cache, a, b) == [True, False]
    assert cache.get_stats()["pinned"] == 1

    users.clear()
    cache.prewarm([b])
    assert holds(cache, a, b) == [False, True]
    assert cache.get_stats()["pinned"] == 0


def test_unpinning_too_often_is_an_error(shelf, cache_of):
    """A pin that was never set cannot be taken away."""
    cache = cache_of(shelf)
    cache.pin(NOBODY)
    cache.unpin(NOBODY)
    with pytest.raises(CacheError, match=NOBODY):
        cache.unpin(NOBODY)


def test_not_found_is_none_and_believed_for_thirty_seconds(shelf, cache_of):
    """A negative answer is remembered until its time is over, and no longer."""
    clock = ManualClock()
    cache = cache_of(shelf, clock=clock)
    wanted = hashlib.sha256(b"later").hexdigest()
    assert cache.load_kernel_sync(wanted) is None
    shelf.kernels[wanted] = b"later"

    clock.advance(29.9)
    assert cache.load_kernel_sync(wanted) is None
    assert len(shelf.fetched) == 1
    assert cache.get_stats()["negative_hits"] == 1

    clock.advance(0.1)
    assert cache.load_kernel_sync(wanted).kernel_binary == b"later"


def test_negative_answers_are_bounded(shelf, cache_of):
    """Ten thousand ids that are not there do not fill the memory."""
    cache = cache_of(shelf)
    for number in range(10_000):
        cache.load_kernel_sync(f"{number:064x}")
    assert len(cache._absent_until_s) <= 4096


@pytest.mark.parametrize(
    "failure", [KernelSourceUnavailable("down"), TimeoutError("slow"), KernelCorruptError("bad")]
)
def test_failures_are_never_cached(shelf, failure, cache_of):
    """A load after a failure asks the source again, without any time passing."""
    cache, digest = cache_of(shelf, clock=ManualClock()), shelf.add(10)
    shelf.failure = failure
    with pytest.raises(type(failure)):
        cache.load_kernel_sync(digest)
    shelf.failure = None

    assert cache.load_kernel_sync(digest).artifact_id == digest


def test_bytes_of_another_digest_are_corrupt_and_not_kept(shelf, cache_class):
    """What a source gives is compared with what was asked for, by the codec itself."""
    shelf.kernels[NOBODY] = compile_blueprint(capacity_free(SITE)).kernel_binary
    cache = cache_class(source=shelf)

    with pytest.raises(KernelCorruptError):
        cache.load_kernel_sync(NOBODY)
    assert cache.get_stats()["entries"] == 0


def test_the_codec_is_the_default_decoder(shelf, cache_class):
    """Without a decoder of the caller's own, an artifact comes back as it was compiled."""
    artifact = compile_blueprint(capacity_free(SITE))
    shelf.kernels[artifact.artifact_id] = artifact.kernel_binary
    cache = cache_class(source=shelf)

    assert cache.load_kernel_sync(artifact.artifact_id) == artifact
    assert cache.get_stats()["size_bytes"] == len(artifact.kernel_binary)


def test_without_a_source_the_error_names_the_cure(cache_class):
    """A cache that cannot fetch is unavailable, not a cache of nothing."""
    with pytest.raises(KernelSourceUnavailable, match="source=registry"):
        cache_class().load_kernel_sync(NOBODY)


def test_only_digests_reach_a_source(shelf, cache_of):
    """A name that is no digest is refused before anybody is asked."""
    with pytest.raises(ValueError, match="not a digest"):
        cache_of(shelf).load_kernel_sync("../kernel")
    assert shelf.fetched == []


@pytest.mark.parametrize(
    "settings",
    [
        {"max_cache_size_mb": -1},
        {"max_entries": -1},
        {"negative_ttl_s": 31},
        {"negative_ttl_s": -1},
    ],
)
def test_settings_have_ranges(settings, cache_class):
    """A budget below nothing and a long-lived negative answer are refused."""
    with pytest.raises(ValueError, match="found"):
        cache_class(**settings)


def test_prewarm_says_what_is_not_there(shelf, cache_of):
    """What is there is loaded, and the rest is named."""
    cache, digest = cache_of(shelf), shelf.add(10)

    assert cache.prewarm([NOBODY, digest]) == [NOBODY]
    assert holds(cache, digest) == [True]


@pytest.mark.parametrize(
    "cache_class", [KernelCache, EnhancedKernelCache], ids=["plain", "enhanced"]
)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["load", "load", "pin", "unpin"]), st.integers(0, 7)),
        max_size=60,
    )
)
def test_the_account_is_always_right(cache_class, moves):
    """After any sequence of loads and pins, counts and limits hold and the bytes are right."""
    shelf = Shelf()
    digests = [shelf.add(size) for size in (1, 9, 20, 33, 50, 99, 100, 101)]
    cache = cache_class(100 / MIB, 4, source=shelf, decode=unpack, clock=ManualClock())
    num_loads = 0
    for move, number in moves:
        if move == "load":
            assert cache.load_kernel_sync(digests[number]).artifact_id == digests[number]
            num_loads += 1
        elif move == "pin":
            cache.pin(digests[number])
        elif digests[number] in cache._pins:
            cache.unpin(digests[number])
        stats = cache.get_stats()
        sizes = [len(parcel.kernel_binary) for parcel in cache._entries.values()]
        assert stats["size_bytes"] == sum(sizes) <= 100
        assert stats["entries"] == len(sizes) <= 4
        assert stats["hits"] + stats["misses"] == num_loads
        assert stats["misses"] == stats["entries"] + stats["evictions"] + stats["oversize"]


def test_a_copy_is_the_cache_itself(shelf, cache_of):
    """Copying a model does not copy what all models share."""
    cache = cache_of(shelf)
    assert copy.deepcopy({"cache": cache})["cache"] is cache
    assert copy.copy(cache) is cache


def test_a_pickled_cache_arrives_empty_with_its_settings(cache_class):
    """Budget and source travel; entries, counts and the lock do not."""
    cache = cache_class(2, 3, source=None, decode=unpack, negative_ttl_s=5)

    arrived = pickle.loads(pickle.dumps(cache))

    assert arrived is not cache
    assert (arrived.max_cache_size_mb, arrived.max_entries) == (2, 3)
    assert arrived._negative_ttl_s == 5
    assert arrived.get_stats()["entries"] == 0
