"""HTTP with one deadline for a whole request, up to the last byte of its answer.

Clients usually limit each wait by itself, so that a server which sends a byte now and then keeps
them for ever. Here each wait gets what is left. A request may say how fast its answer has to come:
then every byte that has come gives it the time which it may take, and nothing else does.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, Final, final

import httpcore2
import httpx2

from esper.resilience.clock import MonotonicClock

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator

    from esper.contracts.ports import Clock

_TIMED: Final = ("connect", "read", "write")
"""The waits that end at the deadline; the pool's own wait comes first and may take all of it."""
SLOWEST: Final = "slowest_bytes_per_s"
"""Extension of a request: how fast its answer has to come, bytes a second on average."""


@final
class TimedTransport(httpx2.BaseTransport):
    """Takes a request's timeout as the time for all of it; goes through no proxy.

    The smallest of the request's timeouts counts from when it is sent. Looking up a host's name
    is left to the system's resolver and its own limits.

    Args:
        verify: What certificates of https are checked against; if None, what the machine trusts,
            found at the first such connection.
        clock: Says how much of the time is left.
    """

    def __init__(self, *, verify: ssl.SSLContext | None = None, clock: Clock | None = None) -> None:
        self._clock = MonotonicClock() if clock is None else clock
        self._pool = httpcore2.ConnectionPool(
            ssl_context=verify,
            network_backend=_DeadlineBackend(self._clock),
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; its answer's stream stops at the same deadline.

        Raises:
            httpx2.TransportError: There was no answer, or not in time.
        """
        timeouts = self._timeouts(request)
        sent = httpcore2.Request(
            method=request.method,
            url=str(request.url),
            headers=request.headers.raw,
            content=request.stream,
            extensions={**request.extensions, "timeout": timeouts},
        )
        with _translated():
            answer = self._pool.handle_request(sent)
        return httpx2.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer, timeouts.get("read"), request.extensions.get(SLOWEST)),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()

    def _timeouts(self, request: httpx2.Request) -> dict[str, Any]:
        """Return the pool's wait in seconds, and for the others when all of it has to be over."""
        asked = request.extensions.get("timeout", {}).values()
        limits_s = [seconds for seconds in asked if seconds is not None]
        if not limits_s:
            return {}
        until = _Until(self._clock.now() + min(limits_s))
        return {"pool": min(limits_s), **dict.fromkeys(_TIMED, until)}


@final
class _Until:
    """When a request has to be over.

    Attributes:
        at_s: A reading of the clock.
    """

    __slots__ = ("at_s",)

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s


@final
class _Body(httpx2.SyncByteStream):
    """An answer's bytes, with httpx2's errors; what comes may give it time."""

    def __init__(
        self, answer: httpcore2.Response, until: _Until | None, slowest_bytes_per_s: float | None
    ) -> None:
        self._answer = answer
        self._until = until
        self._slowest_bytes_per_s = slowest_bytes_per_s

    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            for data in self._answer.iter_stream():
                if self._until is not None and self._slowest_bytes_per_s is not None:
                    self._until.at_s += len(data) / self._slowest_bytes_per_s
                yield data

    def close(self) -> None:
        with _translated():
            self._answer.close()


@final
class _DeadlineBackend(httpcore2.NetworkBackend):
    """Opens connections. A ``timeout`` is an ``_Until``, here and in the streams."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._inner = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Try a host's addresses in turn; all of them together have the time that is left."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            msg = f"no address of {host!r} was found: {error}"
            raise httpcore2.ConnectError(msg) from error
        failure: httpcore2.ConnectError | None = None
        for *_, address in found:
            left_s = _left_s(self._clock, timeout, httpcore2.ConnectTimeout)
            try:
                stream = self._inner.connect_tcp(
                    str(address[0]), port, left_s, local_address, socket_options
                )
            except httpcore2.ConnectError as error:
                failure = error
            else:
                return _DeadlineStream(stream, self._clock)
        raise failure or httpcore2.ConnectError(f"{host!r} has no address")


@final
class _DeadlineStream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left_s = _left_s(self._clock, timeout, httpcore2.ReadTimeout)
        return self._inner.read(max_bytes, left_s)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        left_s = _left_s(self._clock, timeout, httpcore2.WriteTimeout)
        self._inner.write(buffer, left_s)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left_s = _left_s(self._clock, timeout, httpcore2.ConnectTimeout)
        stream = self._inner.start_tls(ssl_context, server_hostname, left_s)
        return _DeadlineStream(stream, self._clock)

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)


def _left_s(clock: Clock, until: object, failure: type[httpcore2.TimeoutException]) -> float | None:
    """Return the seconds that are left; None for no limit.

    Raises:
        TimeoutException: There are none, as ``failure``.
    """
    if until is None:
        return None
    assert isinstance(until, _Until), "the library hands on what it was given"
    left_s = until.at_s - clock.now()
    if left_s <= 0:
        raise failure("the time for this request is over")
    return left_s


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise httpcore2's errors as those of httpx2, which have the same names."""
    try:
        yield
    except (
        httpcore2.TimeoutException,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.UnsupportedProtocol,
    ) as error:
        translated: type[httpx2.TransportError] = getattr(httpx2, type(error).__name__)
        raise translated(str(error)) from error
