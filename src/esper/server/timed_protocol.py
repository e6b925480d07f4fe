"""HTTP/1.1 whose headers come in time: who connects and says nothing holds no place for long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

_TOO_LATE: Final = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@final
class TimedProtocol(H11Protocol):
    """uvicorn's protocol, and a deadline for what comes before a request's body.

    uvicorn ends a connection that is idle behind a request, and waits for a first one, or for the
    rest of its headers, without end. It has no hook there but the protocol's own methods.

    Args:
        headers_s: Seconds from a connection, or from the first byte of a further request on it,
            until all headers are there; above 0.
        arguments: As uvicorn gives them.
    """

    def __init__(self, *, headers_s: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._headers_s = headers_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._keep_time()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the wait is over where they end the headers."""
        super().data_received(data)
        self._keep_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop()
        super().connection_lost(exc)

    def _keep_time(self) -> None:
        is_waiting = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not is_waiting:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._headers_s, self._end)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.write(_TOO_LATE)
            self.transport.close()
