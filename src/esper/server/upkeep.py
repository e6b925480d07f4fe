"""The routes of whoever runs the server: is it well, what was done, and cleaning up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request

from esper.registry import documents
from esper.server import answers, models
from esper.server.authority import Admin
from esper.server.kernels import LAST_ON_A_PAGE, MOST_ON_A_PAGE, registry_of

router = APIRouter(tags=["upkeep"], responses=answers.REFUSALS)
open_router = APIRouter(tags=["upkeep"])
"""What needs no token: it says nothing of what is stored."""


@router.get("/audit")
def audit(
    request: Request,
    _: Admin,
    limit: Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)] = 100,
    after: Annotated[int, Query(ge=0, le=LAST_ON_A_PAGE)] = 0,
) -> models.AuditPage:
    """Return who did what, oldest first, page by page."""
    registry = registry_of(request)
    with registry.reporting("read the audit"):
        found = registry.book.audit.lines(limit=limit, after=after)
    lines = [models.AuditLine(**asdict(line)) for line in found]
    return models.AuditPage(lines=lines, after=lines[-1].number if len(lines) == limit else None)


@router.post("/upkeep/collect")
def collect(
    request: Request, _: Admin, grace_s: Annotated[float, Query(ge=0)] = 86_400.0
) -> models.Collected:
    """Remove bytes that two collections, ``grace_s`` apart, both found unreferenced."""
    return models.Collected(removed=list(registry_of(request).collect(grace_s=grace_s)))


@router.post("/upkeep/verify")
def verify(
    request: Request,
    _: Admin,
    limit: Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)] = 100,
    after: Annotated[str, Query(max_length=64)] = "",
) -> models.Check:
    """Read stored artifacts, page by page, and put aside those whose bytes are wrong."""
    check = registry_of(request).verify(after=after, limit=limit)
    return models.Check.model_validate(documents.of_check(check))


@open_router.get("/health")
def health() -> models.State:
    """Say that the server answers."""
    return models.State(status="ok")


@open_router.get("/ready", responses={503: answers.REFUSALS[503]})
def ready(request: Request) -> models.State:
    """Write to both stores and read back, at most once a second; 503 where one does not do it."""
    request.app.state.readiness.check()
    return models.State(status="ok")
