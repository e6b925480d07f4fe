"""A run on Redis or Valkey as it comes, for those who look now and then and never wait."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, final

from esper.bus.redis_streams import connect, entries_of, event_of, shown, stream_of, told
from esper.contracts.errors import BusUnavailableError

if TYPE_CHECKING:
    from esper.contracts.events import Event

_LOG = logging.getLogger(__name__)

_AT_ONCE: Final = 1_000


@final
class RunTail:
    """What a run's stream has had since the last look, each event once.

    A server that is away is asked again at the next look; a warning says so, once for each time.

    Args:
        url: Address of the server.
        run_id: The run, which need not have begun.

    Raises:
        EsperError: The extra ``redis`` is not installed.
        ValueError: The address is none of a Redis.

    Attributes:
        name: The run's id.
        num_begun: 1: a run that begins anew is another one here.
        heard: Seconds since 1970, by the server's clock, at which its latest event was written;
            None before the first.
        trouble: Why nothing comes for now; empty where the server answers.
    """

    def __init__(self, url: str, run_id: str) -> None:
        self._redis, self._where = connect(url), shown(url)
        self._stream, self._last = stream_of(run_id), "0"
        self._seen: set[str] = set()
        self._wrong: ValueError | None = None
        self.name, self.num_begun = run_id, 1
        self.heard: float | None = None
        self.trouble = ""

    def take(self) -> list[Event] | None:
        """Return the events that came since the last call; None where none did.

        Raises:
            BusUnavailableError: The server refuses to answer.
            ValueError: An entry is no event, or of a newer format; the message names it.
        """
        if self._wrong is not None:
            raise self._wrong
        found: list[Event] = []
        while (entries := self._entries()) and self._read(entries, found):
            pass
        return found or None

    def _entries(self) -> list[tuple[str, dict[str, str]]]:
        """Return what is behind the last entry, some at a time; nothing where nobody answers."""
        try:
            with told(self._where):
                answer = self._redis.xread({self._stream: self._last}, count=_AT_ONCE)
        except BusUnavailableError as error:
            if not error.may_pass:
                raise
            if not self.trouble:
                _LOG.warning("%s; it is asked again until it does", error)
            self.trouble = str(error)
            return []
        self.trouble = ""
        return entries_of(answer)

    def _read(self, entries: list[tuple[str, dict[str, str]]], found: list[Event]) -> bool:
        """Add the events of entries; False at one that is none, which the next look tells."""
        for entry, fields in entries:
            try:
                event = event_of(entry, fields)
            except ValueError as error:
                self._wrong = error
                return False
            self._last, self.heard = entry, int(entry.partition("-")[0]) / 1e3
            if event.id not in self._seen:
                self._seen.add(event.id)
                found.append(event)
        return True
