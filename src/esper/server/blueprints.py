"""The routes of blueprints: ask for one to be compiled, and see what came of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.compile_job import CompileJob, JobStatus
from esper.contracts.compile_options import CompileOptions
from esper.registry.refusals import no_such_job
from esper.resilience.clock import wall_time_s
from esper.server import answers, job_models
from esper.server.authority import Publisher, Reader
from esper.server.kernels import MOST_ON_A_PAGE, registry_of

router = APIRouter(prefix="/blueprints", tags=["blueprints"], responses=answers.REFUSALS)

JobId = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$", description="As submitted.")]


async def strict_json(request: Request) -> None:
    """Refuse a body that two readers could read differently.

    Raises:
        ValueError: It is no strict JSON: a key that stands twice, NaN, or too much of it.
    """
    canonical_json.parse(await request.body())


Strict = Annotated[None, Depends(strict_json)]
"""Behind the token: nothing is read of what nobody may send."""


@router.post("", status_code=202)
def submit(
    request: Request,
    response: Response,
    token: Publisher,
    _strict: Strict,
    said: job_models.BlueprintIn,
) -> job_models.Submitted:
    """Ask for a blueprint to be compiled. One that was asked for already is where it is."""
    blueprint = BlueprintIR.from_document(said.blueprint)
    options = CompileOptions.from_document(said.options)
    registry, now_s = registry_of(request), wall_time_s()
    with registry.reporting("keep a blueprint"), registry.book.transaction():
        job = registry.book.jobs.submit(
            blueprint,
            options,
            toolchain=said.toolchain,
            now_s=now_s,
            actor=token.name,
            again=said.again,
        )
        registry.book.audit.add(token.name, "submit", job.id, now_s=now_s)
    response.headers["Location"] = (
        f"{request.scope.get('root_path', '')}{request.url.path}/{job.id}"
    )
    return job_models.Submitted(id=job.id, status=job.status)


@router.get("")
def blueprints(
    request: Request,
    _: Reader,
    limit: Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)] = 100,
    after: Annotated[int, Query(ge=0, le=1 << 62, description="As the page before says.")] = 0,
    status: Annotated[JobStatus | None, Query(description="Only those that stand so.")] = None,
) -> job_models.JobPage:
    """Return what was asked for, oldest first, page by page."""
    registry = registry_of(request)
    with registry.reporting("list the blueprints"):
        found = registry.book.jobs.list(limit=limit, after=after, status=status)
    return job_models.JobPage(
        blueprints=[job_models.JobLine.model_validate(each.to_document()) for each in found],
        after=found[-1].number if len(found) == limit else None,
    )


@router.get("/{id}")
def blueprint(request: Request, job_id: JobId, _: Reader) -> job_models.JobOut:
    """Return where a blueprint stands: its status, attempts, artifact and report."""
    registry = registry_of(request)
    with registry.reporting("look up a blueprint"):
        found = registry.book.jobs.find(job_id)
    if found is None:
        raise no_such_job(job_id)
    return job_out(found)


def job_out(job: CompileJob) -> job_models.JobOut:
    """Return a job as an answer."""
    return job_models.JobOut.model_validate(job.to_document())
