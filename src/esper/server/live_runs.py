"""The pages of runs that go on, served with server-sent events."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from esper.observability.live_page import POLICY, live_page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request

    from esper.observability.live_page import WatchedRun

LOOKS_EVERY_S: Final = 0.5
_KEPT_OPEN_S: Final = 10.0
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_live_app(
    runs: Sequence[WatchedRun], *, looks_every_s: float = LOOKS_EVERY_S
) -> Starlette:
    """Return the application: a page for each run, its events, and its past.

    ``GET /runs/{i}`` is the page, ``/runs/{i}/at/{number}`` its main part after so many events,
    ``/runs/{i}/events`` the stream: each message is what is to be shown now, with an id, and who
    comes back with that as ``Last-Event-ID`` gets what is new since.

    Args:
        runs: What is watched, at least one.
        looks_every_s: Seconds between two looks at a log.
    """

    def run_of(request: Request) -> WatchedRun:
        index: int = request.path_params["index"]
        if index >= len(runs):
            raise HTTPException(404, f"there are {len(runs)} runs, from 0")
        return runs[index]

    def first(_request: Request) -> Response:
        return RedirectResponse("/runs/0")

    def page(request: Request) -> Response:
        run_of(request)
        return HTMLResponse(live_page(runs, request.path_params["index"]), headers=_HEADERS)

    def past(request: Request) -> Response:
        run, number = run_of(request), request.path_params["number"]
        run.look()
        if not 1 <= number <= max(1, run.num_events):
            raise HTTPException(404, f"the log has {run.num_events} events, from 1")
        return HTMLResponse(run.main(number), headers=_HEADERS)

    async def events(request: Request) -> Response:
        run = run_of(request)
        stream = _messages(request, run, looks_every_s)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", first),
            Route("/runs/{index:int}", page),
            Route("/runs/{index:int}/at/{number:int}", past),
            Route("/runs/{index:int}/events", events),
        ]
    )


async def _messages(request: Request, run: WatchedRun, looks_every_s: float) -> AsyncIterator[str]:
    seen = request.headers.get("last-event-id", "")
    quiet_s = 0.0
    while not await request.is_disconnected():
        now = await run_in_threadpool(run.look)
        if now != seen:
            seen, quiet_s = now, 0.0
            main = await run_in_threadpool(run.main)
            found = {"events": run.num_events, "ended": run.has_ended, "main": main}
            yield f"id: {now}\ndata: {json.dumps(found)}\n\n"
        elif quiet_s >= _KEPT_OPEN_S:
            quiet_s = 0.0
            yield ": nothing new\n\n"
        await asyncio.sleep(looks_every_s)
        quiet_s += looks_every_s


def live_server(runs: Sequence[WatchedRun]) -> uvicorn.Server:
    """Return a server of the pages of runs, to ``run`` on sockets that listen."""
    config = uvicorn.Config(
        build_live_app(runs),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)
