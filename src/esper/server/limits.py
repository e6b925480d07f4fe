"""What one request may take: room, time, and a place among those that are served at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from starlette.exceptions import HTTPException

from esper.registry.upload import SLOWEST_BYTES_PER_S
from esper.resilience.clock import MonotonicClock
from esper.server.problems import RETRY_AFTER_S, problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from esper.contracts.ports import Clock

_DRAIN_BYTES: Final = 1 << 20
_DRAIN_S: Final = 1.0
_ALWAYS_ANSWERED: Final = ("/health", "/api/v1/health")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is given to requests.

    Attributes:
        requests: How many are served at once; more are told to come again.
        headers_s: Seconds that a connection may take for the headers of a request.
        document_bytes: Longest body that is no artifact.
        body_grace_s: Seconds that any body may take.
        body_bytes_per_s: How fast a body has to come on average after that.
    """

    requests: int = 64
    headers_s: float = 10.0
    document_bytes: int = 1 << 18
    body_grace_s: float = 20.0
    body_bytes_per_s: float = SLOWEST_BYTES_PER_S


@final
class LimitedApp:
    """An ASGI application within limits.

    Args:
        app: What answers.
        limits: What is given to a request.
        artifact_bytes: Longest artifact.
        clock: Measures how long a body takes.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, artifact_bytes: int, clock: Clock | None = None
    ) -> None:
        self._app = app
        self._limits = limits
        self._artifact_bytes = artifact_bytes
        self._clock = clock or MonotonicClock()
        self._num_served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say that there is no room."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
        elif self._num_served >= self._limits.requests:
            headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
            msg = f"{self._num_served} requests are being served; come again"
            await problem(429, msg, kind="overload", headers=headers)(scope, receive, send)
        else:
            self._num_served += 1
            try:
                await self._serve(scope, receive, send)
            finally:
                self._num_served -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_artifact = scope["method"] == "POST" and scope["path"] == "/api/v1/kernels"
        most = self._artifact_bytes if is_artifact else self._limits.document_bytes
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await self._drain(receive)
            msg = (
                f"a body of {length.decode(errors='replace'):.20} bytes; this registry takes {most}"
            )
            answer = problem(413, msg, kind="too-large", headers={"Connection": "close"})
            await answer(scope, receive, send)
        elif headers.get(b"content-encoding", b"identity").lower() != b"identity":
            answer = problem(415, "a body is sent as it is", headers={"Connection": "close"})
            await answer(scope, receive, send)
        else:
            await self._app(scope, self._watched(receive, most), send)

    async def _drain(self, receive: Receive) -> None:
        """Read on for a while: who is still sending when the connection closes sees no answer."""
        size_bytes, more = 0, True
        try:
            async with asyncio.timeout(_DRAIN_S):
                while more and size_bytes < _DRAIN_BYTES:
                    message = await receive()
                    size_bytes += len(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            pass

    def _watched(self, receive: Receive, most: int) -> Receive:
        """Return ``receive`` for a body that has to come in time and to fit."""
        start_s, size_bytes, is_whole = self._clock.now(), 0, False

        async def watched() -> Message:
            nonlocal size_bytes, is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            allowed_s = self._limits.body_grace_s + size_bytes / self._limits.body_bytes_per_s
            left_s = start_s + allowed_s - self._clock.now()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    message = await receive()
            except TimeoutError as error:
                msg = f"{size_bytes} bytes came in {allowed_s:.3g} s; send faster"
                raise HTTPException(408, msg, {"Connection": "close"}) from error
            size_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size_bytes > most:
                msg = f"a body here has at most {most} bytes"
                raise HTTPException(413, msg, {"Connection": "close"})
            return message

        return watched
