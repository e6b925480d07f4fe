"""The kernel cache that lives with a failing source and with failing kernels."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.errors import CacheError, KernelCorruptError, KernelRefusedError
from esper.contracts.events import KernelQuarantined
from esper.fetching.breaker_source import SourceBehindBreaker, behind_breaker
from esper.fetching.incidents import announce
from esper.fetching.kernel_cache import CacheStats, KernelCache

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.ports import KernelSource
    from esper.fetching.kernel_cache import CacheOptions
    from esper.resilience.circuit_breaker import CircuitBreaker
    from esper.resilience.retry import RetryBudget

_MAX_RECORDS: Final = 4096

_logger = logging.getLogger(__name__)


class EnhancedCacheStats(CacheStats):
    """What :meth:`EnhancedKernelCache.get_stats` returns.

    The last four belong to the source, and are shared by the caches that ask it; they are None
    without a source.

    Attributes:
        hit_rate: Hits over loads, in [0, 1]; None before the first load.
        fetches: Fetches that brought a kernel.
        mean_fetch_s: What such a fetch took on average, in seconds; None before the first.
        max_fetch_s: What the longest of them took, in seconds; None before the first.
        recorded_successes: How often kernels were said to have done their work.
        recorded_failures: How often they were said to have failed.
        quarantined: Kernels in quarantine now.
        breaker_state: ``"closed"``, ``"open"`` or ``"half_open"``.
        breaker_openings: How often the breaker opened.
        breaker_rejected: Fetches that were not made because it was open.
        source_failures: Fetches that failed.
    """

    hit_rate: float | None
    fetches: int
    mean_fetch_s: float | None
    max_fetch_s: float | None
    recorded_successes: int
    recorded_failures: int
    quarantined: int
    breaker_state: str | None
    breaker_openings: int | None
    breaker_rejected: int | None
    source_failures: int | None


class EnhancedKernelCache(KernelCache):
    """A kernel cache with a circuit breaker, eviction by worth, and a quarantine.

    - While the source's breaker is open, what is held is served as ever: a digest names the same
      bytes for ever, so nothing goes stale. What is not held raises ``KernelSourceSuspended``
      at once. "Not found" is believed for its time and not longer: after it, with the breaker
      open, the load raises, since None means that the source answered.
    - The entry of the least worth goes first (:meth:`worth`).
    - A kernel that failed ``quarantine_after`` times in a row is dropped and not served again
      until it is released.

    A pickled one arrives empty, with nothing in quarantine; one from :func:`shared_cache` arrives
    as the shared one of its process.

    Args:
        args: As for :class:`KernelCache`.
        breaker: Counts the failures of the source; without one it is the one breaker of that
            source in this process.
        quarantine_after: Failures in a row, at least 1.
        settings: As there.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *args: Any,
        breaker: CircuitBreaker | None = None,
        quarantine_after: int = 3,
        **settings: Unpack[CacheOptions],
    ) -> None:
        super().__init__(*args, **settings)
        if quarantine_after < 1:
            msg = f"quarantine_after is at least 1, found {quarantine_after}"
            raise ValueError(msg)
        self._own_breaker = breaker
        self._quarantine_after = quarantine_after
        self._breaker_source = _behind(self._source, breaker)
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._quarantine: dict[str, str] = {}
        self._num_fetches = 0
        self._fetching_s = 0.0
        self._longest_fetch_s = 0.0
        self._num_successes = 0
        self._num_failures = 0

    @property
    def breaker(self) -> CircuitBreaker | None:
        """The breaker of the source; None where there is no source."""
        return None if self._breaker_source is None else self._breaker_source.breaker

    @property
    def retry_budget(self) -> RetryBudget | None:
        """What bounds the retries of all who ask the source; None where there is no source."""
        return None if self._breaker_source is None else self._breaker_source.retry_budget

    async def prewarm_async(
        self, artifact_ids: Iterable[str], *, num_at_once: int = 8
    ) -> list[str]:
        """Load kernels before they are asked for, several at once; else as :meth:`prewarm`.

        Args:
            artifact_ids: What is to be loaded.
            num_at_once: Fetches under way at a time, at least 1.
        """
        places = asyncio.Semaphore(num_at_once)

        async def load(artifact_id: str) -> CompiledKernelArtifact | None:
            async with places:
                return await self.load_kernel(artifact_id)

        wanted = list(artifact_ids)
        found = await asyncio.gather(*map(load, wanted))
        return [each for each, artifact in zip(wanted, found, strict=True) if artifact is None]

    def record_success(self, artifact_id: str) -> None:
        """Count that a kernel did its work; it ends a run of failures."""
        with self._lock:
            self._num_successes += 1
            record = self._record(artifact_id)
            record.num_successes += 1
            record.failures_in_a_row = 0

    def record_failure(self, artifact_id: str, reason: str) -> bool:
        """Count that a kernel failed; the last of too many in a row puts it in quarantine.

        Args:
            artifact_id: The kernel.
            reason: What went wrong, for people.

        Returns:
            Whether it is in quarantine now.
        """
        with self._lock:
            self._num_failures += 1
            record = self._record(artifact_id)
            record.num_failures += 1
            record.failures_in_a_row += 1
            is_news = (
                record.failures_in_a_row >= self._quarantine_after
                and artifact_id not in self._quarantine
            )
            if is_news:
                self._quarantine[artifact_id] = reason
                if artifact_id in self._entries:
                    self._drop(artifact_id)
            is_quarantined = artifact_id in self._quarantine
        if is_news:
            _logger.warning("kernel %s is in quarantine: %s", artifact_id, reason)
            self._announce(artifact_id, reason=reason)
        return is_quarantined

    def quarantined(self) -> dict[str, str]:
        """Return the reason of the last failure of every kernel in quarantine, by id."""
        with self._lock:
            return dict(self._quarantine)

    def release(self, artifact_id: str) -> None:
        """Let a kernel out of quarantine and forget its failures.

        Raises:
            CacheError: It is not in quarantine.
        """
        with self._lock:
            if artifact_id not in self._quarantine:
                msg = f"kernel {artifact_id} is not in quarantine; quarantined() lists what is"
                raise CacheError(msg)
            del self._quarantine[artifact_id]
            self._records.pop(artifact_id, None)
        self._announce(artifact_id, released=True)

    def _announce(self, artifact_id: str, *, released: bool = False, reason: str = "") -> None:
        told = KernelQuarantined(
            update=0, time_s=0.0, artifact_id=artifact_id, released=released, reason=reason
        )
        announce(self._source, told)

    def worth(self, artifact_id: str) -> float:
        """Return what keeping an entry is worth; the least goes first.

        ``health * log2(2 + c / 2^p) / (1 + r)``, with c what it took to fetch, in milliseconds, p
        the number of evictions in a row that took one that was used later and left this one, r
        the number of entries that were used later, and ``health = (s + 1) / (s + f + 1)`` after s
        successes and f failures. So it falls with idleness and failures and grows with the cost,
        and being dear saves nobody for ever.

        Raises:
            KeyError: It is not in the cache.
        """
        with self._lock:
            if artifact_id not in self._entries:
                raise KeyError(artifact_id)
            num_used_later = self._by_use()[::-1].index(artifact_id)
            return self._worth(artifact_id, num_used_later)

    def get_stats(self) -> EnhancedCacheStats:
        """Return the counts of :meth:`KernelCache.get_stats`, and more beside them."""
        stats = super().get_stats()
        breaker = None if self.breaker is None else self.breaker.stats()
        served = stats["hits"] + stats["negative_hits"]
        num_loads = served + stats["misses"] + stats["single_flight_waits"]
        with self._lock:
            return {
                **stats,
                "hit_rate": stats["hits"] / num_loads if num_loads else None,
                "fetches": self._num_fetches,
                "mean_fetch_s": self._fetching_s / self._num_fetches if self._num_fetches else None,
                "max_fetch_s": self._longest_fetch_s if self._num_fetches else None,
                "recorded_successes": self._num_successes,
                "recorded_failures": self._num_failures,
                "quarantined": len(self._quarantine),
                "breaker_state": None if breaker is None else str(breaker.state),
                "breaker_openings": None if breaker is None else breaker.openings,
                "breaker_rejected": None if breaker is None else breaker.rejected,
                "source_failures": None if breaker is None else breaker.failed,
            }

    def __reduce__(self) -> tuple[object, ...]:
        if _SHARED.get(id(self._source)) is self:
            return shared_cache, (self._source,)
        return super().__reduce__()

    def _settings(self) -> dict[str, object]:
        own: dict[str, object] = {
            "breaker": self._own_breaker,
            "quarantine_after": self._quarantine_after,
        }
        return super()._settings() | own

    def _check_can_fetch(self, artifact_id: str) -> None:
        super()._check_can_fetch(artifact_id)
        if artifact_id in self._quarantine:
            msg = (
                f"kernel {artifact_id} failed {self._quarantine_after} times in a row and is in "
                f"quarantine: {self._quarantine[artifact_id]}; release it with cache.release(id)"
            )
            raise KernelRefusedError(msg, check="quarantine")

    def _ask_source(self, artifact_id: str) -> bytes:
        assert self._breaker_source is not None
        return self._breaker_source.fetch(artifact_id)

    def _fetch(self, artifact_id: str) -> CompiledKernelArtifact | None:
        began_s = self._clock.now()
        try:
            artifact = super()._fetch(artifact_id)
        except KernelCorruptError as error:
            self.record_failure(artifact_id, str(error))
            raise
        if artifact is not None:
            self._count_fetch(artifact_id, self._clock.now() - began_s)
        return artifact

    def _count_fetch(self, artifact_id: str, took_s: float) -> None:
        with self._lock:
            self._record(artifact_id).cost_s = took_s
            self._num_fetches += 1
            self._fetching_s += took_s
            self._longest_fetch_s = max(self._longest_fetch_s, took_s)

    def _keep(self, artifact_id: str, artifact: CompiledKernelArtifact) -> None:
        if artifact_id not in self._quarantine:  # it may have got there while it was fetched
            super()._keep(artifact_id, artifact)

    def _victims(self, size_bytes: int) -> list[str] | None:
        victims = super()._victims(size_bytes)
        if victims:
            by_use = self._by_use()
            place_of_last = max(map(by_use.index, victims))
            for place, each in enumerate(by_use):
                record = self._record(each)
                record.num_passes = record.num_passes + 1 if place < place_of_last else 0
        return victims

    def _eviction_order(self) -> Iterable[str]:
        by_use = self._by_use()
        last = len(by_use) - 1
        worths = {each: self._worth(each, last - place) for place, each in enumerate(by_use)}
        return sorted(worths, key=worths.__getitem__)

    def _worth(self, artifact_id: str, num_used_later: int) -> float:
        record = self._records.get(artifact_id, _NOTHING_KNOWN)
        cost_ms = math.ldexp(1e3 * record.cost_s, -record.num_passes)
        return record.health * math.log2(2.0 + cost_ms) / (1 + num_used_later)

    def _record(self, artifact_id: str) -> _Record:
        """Return a kernel's record; those of kernels that are not held are of a limited number."""
        record = self._records.get(artifact_id)
        if record is None:
            if len(self._records) >= _MAX_RECORDS + len(self._entries):
                del self._records[next(i for i in self._records if i not in self._entries)]
            record = self._records[artifact_id] = _Record()
        return record


class _Record:
    """What is known of one kernel.

    Attributes:
        cost_s: What its latest fetch took, in seconds.
        num_passes: How many evictions in a row have passed it over.
        num_successes: How often it did its work.
        num_failures: How often it did not.
        failures_in_a_row: How often since it last did.
    """

    __slots__ = ("cost_s", "failures_in_a_row", "num_failures", "num_passes", "num_successes")

    def __init__(self) -> None:
        self.cost_s = 0.0
        self.num_passes = 0
        self.num_successes = 0
        self.num_failures = 0
        self.failures_in_a_row = 0

    @property
    def health(self) -> float:
        return (self.num_successes + 1) / (self.num_successes + self.num_failures + 1)


_NOTHING_KNOWN: Final = _Record()


def shared_cache(source: KernelSource | None) -> EnhancedKernelCache:
    """Return this process's cache for a source; the same object while anyone holds it."""
    with _SHARED_LOCK:
        cache = _SHARED.get(id(source))
        if cache is None:
            cache = _SHARED[id(source)] = EnhancedKernelCache(source=source)
        return cache


def _behind(
    source: KernelSource | None, breaker: CircuitBreaker | None
) -> SourceBehindBreaker | None:
    if source is None:
        return None
    return behind_breaker(source) if breaker is None else SourceBehindBreaker(source, breaker)


_SHARED_LOCK: Final = threading.Lock()
_SHARED: Final[weakref.WeakValueDictionary[int, EnhancedKernelCache]] = (
    weakref.WeakValueDictionary()
)
"""By the identity of the source, which its cache keeps alive."""
