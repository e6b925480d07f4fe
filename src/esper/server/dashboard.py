"""The live page over HTTP: the page, what changes on it, and what it was."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, Annotated, Final

import uvicorn
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from esper.observability.live_page import LOOKS_EVERY_S
from esper.observability.time_page import POLICY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from esper.observability.live_page import LivePage, Message

_MOST_CONNECTIONS: Final = 200
_SIGN_OF_LIFE_S: Final = 15.0
"""After so long without news a stream says that it is there, and finds out who has gone."""
_HEADERS: Final = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_READS_AGAIN: Final = "retry: 1000\n\n"


def build_dashboard(
    page: LivePage, *, goes_on: Callable[[], bool] = lambda: True, host: str = "127.0.0.1"
) -> FastAPI:
    """Return the application that serves a live page.

    Args:
        page: The page.
        goes_on: Asked by every stream; False ends them.
        host: Under which name it is served, beside ``localhost`` and any address.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if not _is_ours(request.url.hostname or "", host):
            return Response("this page is served under its address", status_code=421)
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    async def whole() -> Response:
        await asyncio.to_thread(page.look)
        return HTMLResponse(await asyncio.to_thread(page.html))

    @app.get("/at")
    async def past(update: Annotated[int, Query(ge=0)]) -> Response:
        await asyncio.to_thread(page.look)
        text = await asyncio.to_thread(page.at, update)
        return Response(text, media_type="application/json")

    @app.get("/events")
    async def events(
        after: str = "", last_event_id: Annotated[str | None, Header()] = None
    ) -> Response:
        news = _news(page, after if last_event_id is None else last_event_id, goes_on)
        return StreamingResponse(news, media_type="text/event-stream")

    return app


def _is_ours(name: str, host: str) -> bool:
    """Say whether a request means this server, and no name that was made to lead to it."""
    if name in ("localhost", host):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _news(page: LivePage, known: str, goes_on: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield what changes on the page from what a reader knows on, as server-sent events."""
    yield _READS_AGAIN
    quiet_s = 0.0
    while goes_on():
        await asyncio.to_thread(page.look)
        message = await asyncio.to_thread(page.since, known)
        if message is not None:
            known, quiet_s = message.id, 0.0
            yield _as_event(message)
        elif quiet_s >= _SIGN_OF_LIFE_S:
            quiet_s = 0.0
            yield ": nothing new\n\n"
        await asyncio.sleep(LOOKS_EVERY_S)
        quiet_s += LOOKS_EVERY_S


def _as_event(message: Message) -> str:
    """Return a message as a server-sent event; its JSON is one line."""
    return f"id: {message.id}\ndata: {message.text}\n\n"


def dashboard_server(page: LivePage, *, host: str) -> uvicorn.Server:
    """Return a server of a live page, to ``run`` on sockets that listen; its end ends streams."""
    server: uvicorn.Server | None = None
    app = build_dashboard(page, goes_on=lambda: not (server and server.should_exit), host=host)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    return server
