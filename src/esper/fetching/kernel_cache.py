"""A cache of compiled kernels: each is fetched once, however many ask for it at a time.

Entries are immutable artifacts; every seed makes its own parameters from them. One lock is for
the tables and is never held while something is fetched, hashed or decoded. A hit takes no lock: it
looks an entry up and moves it to the end, each in one step that no thread can come between; who
holds the lock must expect the order, and nothing else, to change. Waiting is for a *flight*: one
fetch under way, a future that threads and event loops wait for alike.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Protocol, TypedDict

from esper.compiler.codec import decode_artifact
from esper.contracts.errors import CacheError, KernelNotFoundError, KernelSourceUnavailable
from esper.contracts.events import KernelEmbargoed, KernelPrepared
from esper.contracts.reference import check_digest
from esper.fetching.incidents import announce
from esper.resilience.attempt import Done, Failed, attempt
from esper.resilience.clock import MonotonicClock
from esper.resilience.forked import Forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.ports import Clock, KernelSource

MAX_NEGATIVE_TTL_S: Final = 30.0
_MAX_NEGATIVE_ENTRIES: Final = 4096


class Decode(Protocol):
    """Turns bytes into an artifact, and refuses bytes whose sha256 is not ``artifact_id``."""

    def __call__(self, data: bytes, *, artifact_id: str) -> CompiledKernelArtifact:
        """Decode one artifact."""
        ...


class CacheOptions(TypedDict, total=False):
    """What a :class:`KernelCache` is made of, by keyword; see there."""

    max_cache_size_mb: float
    max_entries: int
    source: KernelSource | None
    decode: Decode
    clock: Clock | None
    negative_ttl_s: float


class CacheStats(TypedDict):
    """What :meth:`KernelCache.get_stats` returns.

    Every call of ``load_kernel`` adds one to one of the first four, and one more where a fetch
    that it waited for was called off.

    Attributes:
        hits: Calls that were served from the cache.
        negative_hits: Calls that were told from memory that there is no such kernel.
        misses: Calls that fetched.
        single_flight_waits: Calls that waited for another's fetch.
        evictions: Entries that had to go to make room.
        oversize: Artifacts that were served and not kept.
        entries: Artifacts held now.
        max_entries: How many may be held.
        size_bytes: Bytes of all artifacts held.
        max_size_bytes: How many bytes may be held.
        pinned: Ids that are pinned now.
    """

    hits: int
    negative_hits: int
    misses: int
    single_flight_waits: int
    evictions: int
    oversize: int
    entries: int
    max_entries: int
    size_bytes: int
    max_size_bytes: int
    pinned: int


class KernelCache(Forked):
    """Compiled kernels by digest: the least recently used go first, pinned ones never.

    An artifact that does not fit, because it is larger than the budget or than what pinned ones
    leave of it, is served and not kept, and evicts nobody. Only answers are remembered: a kernel,
    or for a short while that there is none; a failure reaches those who were waiting and no one
    later. A copy of a cache is the cache itself; one that is pickled arrives empty.

    Args:
        max_cache_size_mb: Budget in MiB for the artifacts' bytes, at least 0.
        max_entries: Number of artifacts that are kept at most, at least 0.
        source: Where kernels come from; without one nothing can be loaded.
        decode: Verifies and decodes what the source gave.
        clock: Measures how long "not found" is believed.
        negative_ttl_s: How long that is, in seconds, 0 to 30.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        max_cache_size_mb: float = 512,
        max_entries: int = 128,
        *,
        source: KernelSource | None = None,
        decode: Decode = decode_artifact,
        clock: Clock | None = None,
        negative_ttl_s: float = MAX_NEGATIVE_TTL_S,
    ) -> None:
        if not (max_cache_size_mb >= 0 and max_entries >= 0):
            msg = f"a budget is at least 0, found {max_cache_size_mb} MiB, {max_entries} entries"
            raise ValueError(msg)
        if not 0 <= negative_ttl_s <= MAX_NEGATIVE_TTL_S:
            msg = f"negative_ttl_s is from 0 to {MAX_NEGATIVE_TTL_S}, found {negative_ttl_s}"
            raise ValueError(msg)
        self.max_cache_size_mb = max_cache_size_mb
        self.max_entries = max_entries
        self._max_size_bytes = int(max_cache_size_mb * 2**20)
        self._source = source
        self._decode = decode
        self._clock = clock or MonotonicClock()
        self._negative_ttl_s = negative_ttl_s
        self._entries: OrderedDict[str, CompiledKernelArtifact] = OrderedDict()
        self._absent_until_s: dict[str, float] = {}
        self._pins: dict[str, int] = {}
        self._users: dict[str, weakref.WeakSet[object]] = {}
        self._hits = itertools.count()
        self._hits_read = 0
        self._num_negative_hits = 0
        self._num_misses = 0
        self._num_waits = 0
        self._num_evictions = 0
        self._num_oversize = 0
        super().__init__()

    @property
    def source(self) -> KernelSource | None:
        """Where kernels come from."""
        return self._source

    def load_kernel_sync(self, artifact_id: str) -> CompiledKernelArtifact | None:
        """Return a kernel, from the cache or through it from the source; may block.

        Args:
            artifact_id: 64 lower-case hexadecimal digits.

        Returns:
            The artifact, or None: the source answered that it has none.

        Raises:
            KernelSourceUnavailable: The source did not answer, or there is no source.
            KernelCorruptError: What it gave is not the artifact of that id.
            ValueError: ``artifact_id`` is not a digest.
        """
        entries = self._entries
        try:
            found = entries[artifact_id]
            entries.move_to_end(artifact_id)
        except KeyError:  # or it was evicted in between
            return self._fetched(artifact_id)
        next(self._hits)
        return found

    def _fetched(self, artifact_id: str) -> CompiledKernelArtifact | None:
        """Return what is not at hand; may block."""
        while True:
            flight, mine = self._board(artifact_id)
            if mine:
                self._fly(artifact_id, flight)
            answer = flight.landed.result()
            if not isinstance(answer, _CalledOff):
                return answer

    async def load_kernel(self, artifact_id: str) -> CompiledKernelArtifact | None:
        """Return a kernel without blocking the event loop; else as :meth:`load_kernel_sync`.

        The fetch runs on a thread, and goes on for the others where its caller is cancelled.
        """
        while True:
            flight, mine = self._board(artifact_id)
            if mine:
                try:
                    await asyncio.to_thread(self._fly, artifact_id, flight)
                finally:
                    self._call_off_if_not_begun(artifact_id, flight)
            answer = await asyncio.wrap_future(flight.landed)
            if not isinstance(answer, _CalledOff):
                return answer

    def admit(self, artifact: CompiledKernelArtifact) -> None:
        """Keep a kernel that was compiled here, as one that was just fetched."""
        with self._lock:
            if artifact.artifact_id not in self._entries:
                self._keep(artifact.artifact_id, artifact)

    def prewarm(self, artifact_ids: Iterable[str]) -> list[str]:
        """Load kernels before they are asked for.

        Returns:
            Those of ``artifact_ids`` that the source does not have.

        Raises:
            KernelLoadError: As :meth:`load_kernel_sync`; what was loaded before it stays.
        """
        return [wanted for wanted in artifact_ids if self.load_kernel_sync(wanted) is None]

    def pin(self, artifact_id: str) -> None:
        """Keep a kernel from being evicted until it was unpinned as often as it was pinned.

        It need not be in the cache yet.
        """
        with self._lock:
            self._pins[artifact_id] = self._pins.get(artifact_id, 0) + 1

    def pin_while(self, artifact_id: str, user: object) -> None:
        """Keep a kernel from being evicted as long as ``user`` lives.

        Args:
            artifact_id: The kernel; it need not be in the cache yet.
            user: What uses it; anything that can be referred to weakly.
        """
        with self._lock:
            for gone in [each for each, users in self._users.items() if not users]:
                del self._users[gone]
            self._users.setdefault(artifact_id, weakref.WeakSet()).add(user)

    def unpin(self, artifact_id: str) -> None:
        """Take one pin away.

        Raises:
            CacheError: There is none.
        """
        with self._lock:
            left = self._pins.get(artifact_id, 0) - 1
            if left < 0:
                msg = f"kernel {artifact_id} is not pinned; unpin once for every pin"
                raise CacheError(msg)
            if left:
                self._pins[artifact_id] = left
            else:
                del self._pins[artifact_id]

    def get_stats(self) -> CacheStats:
        """Return counts since the start, and what is held now."""
        with self._lock:
            num_hits = next(self._hits) - self._hits_read  # which counts as one
            self._hits_read += 1
            return {
                "hits": num_hits,
                "negative_hits": self._num_negative_hits,
                "misses": self._num_misses,
                "single_flight_waits": self._num_waits,
                "evictions": self._num_evictions,
                "oversize": self._num_oversize,
                "entries": len(self._entries),
                "max_entries": self.max_entries,
                "size_bytes": self._size_bytes,
                "max_size_bytes": self._max_size_bytes,
                "pinned": len(self._pins.keys() | {i for i, users in self._users.items() if users}),
            }

    def __copy__(self) -> KernelCache:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> KernelCache:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        build: Callable[..., KernelCache] = type(self)
        sizes = (self.max_cache_size_mb, self.max_entries)
        return functools.partial(build, *sizes, **self._settings()), ()

    def _settings(self) -> dict[str, object]:
        """Return the keyword arguments that make a cache like this one."""
        return {
            "source": self._source,
            "decode": self._decode,
            "clock": self._clock,
            "negative_ttl_s": self._negative_ttl_s,
        }

    def _board(self, artifact_id: str) -> tuple[_Flight, bool]:
        """Return the flight whose landing is the answer, and whether the caller has to fly it."""
        now = self._clock.now()
        with self._lock:
            if artifact_id in self._entries:
                self._entries.move_to_end(artifact_id)
                next(self._hits)
                return _Flight.landed_with(self._entries[artifact_id]), False
            if now < self._absent_until_s.get(artifact_id, now):
                self._num_negative_hits += 1
                return _Flight.landed_with(None), False
            flight = self._flights.get(artifact_id)
            if flight is not None:
                self._num_waits += 1
                return flight, False
            self._check_can_fetch(artifact_id)
            self._num_misses += 1
            flight = self._flights[artifact_id] = _Flight()
            return flight, True

    def _check_can_fetch(self, artifact_id: str) -> None:
        check_digest(artifact_id)
        if self._source is None:
            msg = (
                f"kernel {artifact_id} is not in the cache and there is no source to fetch it "
                "from; give one: esper.wrap(model, source=registry) or KernelCache(source=registry)"
            )
            raise KernelSourceUnavailable(msg)

    def _fly(self, artifact_id: str, flight: _Flight) -> None:
        """Fetch, and land the flight with whatever came of it."""
        with self._lock:
            if flight.is_claimed:
                return  # it was called off
            flight.is_claimed = True
        outcome: _Outcome = Done(_CALLED_OFF)
        try:
            outcome = attempt(functools.partial(self._fetch, artifact_id))
        finally:  # an interrupt lands the flight as called off, and one who waits takes over
            self._land(artifact_id, flight, outcome)

    def _fetch(self, artifact_id: str) -> CompiledKernelArtifact | None:
        began_s = time.perf_counter()  # the cache's own clock is for what it believes
        try:
            data = self._ask_source(artifact_id)
        except KernelNotFoundError:
            return None
        artifact = self._decode(data, artifact_id=artifact_id)
        told = KernelPrepared(
            update=0,
            time_s=0.0,
            what="fetch",
            artifact_id=artifact_id,
            took_s=time.perf_counter() - began_s,
        )
        announce(self._source, told)
        return artifact

    def _ask_source(self, artifact_id: str) -> bytes:
        assert self._source is not None
        return self._source.fetch(artifact_id)

    def _land(self, artifact_id: str, flight: _Flight, outcome: _Outcome) -> None:
        """End a flight: keep what came of it, and tell everyone who waits, even if that fails."""
        try:
            now = self._clock.now()
            with self._lock:
                self._flights.pop(artifact_id, None)
                if isinstance(outcome, Done):
                    self._remember(artifact_id, outcome.value, now)
        finally:
            with self._lock:
                if self._flights.get(artifact_id) is flight:  # there is no clock any more
                    del self._flights[artifact_id]
            if isinstance(outcome, Failed):
                flight.landed.set_exception(outcome.error)
            else:
                flight.landed.set_result(outcome.value)

    def _remember(
        self, artifact_id: str, answer: CompiledKernelArtifact | _CalledOff | None, now: float
    ) -> None:
        if answer is None:
            self._remember_absent(artifact_id, until_s=now + self._negative_ttl_s)
        elif not isinstance(answer, _CalledOff):
            self._keep(artifact_id, answer)

    def _call_off_if_not_begun(self, artifact_id: str, flight: _Flight) -> None:
        """Let those who wait choose another to fetch, where the thread never came to run."""
        with self._lock:
            if flight.is_claimed:
                return
            flight.is_claimed = True
            del self._flights[artifact_id]
        flight.landed.set_result(_CALLED_OFF)

    def _remember_absent(self, artifact_id: str, *, until_s: float) -> None:
        self._absent_until_s.pop(artifact_id, None)
        if len(self._absent_until_s) >= _MAX_NEGATIVE_ENTRIES:
            del self._absent_until_s[next(iter(self._absent_until_s))]
        self._absent_until_s[artifact_id] = until_s
        told = KernelEmbargoed(
            update=0,
            time_s=0.0,
            artifact_id=artifact_id,
            for_s=self._negative_ttl_s,
            reason="the source has none of this digest",
        )
        announce(self._source, told)

    def _keep(self, artifact_id: str, artifact: CompiledKernelArtifact) -> None:
        self._absent_until_s.pop(artifact_id, None)
        size_bytes = len(artifact.kernel_binary)
        victims = self._victims(size_bytes)
        if victims is None:
            self._num_oversize += 1
            return
        for victim in victims:
            self._drop(victim)
            self._num_evictions += 1
        self._entries[artifact_id] = artifact
        self._size_bytes += size_bytes

    def _drop(self, artifact_id: str) -> None:
        self._size_bytes -= len(self._entries.pop(artifact_id).kernel_binary)

    def _victims(self, size_bytes: int) -> list[str] | None:
        """Return what must go to make room; None if that cannot be."""
        bytes_over = self._size_bytes + size_bytes - self._max_size_bytes
        entries_over = len(self._entries) + 1 - self.max_entries
        victims: list[str] = []
        if bytes_over <= 0 and entries_over <= 0:
            return victims
        for candidate in self._eviction_order():
            if candidate not in self._pins and not self._users.get(candidate):
                victims.append(candidate)
                bytes_over -= len(self._entries[candidate].kernel_binary)
                entries_over -= 1
                if bytes_over <= 0 and entries_over <= 0:
                    return victims
        return None

    def _eviction_order(self) -> Iterable[str]:
        """Return the ids of all entries, the first to go first: the least recently used."""
        return self._by_use()

    def _by_use(self) -> list[str]:
        """Return the ids of all entries as they are, the least recently used first."""
        return list(self._entries)

    def _begin(self) -> None:
        """Begin without the fetches and the lock of threads that a fork has left behind."""
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._size_bytes = sum(len(entry.kernel_binary) for entry in self._entries.values())


class _CalledOff:
    """What a flight lands with that never fetched: whoever waits has to board again."""


_CALLED_OFF: Final = _CalledOff()
_Outcome = Done["CompiledKernelArtifact | _CalledOff | None"] | Failed


class _Flight:
    """One fetch: claimed by who fetches, or by who calls it off before that.

    Its future is running from the start, so that no waiter's cancellation can end it.
    """

    __slots__ = ("is_claimed", "landed")

    def __init__(self) -> None:
        self.is_claimed = False
        self.landed: Future[CompiledKernelArtifact | _CalledOff | None] = Future()
        self.landed.set_running_or_notify_cancel()

    @classmethod
    def landed_with(cls, answer: CompiledKernelArtifact | None) -> _Flight:
        flight = cls()
        flight.landed.set_result(answer)
        return flight
