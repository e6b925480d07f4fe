"""What requests took, counted as they pass. Labels are of closed sets: none names a kernel."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from esper.contracts.ports import Clock

BOUNDS_S: Final = (0.01, 0.1, 1.0, 10.0)
"""Upper ends of the buckets that durations are counted in; the last one has none."""

NO_ROUTE: Final = "none"
"""Route of what was answered before one was found."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})


@final
class Meter:
    """Counts since the process began; written by the event loop alone.

    Attributes:
        requests: Answers by method, route template and status.
        buckets: Durations by route template: how many ended in each bucket.
        seconds: Sum of the durations by route template.
        received_bytes: Of bodies that came.
        sent_bytes: Of bodies that were sent.
    """

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, str], int] = defaultdict(int)
        self.buckets: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.received_bytes = 0
        self.sent_bytes = 0

    def count(self, method: str, route: str, status: int, duration_s: float) -> None:
        """Count one answer."""
        known = method if method in _METHODS else "other"
        self.requests[known, route, str(status)] += 1
        self.seconds[route] += duration_s
        buckets = self.buckets.setdefault(route, [0] * (len(BOUNDS_S) + 1))
        buckets[bisect_left(BOUNDS_S, duration_s)] += 1


@final
class MeteredApp:
    """An ASGI application whose answers are counted.

    Args:
        app: What answers.
        meter: What counts.
        clock: Measures how long answers take.
    """

    def __init__(self, app: ASGIApp, *, meter: Meter, clock: Clock) -> None:
        self._app = app
        self._meter = meter
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count that."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        meter, start_s, status = self._meter, self._clock.now(), 500

        async def counted_receive() -> Message:
            message = await receive()
            meter.received_bytes += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            meter.sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            meter.count(scope["method"], route, status, self._clock.now() - start_s)
