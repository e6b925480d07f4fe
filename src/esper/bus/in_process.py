"""The bus inside one process: a publisher calls, every sink takes, none can hurt another."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from typing import TYPE_CHECKING

from esper.resilience.attempt import Failed, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink

_LOG = logging.getLogger(__name__)


class EventBus:
    """Hands every event to every sink, in the order in which they subscribed.

    A sink that raises is counted, logged, and costs neither the publisher nor the other sinks
    anything. Sinks run on the publisher's thread, outside the lock, so that a sink may
    subscribe, unsubscribe and publish. A bus is itself an :class:`EventSink`.

    Args:
        sinks: The first subscribers; those that leave again use :meth:`subscribe`.
    """

    def __init__(self, sinks: Iterable[EventSink] = ()) -> None:
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._sinks: dict[int, EventSink] = dict(zip(self._tickets, sinks))  # noqa: B905 - endless
        self._num_published = 0
        self._num_failures = 0

    @property
    def num_published(self) -> int:
        """Number of events published so far."""
        return self._num_published

    @property
    def num_failures(self) -> int:
        """Number of times that a sink raised so far."""
        return self._num_failures

    def publish(self, event: Event) -> None:
        """Hand one event to every sink that is subscribed now. Never raises an ``Exception``."""
        with self._lock:
            self._num_published += 1
            sinks = tuple(self._sinks.values())
        for sink in sinks:
            taken = attempt(functools.partial(sink.publish, event))
            if isinstance(taken, Failed):
                self._count_failure(sink, event, taken.error)

    def subscribe(self, sink: EventSink) -> Callable[[], None]:
        """Add a sink at the end.

        Returns:
            A function that takes this subscription away again; calling it twice does nothing.
        """
        with self._lock:
            ticket = next(self._tickets)
            self._sinks[ticket] = sink

        def unsubscribe() -> None:
            with self._lock:
                self._sinks.pop(ticket, None)

        return unsubscribe

    def _count_failure(self, sink: EventSink, event: Event, error: Exception) -> None:
        """Count an exception and log it with its traceback."""
        with self._lock:
            self._num_failures += 1
        msg = "%s failed on a %r event; the run goes on"
        _LOG.error(msg, type(sink).__name__, event.kind, exc_info=error)
