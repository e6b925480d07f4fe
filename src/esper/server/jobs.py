"""The routes of workers: claim a blueprint, keep it, and say what came of it.

A worker needs no more than these: no database, no bucket. Who has to wait for a job holds no thread
and, since a place among the requests is held, is one of not too many.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, final

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from esper.contracts.kernel_reports import ValidationReport
from esper.registry.refusals import job_lost, not_published
from esper.server import answers, job_models
from esper.server.authority import Worker
from esper.server.blueprints import JobId, Strict, job_out
from esper.server.kernels import registry_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.compile_job import CompileJob

LONGEST_WAIT_S: Final = 30.0
MOST_WAITING: Final = 32
"""Half of the requests that are served at once; whoever comes then is answered at once."""
_LOOK_EVERY_S: Final = 0.25

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=answers.REFUSALS)
_LOST: Final[dict[int | str, dict[str, Any]]] = {
    409: {**answers.REFUSALS[400], "description": "The job is another worker's by now"}
}


@final
class Waiting:
    """How many workers wait for a job at this server."""

    def __init__(self) -> None:
        self._num_waiting = 0

    @contextmanager
    def place(self) -> Iterator[bool]:
        """Yield whether there is room to wait, and hold the place."""
        self._num_waiting += 1
        try:
            yield self._num_waiting <= MOST_WAITING
        finally:
            self._num_waiting -= 1


@router.post(
    "/claim",
    response_model=job_models.JobOut,
    responses={204: {"description": "There is no job"}},
)
async def claim(
    request: Request,
    _: Worker,
    _strict: Strict,
    said: job_models.Claim,
    wait: Annotated[
        float, Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for a job.")
    ] = 0.0,
) -> Any:
    """Lease the next blueprint to a worker; 204 where there is none, and none came in time."""
    now_s = asyncio.get_running_loop().time
    until_s = now_s() + wait
    waiting: Waiting = request.app.state.waiting
    with waiting.place() as may_wait:
        while True:
            job = await run_in_threadpool(_claim, request, said)
            if job is not None:
                return job_out(job)
            left_s = until_s - now_s()
            if not may_wait or left_s <= 0:
                return Response(status_code=204)
            await asyncio.sleep(min(_LOOK_EVERY_S, left_s))
            if await request.is_disconnected():  # else it would be leased to nobody
                return Response(status_code=204)


@router.post("/{id}/renew", status_code=204, responses=_LOST)
def renew(
    request: Request, job_id: JobId, _: Worker, _strict: Strict, said: job_models.Renewal
) -> None:
    """Keep a job for longer, or give it back with a lease of 0 s."""
    registry = registry_of(request)
    jobs = registry.book.jobs
    with registry.reporting("renew a lease"):
        is_theirs = (
            jobs.renew(job_id, said.worker, said.attempt, lease_s=said.lease_s)
            if said.lease_s > 0
            else jobs.give_back(job_id, said.worker, said.attempt)
        )
    if not is_theirs:
        raise job_lost(job_id, said.worker, said.attempt)


@router.post("/{id}/finish", status_code=204, responses=_LOST)
def finish(
    request: Request, job_id: JobId, _: Worker, _strict: Strict, said: job_models.Outcome
) -> None:
    """Say what came of a job: an artifact that is published, or why there is none."""
    registry = registry_of(request)
    book, artifact_id = registry.book, said.artifact_id
    report: JsonObject = {
        "toolchain": said.toolchain,
        "passed": artifact_id is not None,
        "reason": said.reason,
        "findings": said.findings,
    }
    with registry.reporting("finish a job"), book.transaction():
        if artifact_id is not None and book.artifacts.size(artifact_id) is None:
            raise not_published(artifact_id)
        if not book.jobs.finish(
            job_id, said.worker, said.attempt, artifact_id=artifact_id, report=report
        ):
            raise job_lost(job_id, said.worker, said.attempt)
        if artifact_id is not None:
            found = ValidationReport.from_document({"artifact_id": artifact_id, **report})
            book.reports.add_validation(found)


def _claim(request: Request, said: job_models.Claim) -> CompileJob | None:
    registry = registry_of(request)
    with registry.reporting("claim a job"):
        return registry.book.jobs.claim(said.worker, lease_s=said.lease_s, toolchain=said.toolchain)
