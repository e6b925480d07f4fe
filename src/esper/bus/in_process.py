"""The bus inside one process: a publisher calls, every sink takes, none can hurt another."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from typing import TYPE_CHECKING, ClassVar, Final

from esper.bus.lane import Deliveries, Lane
from esper.resilience.clock import MonotonicClock
from esper.resilience.forked import Forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink

_LOG = logging.getLogger(__name__)

PATIENCE_S: Final = 0.1
ROOM: Final = 1024


class EventBus(Forked):
    """Hands every event to every sink, in the order in which they subscribed.

    A sink that raises is counted, logged, and costs neither the publisher nor the other sinks
    anything; nor does one that is slow: each is called on a thread beside the publisher, which
    waits for it until that was once in vain, and keeps ``room`` events for it. Of more, the oldest
    of the least telling kind is dropped, and counted. A sink that has ``never_waits = True``
    promises to keep nobody waiting, and is called as it is; a bus is itself one. What such a sink
    keeps by itself, :meth:`flush` asks of its own ``flush(timeout_s)``, if it has one. Sinks may
    subscribe, unsubscribe and publish. A forked process has the same sinks and counts from 0; what
    waits for them in its parent is the parent's to deliver.

    Args:
        sinks: The first subscribers; those that leave again use :meth:`subscribe`.
        patience_s: Seconds that :meth:`publish` waits for a sink that was never slow, at least 0.
        room: Events that are kept for a sink that is behind, at least 1.
    """

    never_waits: ClassVar[bool] = True

    def __init__(
        self,
        sinks: Iterable[EventSink] = (),
        *,
        patience_s: float = PATIENCE_S,
        room: int = ROOM,
    ) -> None:
        super().__init__()
        self._tickets = itertools.count()
        self._deliveries = Deliveries()
        self._lane_to = functools.partial(
            Lane, deliveries=self._deliveries, patience_s=patience_s, room=room
        )
        self._lanes: dict[int, Lane] = {}
        for sink in sinks:
            self.subscribe(sink)

    def _begin(self) -> None:
        """Begin counting; the sinks stay."""
        self._lock = threading.Lock()
        self._num_published = 0

    @property
    def num_published(self) -> int:
        """Number of events published so far."""
        return self._num_published

    @property
    def num_failures(self) -> int:
        """Number of times that a sink raised so far."""
        return self._deliveries.failed

    @property
    def num_dropped(self) -> int:
        """Number of events that a sink did not get because it was too far behind."""
        return self._deliveries.dropped

    @property
    def num_waiting(self) -> int:
        """Number of events that sinks have yet to take."""
        return self._deliveries.waiting

    def publish(self, event: Event) -> None:
        """Hand one event to every sink that is subscribed now. Never raises an ``Exception``."""
        with self._lock:
            self._num_published += 1
            lanes = tuple(self._lanes.values())
        for lane in lanes:
            lane.put(event)

    def subscribe(self, sink: EventSink) -> Callable[[], None]:
        """Add a sink at the end.

        Returns:
            A function that takes this subscription away again; calling it twice does nothing. What
            was published before still reaches the sink.

        Raises:
            TypeError: It has no method ``publish``.
        """
        if not callable(getattr(sink, "publish", None)):
            msg = f"a sink has the method publish(); got {sink!r} (a {type(sink).__name__})"
            raise TypeError(msg)
        with self._lock:
            ticket = next(self._tickets)
            self._lanes[ticket] = self._lane_to(sink)

        def unsubscribe() -> None:
            with self._lock:
                self._lanes.pop(ticket, None)

        return unsubscribe

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until the sinks have what was published, for so many seconds in all.

        Returns:
            Whether they have. One that has not is named in the log, and goes on at its own pace.
        """
        clock = MonotonicClock()
        until_s = clock.now() + timeout_s
        with self._lock:
            lanes = tuple(self._lanes.values())
        behind = [lane for lane in lanes if not lane.flush(max(0.0, until_s - clock.now()))]
        for lane in behind:
            _LOG.warning("%s has not taken every event, and is waited for no longer", lane.name)
        return not behind
