"""Events on Redis (6.2 or newer) or Valkey, a stream for each run: what is written, and followed.

A publisher never waits. While the server is away, events are kept as an
:class:`~esper.bus.in_process.EventBus` keeps them, within bounds and counted; what was perhaps
written is written again, so that an event may be there twice, under one id. Needs the extra
``redis``.
"""

from __future__ import annotations

import logging
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Final, Self, cast, final

from esper.bus.lane import Deliveries, Lane
from esper.contracts.errors import BusUnavailableError, EsperError
from esper.contracts.events import RunEnded, event_from_json, event_to_json
from esper.resilience.clock import MonotonicClock, wall_time_s
from esper.resilience.forked import Forked
from esper.resilience.retry import JITTER, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from redis import Redis

    from esper.contracts.events import Event

_LOG = logging.getLogger(__name__)

RUNS: Final = "esper:runs"
"""A sorted set: the ids of runs, by the time at which they began."""
ANSWER_S: Final = 0.5
"""Seconds within which the server has to connect and to answer."""
CLOSING_S: Final = 2.0
"""Seconds that the end of a run gives the events that are left."""
ROOM: Final = 4_096
KEPT: Final = 10_000
"""Events of a run that are kept, whoever has read them; of more those that every group has."""
TRIM_EVERY: Final = 500
_PATIENCE: Final = RetryPolicy(base_delay_s=0.1, max_delay_s=2.0)
_ADDRESS: Final = re.compile(
    r"(?P<scheme>[a-z]+)://(?:[^/?#]*@)?"
    r"(?P<place>(?:[^:/@?#\[\]]+|\[[0-9A-Fa-f:.]+\])?(?::[0-9]+)?(?:/[^@?#]*)?)(?:\?[^@#]*)?"
)
_FOR_NOW: Final = re.compile("(?:^|caused error: )(?:MISCONF|NOREPLICAS) ")
"""How a server begins that refuses for the moment, as one whose disk is full does."""


def stream_of(run_id: str) -> str:
    """Return the key of a run's stream."""
    return f"esper:run:{run_id}"


def connect(url: str, *, wait_s: float = 0.0) -> Redis:
    """Return a client that waits for no answer longer than it has to, and asks once.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py takes it.
        wait_s: Seconds that a call may be told to block in the server.

    Raises:
        EsperError: The extra ``redis`` is not installed.
        ValueError: The address is none of these.
    """
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ModuleNotFoundError as error:
        msg = (
            "events on Redis need the extra redis; install it with: pip install esper-morph[redis]"
        )
        raise EsperError(msg) from error
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",
            protocol=2,
            socket_timeout=ANSWER_S + wait_s,
            socket_connect_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:
        msg = (
            f"the bus is at redis://, rediss:// or unix://, found {shown(url)!r}; "
            "a password with one of :/?#@ in it is percent-encoded"
        )
        raise ValueError(msg) from None  # the client's own words may have a part of a password


def shown(url: str) -> str:
    """Return an address for people: without user, password and query.

    Of one in which it is not clear where a password ends, nothing is shown but its kind.
    """
    found = _ADDRESS.fullmatch(url)
    if found is not None:
        return f"{found['scheme']}://{found['place']}"
    scheme, mark, _ = url.partition("://")
    return f"{scheme}://..." if mark and scheme.isalpha() else "..."


class RedisSink:
    """Writes every event of a run to its stream, on a thread of its own.

    Args:
        url: Address of the server; see :func:`connect`.
        room: Events that are kept while it is away, at least 1; of more the oldest of the least
            telling kind are dropped, and counted.

    Raises:
        EsperError: The extra ``redis`` is not installed.
        ValueError: The address is none.
    """

    never_waits: ClassVar[bool] = True

    def __init__(self, url: str, *, room: int = ROOM) -> None:
        self._deliveries = Deliveries()
        self._writer = _Writer(url)
        self._lane = Lane(self._writer, self._deliveries, patience_s=0.0, room=room)
        self._is_closed = False
        self._in_vain_s = 0.0

    @property
    def num_dropped(self) -> int:
        """Number of events that did not reach the server."""
        deliveries = self._deliveries
        return deliveries.dropped + deliveries.failed + self._writer.num_given_up

    @property
    def num_waiting(self) -> int:
        """Number of events that are still to be written."""
        return self._deliveries.waiting

    def publish(self, event: Event) -> None:
        """Keep an event, to be written; never waits, never raises."""
        self._lane.put(event)

    def flush(self, timeout_s: float = CLOSING_S) -> bool:
        """Wait until everything is written, for so many seconds but two at most; say whether it is.

        Of what was waited in vain, :meth:`close` waits no second time.
        """
        clock = MonotonicClock()
        begun_s = clock.now()
        left_s = max(0.0, CLOSING_S - self._in_vain_s)
        is_whole = self._lane.flush(max(0.0, min(timeout_s, left_s)))
        self._in_vain_s = 0.0 if is_whole else self._in_vain_s + clock.now() - begun_s
        return is_whole

    def close(self, timeout_s: float = CLOSING_S) -> None:
        """Give the events that are left so many seconds; what is left then is given up.

        A sink that is closed writes no more: what comes later is counted as dropped.
        """
        if self._is_closed:
            return
        self._is_closed = True
        timeout_s = max(0.0, timeout_s - self._in_vain_s)
        clock = MonotonicClock()
        until_s = clock.now() + timeout_s
        is_whole = self._lane.flush(max(0.0, timeout_s - 2 * ANSWER_S))
        self._writer.give_up()
        is_whole = self._lane.flush(max(0.0, until_s - clock.now())) and is_whole
        self._writer.close()
        lost = self.num_dropped + self.num_waiting
        if lost or not is_whole:
            level = logging.INFO if self._writer.is_away else logging.WARNING  # that was told
            _LOG.log(level, "%d events did not reach %s", lost, self._writer.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@final
class _Writer(Forked):
    """Writes one event after the other, each until the server has it."""

    is_slow: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._url, self.name = url, f"the bus at {shown(url)}"
        self._has_refused = self._is_untrimmed = False
        super().__init__()

    def _begin(self) -> None:
        self._redis = connect(self._url)
        self._gives_up = threading.Event()
        self._num_written = self.num_given_up = 0
        self.is_away = self._is_closed = False

    def give_up(self) -> None:
        """Try no event more than once from now on."""
        self._gives_up.set()

    def close(self) -> None:
        """Try no event at all from now on."""
        self._is_closed = True

    def publish(self, event: Event) -> None:
        """Write an event, or count it as given up."""
        num_failures = 0
        while not self._is_closed:
            try:
                with told(self.name):
                    self._write(event)
            except BusUnavailableError as error:
                self._say(error)
                if not error.may_pass or self._gives_up.is_set():
                    break
                longest_s = _PATIENCE.longest_delay_s(num_failures)
                num_failures += 1
                self._gives_up.wait(JITTER.uniform(0.0, longest_s))
            else:
                self.is_away = False
                self._trim_now_and_then(event.run_id)
                return
        self.num_given_up += 1

    def _write(self, event: Event) -> None:
        """Write an event, and its run where a server that began anew may not know it."""
        text = event_to_json(event)
        calls = self._redis.pipeline(transaction=False)
        calls.zadd(RUNS, {event.run_id: wall_time_s()}, nx=True)
        calls.xadd(stream_of(event.run_id), {"id": event.id, "event": text})
        calls.execute()
        self._num_written += 1

    def _trim_now_and_then(self, run_id: str) -> None:
        """Trim after so many events; a server that refuses has them all the same."""
        if self._num_written % TRIM_EVERY:
            return
        try:
            with told(self.name):
                trim(self._redis, run_id)
        except BusUnavailableError as error:
            if not (error.may_pass or self._is_untrimmed):
                self._is_untrimmed = True
                _LOG.warning("%s; events are written, and none is removed", error)

    def _say(self, error: BusUnavailableError) -> None:
        """Say once for each outage that the server is away, and once at all that it refuses."""
        if error.may_pass and not self.is_away:
            self.is_away = True
            msg = "%s; events are kept until it is back, as long as the run goes on"
            _LOG.warning(msg, error)
        elif not (error.may_pass or self._has_refused):
            self._has_refused = True
            _LOG.warning("%s; the run goes on, and later refusals are only counted", error)


def trim(redis: Redis, run_id: str, *, kept: int = KEPT) -> None:
    """Remove events of a run that every group is done with, where there are more than so many.

    A limit on the length alone would take what a slow group has not read, and say nothing.

    Args:
        redis: A client.
        run_id: The run.
        kept: Events of which none is removed, at least 0.
    """
    stream = stream_of(run_id)
    groups = cast("list[dict[str, str | int]]", redis.xinfo_groups(stream))
    if not groups or redis.xlen(stream) <= kept:
        return
    needed = []
    for group in groups:
        pending = cast("dict[str, str | None]", redis.xpending(stream, str(group["name"])))
        needed.append(str(pending["min"] or group["last-delivered-id"]))
    redis.xtrim(stream, minid=min(needed, key=_order), approximate=False)


def _order(entry: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split("-"))


def latest_run(url: str) -> str:
    """Return the id of the run that began last.

    Raises:
        BusUnavailableError: The server does not answer, or knows no run.
        EsperError, ValueError: See :func:`connect`.
    """
    with told(shown(url)):
        found = cast("list[str]", connect(url).zrevrange(RUNS, 0, 0))
    if not found:
        msg = f"no run has been told to {shown(url)} yet; start one with ESPER_BUS_URL set"
        raise BusUnavailableError(msg, may_pass=True)
    return found[0]


def follow(
    url: str, run_id: str, *, goes_on: Callable[[], bool], wait_s: float = 1.0
) -> Iterator[Event]:
    """Yield the events of a run from its first that is kept to its end, each once.

    A server that is away is waited for, and a warning says so, once for each time.

    Args:
        url: Address of the server.
        run_id: The run, which need not have begun.
        goes_on: Asked where there is nothing new; False ends it.
        wait_s: Seconds after which it is asked again.

    Raises:
        BusUnavailableError: The server refuses to answer, or does not and is waited for no longer.
        EsperError: See :func:`connect`.
        ValueError: So is this; or an entry is no event, or of a newer format.
    """
    redis, stream, last = connect(url, wait_s=wait_s), stream_of(run_id), "0"
    seen: set[str] = set()
    pause, is_away = threading.Event(), False
    while True:
        answer = None
        try:
            with told(shown(url)):
                answer = redis.xread({stream: last}, count=256, block=int(wait_s * 1_000))
            is_away = False
        except BusUnavailableError as error:
            if not (error.may_pass and goes_on()):
                raise
            if not is_away:
                _LOG.warning("%s; it is asked again until it does", error)
            is_away = True
            pause.wait(ANSWER_S)
            continue
        entries = entries_of(answer)
        for entry, fields in entries:
            last = entry
            event = event_of(entry, fields)
            if event.id in seen:
                continue
            seen.add(event.id)
            yield event
            if isinstance(event, RunEnded):
                return
        if not entries and not goes_on():
            return


def entries_of(answer: object) -> list[tuple[str, dict[str, str]]]:
    """Return the entries of an answer on one stream, those that are gone left out."""
    if not answer:
        return []
    ((_, entries),) = cast("list[tuple[str, list[tuple[str, dict[str, str]]]]]", answer)
    return [(entry, fields) for entry, fields in entries if fields]


def event_of(entry: str, fields: Mapping[str, str]) -> Event:
    """Return the event that an entry has.

    Raises:
        ValueError: It has none, or one of a newer format; the message names the entry.
    """
    try:
        return event_from_json(fields.get("event", ""))
    except ValueError as error:
        msg = f"the entry {entry} is no event that can be read here: {error}"
        raise ValueError(msg) from error


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turn errors of the client into ours, which say where it happened.

    Raises:
        BusUnavailableError: The server does not answer, or refuses to.
    """
    import redis.exceptions as of_redis

    passing = (
        of_redis.BusyLoadingError,
        of_redis.ClusterDownError,
        of_redis.OutOfMemoryError,
        of_redis.ReadOnlyError,
        of_redis.TryAgainError,
    )
    try:
        yield
    except passing as error:
        msg = f"{where} cannot take it now: {error}"
        raise BusUnavailableError(msg, may_pass=True) from error
    except (of_redis.ResponseError, of_redis.AuthenticationError) as error:
        may_pass = _FOR_NOW.search(str(error)) is not None
        refuses = "refuses, and has to be Redis 6.2 or newer, or Valkey"
        msg = f"{where} {'cannot take it now' if may_pass else refuses}: {error}"
        raise BusUnavailableError(msg, may_pass=may_pass) from error
    except (of_redis.RedisError, OSError) as error:
        msg = f"{where} does not answer: {error}"
        raise BusUnavailableError(msg, may_pass=True) from error
