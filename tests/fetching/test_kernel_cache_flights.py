"""One fetch for all who ask at a time, on threads and on event loops."""

import asyncio
import hashlib
import os
import signal
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import pytest

from esper.contracts.errors import KernelSourceUnavailable
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.kernel_cache import KernelCache

KERNEL = b"kernel"
DIGEST = hashlib.sha256(KERNEL).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
WAIT_S = 60.0
"""Who has not come back by then hangs."""


@dataclass(frozen=True)
class Parcel:
    """Stands for an artifact where only its bytes matter."""

    kernel_binary: bytes


def unpack(data, *, artifact_id):
    return Parcel(data)


class SlowSource:
    """A source whose answer waits until it is released, and may be a failure at first."""

    def __init__(self, *failures):
        self.released = threading.Event()
        self.begun = threading.Event()
        self.failures = list(failures)
        self.fetched = []

    def fetch(self, digest):
        self.fetched.append(digest)
        self.begun.set()
        if digest == DIGEST:
            assert self.released.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop(0)
        return KERNEL


class Turnstile:
    """A clock that counts who looks at it, and opens a source after the last."""

    def __init__(self, source, num_callers):
        self._lock = threading.Lock()
        self._source = source
        self._missing = num_callers

    def now(self):
        with self._lock:
            self._missing -= 1
            if self._missing == 0:
                self._source.released.set()
        return 0.0


@pytest.fixture(params=[KernelCache, EnhancedKernelCache])
def cache_class(request):
    """Each class of cache that the promises are checked on."""
    return request.param


def on_threads(num, call):
    """Call ``call(i)`` on so many threads at once; return each one's future, which has ended.

    The threads are daemons: one that hangs fails its test, and holds up nobody else.
    """
    futures = [Future() for _ in range(num)]

    def answer(number):
        try:
            futures[number].set_result(call(number))
        except BaseException as error:  # noqa: BLE001 - raised by whoever asks the future
            futures[number].set_exception(error)

    for number in range(num):
        threading.Thread(target=answer, args=(number,), daemon=True).start()
    left = wait(futures, WAIT_S).not_done
    assert not left, f"{len(left)} of {num} wait for ever"
    return futures


def on_a_loop(coroutine):
    """Run a coroutine, which ends or is given up."""

    async def bounded():
        return await asyncio.wait_for(coroutine, WAIT_S)

    return asyncio.run(bounded())


def load_on_threads(cache_class, source, num_callers):
    """Load one kernel on as many threads at once; return the cache and each one's future."""
    cache = cache_class(source=source, decode=unpack, clock=Turnstile(source, num_callers))
    return cache, on_threads(num_callers, lambda _: cache.load_kernel_sync(DIGEST))


@pytest.mark.slow
def test_a_thousand_threads_make_one_fetch(cache_class):
    """Whoever asks while a fetch is under way waits for it and gets the same artifact."""
    source = SlowSource()

    cache, futures = load_on_threads(cache_class, source, 1_000)

    assert source.fetched == [DIGEST]
    assert len({id(future.result()) for future in futures}) == 1
    stats = cache.get_stats()
    assert stats["misses"] == 1
    assert stats["hits"] + stats["single_flight_waits"] == 999


class Shelf:
    """A source that has every kernel at once."""

    def __init__(self, count):
        self.kernels = [b"kernel %d" % i for i in range(count)]
        self.digests = [hashlib.sha256(kernel).hexdigest() for kernel in self.kernels]
        self._by_digest = dict(zip(self.digests, self.kernels, strict=True))

    def fetch(self, digest):
        return self._by_digest[digest]


def test_hits_take_no_lock_and_disturb_no_eviction(cache_class):
    """Every call is answered rightly and counted once, while entries come and go."""
    shelf = Shelf(12)
    cache = cache_class(source=shelf, decode=unpack, max_entries=6)

    def load(number):
        for step in range(1_500):
            at = (step * (number + 1)) % len(shelf.kernels)
            assert cache.load_kernel_sync(shelf.digests[at]).kernel_binary == shelf.kernels[at]

    every_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for loaded in on_threads(8, load):
            loaded.result()
    finally:
        sys.setswitchinterval(every_s)
    stats = cache.get_stats()
    assert stats["hits"] + stats["misses"] + stats["single_flight_waits"] == 8 * 1_500
    assert min(stats["hits"], stats["evictions"]) > 0
    assert stats["entries"] == 6
    assert cache.get_stats()["hits"] == stats["hits"]


def evict_while_another_hits(walk):
    """Let a kernel go where another thread asks for one that is held, amid a look at them."""

    class Looking(EnhancedKernelCache):
        def _by_use(self):
            return walk(super()._by_use, self._entries, hit)

    def hit():
        asking = threading.Thread(target=cache.load_kernel_sync, args=(shelf.digests[0],))
        asking.start()
        asking.join(20)
        assert not asking.is_alive(), "a hit waited for the lock"

    shelf = Shelf(4)
    cache = Looking(source=shelf, decode=unpack, max_entries=3)
    cache.prewarm(shelf.digests)
    return cache.get_stats()


def test_a_hit_comes_between_whoever_looks_at_what_is_held():
    """The order is copied in one step, so that it may change at once."""

    def walk(copied, entries, hit):
        order = copied()
        hit()
        return order

    assert evict_while_another_hits(walk)["evictions"] == 1


def test_control_a_look_that_goes_step_by_step_is_disturbed_by_a_hit():
    """What the cache must not do."""

    def walk(copied, entries, hit):
        return [(each, hit())[0] for each in entries]

    with pytest.raises(RuntimeError, match="mutated"):
        evict_while_another_hits(walk)


def test_a_thousand_coroutines_make_one_fetch(cache_class):
    """The same holds on an event loop, where waiting costs no thread."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        tasks = [asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(1_000)]
        await asyncio.sleep(0)
        waits = cache.get_stats()["single_flight_waits"]
        source.released.set()
        return waits, await asyncio.gather(*tasks)

    waits, found = on_a_loop(main())

    assert waits == 999
    assert source.fetched == [DIGEST]
    assert len({id(artifact) for artifact in found}) == 1


def test_waiting_for_one_kernel_does_not_hold_up_another(cache_class):
    """Ten coroutines that wait for a slow kernel leave the threads to those who fetch."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        slow = [asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(10)]
        await asyncio.sleep(0)
        quick = await cache.load_kernel(OTHER)
        source.released.set()
        await asyncio.gather(*slow)
        return quick

    assert on_a_loop(main()).kernel_binary == KERNEL


def test_an_error_goes_to_those_who_wait_and_to_no_one_later(cache_class):
    """Every waiter of a fetch that fails gets its error; the next caller fetches anew."""
    failure = KernelSourceUnavailable("down")
    source = SlowSource(failure)
    cache = cache_class(source=source, decode=unpack)

    async def main():
        tasks = [asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(5)]
        await asyncio.sleep(0)
        source.released.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert on_a_loop(main()) == [failure] * 5
    assert cache.load_kernel_sync(DIGEST).kernel_binary == KERNEL
    assert len(source.fetched) == 2


class Unkeeping(KernelCache):
    """A cache that cannot keep anything."""

    def _keep(self, artifact_id, artifact):
        raise MemoryError("no room for one more entry")


class Stopped(Turnstile):
    """A clock that breaks when it is looked at once more than by who asks."""

    def now(self):
        if self._missing == 0:
            raise OSError("there is no clock")
        return super().now()


@pytest.mark.parametrize("breaks", ["keeping", "clock"])
def test_a_fetch_that_cannot_be_kept_lands_all_the_same(breaks):
    """Only who fetched is told of it: the others get the kernel, and nobody waits for ever."""
    source = SlowSource()
    clock = (Stopped if breaks == "clock" else Turnstile)(source, 8)
    cache_class = KernelCache if breaks == "clock" else Unkeeping
    cache = cache_class(source=source, decode=unpack, clock=clock)

    futures = on_threads(8, lambda _: cache.load_kernel_sync(DIGEST))

    failed = [future for future in futures if future.exception() is not None]
    assert len(failed) == 1
    assert isinstance(failed[0].exception(), MemoryError | OSError)
    assert all(f.result().kernel_binary == KERNEL for f in futures if f not in failed)
    assert not cache._flights


def test_a_waiter_takes_over_from_an_interrupted_thread(cache_class):
    """An interrupt reaches only the thread that fetched; the others get their kernel."""
    source = SlowSource(KeyboardInterrupt())

    _, futures = load_on_threads(cache_class, source, 20)

    failed = [future for future in futures if future.exception() is not None]
    assert len(failed) == 1
    assert isinstance(failed[0].exception(), KeyboardInterrupt)
    assert len({id(future.result()) for future in futures if future not in failed}) == 1
    assert len(source.fetched) == 2


def test_a_fetch_goes_on_when_the_coroutine_that_began_it_is_cancelled(cache_class):
    """The thread cannot be stopped, so its result is given to those who still wait."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)

    async def main():
        owner, *waiters = [asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(3)]
        await asyncio.to_thread(source.begun.wait, WAIT_S)
        owner.cancel()
        await asyncio.gather(owner, return_exceptions=True)
        source.released.set()
        return owner.cancelled(), await asyncio.gather(*waiters)

    cancelled, found = on_a_loop(main())

    assert cancelled
    assert found[0] is found[1]
    assert source.fetched == [DIGEST]


def test_a_waiter_takes_over_where_the_owner_was_cancelled_before_its_thread_ran(cache_class):
    """A fetch that never came to run is called off, and somebody else's is made."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)

    async def main():
        loop, busy = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, busy.wait)
        owner, *waiters = [asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(3)]
        await asyncio.sleep(0)
        owner.cancel()
        await asyncio.gather(owner, return_exceptions=True)
        busy.set()
        source.released.set()
        await blocked
        return await asyncio.gather(*waiters)

    found = on_a_loop(main())

    assert found[0] is found[1]
    assert source.fetched == [DIGEST]
    assert cache.get_stats()["misses"] == 2


def test_a_cancelled_waiter_takes_nothing_from_the_others(cache_class):
    """Cancelling one who waits ends neither the fetch nor anyone else's waiting."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)

    async def main():
        owner, cancelled, waiter = [
            asyncio.create_task(cache.load_kernel(DIGEST)) for _ in range(3)
        ]
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        source.released.set()
        return await asyncio.gather(owner, waiter)

    first, second = on_a_loop(main())

    assert first is second


def test_event_loops_and_threads_share_a_fetch(cache_class):
    """A cache belongs to no event loop: two loops and a thread wait for one fetch."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack, clock=Turnstile(source, 3))

    def load(number):
        return on_a_loop(cache.load_kernel(DIGEST)) if number else cache.load_kernel_sync(DIGEST)

    futures = on_threads(3, load)
    assert len({id(future.result()) for future in futures}) == 1
    assert source.fetched == [DIGEST]


def test_nobody_s_code_runs_under_the_lock(cache_class):
    """Source, decoder and clock may all use the cache; a lock held over them would hang."""

    class Curious:
        def fetch(self, digest):
            cache.get_stats()
            return KERNEL

        def now(self):
            cache.get_stats()
            return 0.0

        def __call__(self, data, *, artifact_id):
            if artifact_id == DIGEST:
                cache.load_kernel_sync(OTHER)
            return Parcel(data)

    curious = Curious()
    cache = cache_class(source=curious, decode=curious, clock=curious)

    assert cache.load_kernel_sync(DIGEST).kernel_binary == KERNEL
    assert cache.get_stats()["entries"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_that_is_not_there(cache_class):
    """A fetch that was under way at a fork is made again in the child."""
    source = SlowSource()
    cache = cache_class(source=source, decode=unpack)
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(cache.load_kernel_sync, DIGEST)
        assert source.begun.wait(WAIT_S)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            source.released = threading.Event()
            source.released.set()
            found = cache.load_kernel_sync(DIGEST)
            os._exit(0 if found is not None else 1)
        source.released.set()
        assert under_way.result() is not None
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
