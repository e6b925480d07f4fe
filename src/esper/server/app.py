"""The application: every route, what each needs, and what is refused before any of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, final

from fastapi import FastAPI

from esper.resilience.clock import MonotonicClock
from esper.server import blueprints, jobs, kernels, metrics, names, upkeep
from esper.server.limits import LimitedApp, Limits
from esper.server.metering import Meter, MeteredApp
from esper.server.problems import add_handlers, leave_out_what_is_never_answered

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from esper.contracts.ports import Clock
    from esper.registry.stored import StoredRegistry

API: Final = "/api/v1"
_API_VERSION: Final = "1.0"
_READY_FOR_S: Final = 1.0


@final
class Readiness:
    """Whether both stores do their part, asked of them at most once a second.

    Args:
        registry: What is asked.
        clock: Says when a second is over.
    """

    def __init__(self, registry: StoredRegistry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._until_s = float("-inf")

    def check(self) -> None:
        """Return where they do.

        Raises:
            KernelSourceUnavailable: One of them does not.
        """
        with self._lock:
            if self._clock.now() >= self._until_s:
                self._registry.check_ready()
                self._until_s = self._clock.now() + _READY_FOR_S


def build_api(registry: StoredRegistry, *, clock: Clock | None = None) -> FastAPI:
    """Return the routes over a registry, without limits."""
    api = FastAPI(
        title="Esper registry",
        version=_API_VERSION,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    api.state.registry = registry
    api.state.meter = Meter()
    api.state.readiness = Readiness(registry, clock or MonotonicClock())
    api.state.waiting = jobs.Waiting()
    for room in (kernels, names, blueprints, jobs, upkeep):
        api.include_router(room.router, prefix=API)
    api.include_router(metrics.router)
    api.include_router(upkeep.open_router)
    api.include_router(upkeep.open_router, prefix=API)
    add_handlers(api)
    leave_out_what_is_never_answered(api)
    return api


def build_app(
    registry: StoredRegistry, *, limits: Limits | None = None, clock: Clock | None = None
) -> ASGIApp:
    """Return what a server runs: the routes over a registry, within limits, and counted."""
    clock = clock or MonotonicClock()
    api = build_api(registry, clock=clock)
    limited = LimitedApp(
        api,
        limits=limits or Limits(),
        artifact_bytes=registry.max_artifact_bytes,
        clock=clock,
    )
    return MeteredApp(limited, meter=api.state.meter, clock=clock)
