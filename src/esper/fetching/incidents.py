"""What goes wrong with the sources of kernels, as events, for those who keep a run's log.

Breakers, caches and retries announce it on whatever thread it happens; who listens takes it
between two steps.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.contracts.events import Event
    from esper.contracts.ports import KernelSource

ROOM: Final = 256
"""Events that are kept until they are taken; of more the oldest goes, and is counted."""

_lock: Final = threading.Lock()
_listening: Final[weakref.WeakSet[Incidents]] = weakref.WeakSet()


class Incidents:
    """What has gone wrong with some sources since it was last asked.

    Args:
        sources: Those that are listened to, for as long as this object lives.

    Attributes:
        kept: What was announced since the last :meth:`take`.
        num_lost: Events for which there was no room.
    """

    def __init__(self, sources: Iterable[KernelSource]) -> None:
        self._sources = list(sources)
        self.kept: deque[Event] = deque()
        self.num_lost = 0
        if self._sources:
            with _lock:
                _listening.add(self)

    def take(self) -> list[Event]:
        """Return what was announced since the last call, in order; no moment is in it."""
        if not self.kept:
            return []
        with _lock:
            taken = list(self.kept)
            self.kept.clear()
        return taken

    def hear(self, source: KernelSource | None, event: Event) -> None:
        """Keep an event of a source that is listened to; for :func:`announce`, under its lock."""
        if all(source is not each for each in self._sources):
            return
        if len(self.kept) == ROOM:
            self.kept.popleft()
            self.num_lost += 1
        self.kept.append(event)


def announce(source: KernelSource | None, event: Event) -> None:
    """Tell those who listen to a source what has happened. Never waits for them."""
    with _lock:
        for incidents in _listening:
            incidents.hear(source, event)
