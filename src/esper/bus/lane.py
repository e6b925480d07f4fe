"""The way to one sink: a bounded ring, and a thread that lives while something is in it."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from esper.resilience.attempt import Failed, attempt
from esper.resilience.forked import Forked

if TYPE_CHECKING:
    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink

_LOG = logging.getLogger(__name__)

_LEAST_TELLING: Final = (
    "seed_measured",
    "alpha_changed",
    "detected",
    "ranked",
    "kernel_prepared",
    "evaluated",
    "noted",
)
"""Kinds that are given up first where a ring is full, in this order; the others come last."""
_RANKS: Final = {kind: rank for rank, kind in enumerate(_LEAST_TELLING)}


class Deliveries(Forked):
    """What became of events, each counted once for every sink that it was for.

    ``put`` is at any time ``taken + dropped`` and what is in a ring or under way. An event at
    which a sink raised was taken, and is counted in ``failed`` as well. In a forked process it
    begins at 0.
    """

    def _begin(self) -> None:
        """Begin at 0."""
        self._lock = threading.Lock()
        self.put = self.taken = self.failed = self.dropped = 0

    @property
    def waiting(self) -> int:
        """Number of events that are in a ring or under way."""
        with self._lock:
            return self.put - self.taken - self.dropped

    def count(self, *, put: int = 0, taken: int = 0, failed: int = 0, dropped: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self.put += put
            self.taken += taken
            self.failed += failed
            self.dropped += dropped


class _Ring:
    """Events in their order, of which the oldest of the least telling kind is found at once."""

    def __init__(self) -> None:
        self._by_rank: tuple[deque[tuple[int, Event]], ...] = tuple(
            deque() for _ in range(len(_LEAST_TELLING) + 1)
        )

    def __len__(self) -> int:
        return sum(map(len, self._by_rank))

    def put(self, ticket: int, event: Event) -> None:
        """Keep an event, whose ticket is higher than all before."""
        self._by_rank[_RANKS.get(event.kind, len(_RANKS))].append((ticket, event))

    def take(self) -> tuple[int, Event]:
        """Return the oldest event, and its ticket; there has to be one."""
        oldest = min((kept for kept in self._by_rank if kept), key=lambda kept: kept[0][0])
        return oldest.popleft()

    def drop_one(self) -> None:
        """Give up the oldest of the least telling kind; there has to be one."""
        next(kept for kept in self._by_rank if kept).popleft()


class Lane(Forked):
    """Hands events to a sink in their order, beside its publisher.

    The publisher waits for a sink until it was once too slow, and never again: as long as a sink
    is quick, an event has been taken when it is published. A sink that never waits is called as it
    is; one that says it is slow is waited for by nobody. In a forked process the lane begins empty;
    what was in it is the parent's to deliver.

    Args:
        sink: Takes the events.
        deliveries: Counts what becomes of them.
        patience_s: Seconds that a publisher waits for it, at least 0.
        room: Events that are kept for it, at least 1.
    """

    def __init__(
        self, sink: EventSink, deliveries: Deliveries, *, patience_s: float, room: int
    ) -> None:
        self._sink = sink
        self._deliveries = deliveries
        self._patience_s = patience_s
        self._room = room
        self._is_prompt = getattr(sink, "never_waits", False) is True
        super().__init__()

    @property
    def name(self) -> str:
        """What the sink calls itself, or its class."""
        return str(getattr(self._sink, "name", "") or type(self._sink).__name__)

    def _begin(self) -> None:
        """Begin empty, and wait for the sink as if it had never been slow."""
        self._changed = threading.Condition()
        self._ring = _Ring()
        self._worker: threading.Thread | None = None
        self._interrupt: BaseException | None = None
        self._last_put = self._last_done = 0
        self._is_slow = getattr(self._sink, "is_slow", False) is True
        self._has_failed = False

    def put(self, event: Event) -> None:
        """Take an event for the sink; wait for that only as long as the sink may be quick.

        Raises:
            KeyboardInterrupt: The sink was interrupted while its publisher waited for it; as any
                other error that is no ``Exception``.
        """
        self._deliveries.count(put=1)
        if self._is_prompt:
            interrupt = self._deliver(event)
        else:
            with self._changed:
                ticket = self._keep(event)
                interrupt = self._interrupt if self._wait_for(ticket, event) else None
                self._interrupt = None
        if interrupt is not None:
            raise interrupt

    def _keep(self, event: Event) -> int:
        """Keep an event for the worker; return its ticket."""
        self._last_put += 1
        self._ring.put(self._last_put, event)
        if len(self._ring) > self._room:
            self._ring.drop_one()
            self._deliveries.count(dropped=1)
        self._see_to_a_worker()
        return self._last_put

    def _see_to_a_worker(self) -> None:
        """Start the worker where there is work; where no thread starts, the next event tries."""
        if self._worker is not None or not self._ring:
            return
        worker = threading.Thread(target=self._work, name="esper sink", daemon=True)
        with suppress(RuntimeError):  # too many threads, or a process that is at its end
            worker.start()
            self._worker = worker

    def _wait_for(self, ticket: int, event: Event) -> bool:
        """Wait until an event is delivered, where its sink may be quick; say whether it was."""
        if self._is_slow or self._worker in (None, threading.current_thread()):
            return False
        if self._changed.wait_for(lambda: self._last_done >= ticket, self._patience_s):
            return True
        self._is_slow = True
        msg = "%s took longer than %g s to take a %r event; from now on nothing waits for it"
        _LOG.warning(msg, self.name, self._patience_s, event.kind)
        return False

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is delivered; say whether it was, in time."""
        if self._worker is threading.current_thread():
            return True
        if self._is_prompt:
            return self._flush_sink(timeout_s)
        with self._changed:
            self._see_to_a_worker()
            is_idle = self._changed.wait_for(lambda: self._worker is None, timeout_s)
            return is_idle and not self._ring

    def _flush_sink(self, timeout_s: float) -> bool:
        """Let a sink that keeps events itself, as a bus does, catch up too."""
        flush = getattr(self._sink, "flush", None)
        if flush is None:
            return True
        done = attempt(lambda: flush(timeout_s))
        return not isinstance(done, Failed) and done.value is not False

    def _work(self) -> None:
        """Deliver until the ring is empty; the next event starts another thread."""
        while True:
            with self._changed:
                if not self._ring:
                    self._worker = None
                    self._changed.notify_all()
                    return
                ticket, event = self._ring.take()
            interrupt = self._deliver(event)
            with self._changed:
                self._last_done = ticket
                self._interrupt = interrupt
                self._changed.notify_all()

    def _deliver(self, event: Event) -> BaseException | None:
        try:
            taken = attempt(functools.partial(self._sink.publish, event))
        except BaseException as error:  # noqa: BLE001 - handed to the publisher, which raises it
            self._deliveries.count(taken=1)
            return error
        self._deliveries.count(taken=1, failed=int(isinstance(taken, Failed)))
        if isinstance(taken, Failed) and not self._has_failed:
            self._has_failed = True
            msg = "%s failed on a %r event; the run goes on, and later failures are only counted"
            _LOG.error(msg, self.name, event.kind, exc_info=taken.error)
        return None
