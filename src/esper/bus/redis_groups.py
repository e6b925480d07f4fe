"""Who reads a run's events together: each event reaches one of a group, at least once.

Redis keeps what a reader was given until it says that it is done. Of one that has died others take
it over, and what none of them gets done goes to the dead letters. A stream may have an event twice,
under one id: what a group is done with it is not given again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast, final

from esper.bus.redis_streams import connect, entries_of, event_of, shown, stream_of, told

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.contracts.events import Event

DEADLY: Final = 5
"""Deliveries after which an event is a dead letter."""
DONE_S: Final = 7 * 86_400
"""Seconds for which a group remembers what it is done with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event that a reader was given, and has to say is done.

    Attributes:
        entry: Its place in the stream.
        event: What happened.
    """

    entry: str
    event: Event


@final
class GroupReader:
    """One reader of a group.

    Args:
        url: Address of the server; see :func:`esper.bus.redis_streams.connect`.
        run_id: The run, which need not have begun.
        group: Name of the group.
        reader: Name of this reader, which no other of the group has.
        idle_s: Seconds after which others take over what a reader says nothing of, above 0.
        deadly: Deliveries after which an event is a dead letter, at least 1.
        wait_s: Seconds that :meth:`take` waits where there is nothing new, at least 0.001.

    Raises:
        BusUnavailableError: The server does not answer, or refuses to.
        EsperError: The extra ``redis`` is not installed.
        ValueError: The address is none.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        *,
        group: str,
        reader: str,
        idle_s: float = 30.0,
        deadly: int = DEADLY,
        wait_s: float = 1.0,
    ) -> None:
        self._where, self._redis = shown(url), connect(url, wait_s=wait_s)
        self._stream, self._group, self._reader = stream_of(run_id), group, reader
        self._done_with = f"esper:done:{run_id}:{group}"
        self.dead_letters = f"esper:dead:{run_id}:{group}"
        self._idle_ms, self._deadly, self._wait_ms = int(idle_s * 1e3), deadly, int(wait_s * 1e3)
        with told(self._where):
            self._make_group()

    def take(self, most: int = 64) -> list[Delivery]:
        """Return what is this reader's to do now: first what others left, then what is new.

        What is no event, or of a newer format, is a dead letter at once. A server that has lost
        the group gets it again, and the group what is there.

        Args:
            most: Return no more, at least 1.

        Raises:
            BusUnavailableError: The server does not answer, or refuses to.
        """
        from redis.exceptions import ResponseError

        with told(self._where):
            try:
                return self._given(most)
            except ResponseError as error:
                if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                    raise
                self._make_group()
                return self._given(most)

    def done(self, deliveries: Iterable[Delivery]) -> None:
        """Say that events have been dealt with; none of the group gets them again.

        Raises:
            BusUnavailableError: The server does not answer, or refuses to.
        """
        for delivery in deliveries:
            with told(self._where):
                calls = self._redis.pipeline()
                calls.sadd(self._done_with, delivery.event.id)
                calls.expire(self._done_with, DONE_S)
                calls.xack(self._stream, self._group, delivery.entry)
                calls.execute()

    def _given(self, most: int) -> list[Delivery]:
        self._bury()
        claimed = self._redis.xautoclaim(
            self._stream, self._group, self._reader, self._idle_ms, count=most
        )
        entries = [
            entry
            for entry in cast("list[list[tuple[str, dict[str, str]]]]", claimed)[1]
            if entry[1]
        ]
        if not entries:
            answer = self._redis.xreadgroup(
                self._group, self._reader, {self._stream: ">"}, count=most, block=self._wait_ms
            )
            entries = entries_of(answer)
        return self._not_done(entries)

    def _make_group(self) -> None:
        from redis.exceptions import ResponseError

        try:
            self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _not_done(self, entries: list[tuple[str, dict[str, str]]]) -> list[Delivery]:
        """Return what the group has not done yet; what it has is acknowledged again."""
        found: dict[str, Delivery] = {}
        for entry, fields in entries:
            try:
                event = event_of(entry, fields)
            except ValueError as error:
                self._set_aside(entry, {**fields, "reason": str(error)})
                continue
            if event.id in found or self._redis.sismember(self._done_with, event.id):
                self._redis.xack(self._stream, self._group, entry)
                continue
            found[event.id] = Delivery(entry=entry, event=event)
        return list(found.values())

    def _bury(self) -> None:
        """Move what was delivered too often to the dead letters."""
        pending = self._redis.xpending_range(
            self._stream, self._group, "-", "+", 256, idle=self._idle_ms
        )
        for row in cast("list[dict[str, str | int]]", pending):
            if int(row["times_delivered"]) < self._deadly:
                continue
            entry = str(row["message_id"])
            found = cast(
                "list[tuple[str, dict[str, str]]]", self._redis.xrange(self._stream, entry, entry)
            )
            fields = found[0][1] if found else {}
            self._set_aside(entry, {**fields, "deliveries": str(row["times_delivered"])})

    def _set_aside(self, entry: str, letter: dict[str, str]) -> None:
        """Make a dead letter of an entry, whose group is done with it."""
        calls = self._redis.pipeline()
        calls.xadd(self.dead_letters, {"entry": entry} | letter)  # type: ignore[arg-type] # invariant
        calls.xack(self._stream, self._group, entry)
        calls.execute()
