"""The process around the application: how connections are taken, kept and ended."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import uvicorn

from esper.server.app import build_app
from esper.server.limits import Limits
from esper.server.timed_protocol import TimedProtocol

if TYPE_CHECKING:
    from esper.contracts.ports import Clock
    from esper.registry.stored import StoredRegistry

_MOST_CONNECTIONS: Final = 1_000
_BACKLOG: Final = 256
_HEADERS_BYTES: Final = 32_768


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; what is accepted there sends at once what it is given.

    Raises:
        OSError: The address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    # asyncio leaves this off for a socket that does not say that it is TCP, and then every answer
    # in two parts waits 40 ms for the reader's acknowledgement of the first
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def server_of(
    registry: StoredRegistry, *, limits: Limits | None = None, clock: Clock | None = None
) -> uvicorn.Server:
    """Return a server of a registry, to ``run`` on sockets that listen.

    Args:
        registry: What is served.
        limits: What is given to a request.
        clock: Measures how long bodies take; that of headers is the event loop's own.
    """
    limits = limits or Limits()
    config = uvicorn.Config(
        build_app(registry, limits=limits, clock=clock),
        http=partial(TimedProtocol, headers_s=limits.headers_s),  # type: ignore[arg-type] # called as a class is
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADERS_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)
