"""Blueprints and jobs over HTTP: as somebody submits, and as a worker works."""

import json

import httpx2
import pytest
from kernel_artifacts import artifact
from kernel_blueprints import mlp_blueprint
from registries import over_http, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.contracts.artifact_format import digest_of
from esper.contracts.compile_options import CompileOptions
from esper.contracts.errors import BlueprintError, JobLostError, KernelNotFoundError
from esper.registry.book_access import SCOPES
from esper.registry.memory import MemoryRegistry
from esper.server.jobs import MOST_WAITING, Waiting

pytestmark = [pytest.mark.network, pytest.mark.slow]

REPORT = {"toolchain": "torch 2.13.0", "passed": True, "reason": "", "findings": {"parameters": 7}}


@pytest.fixture(scope="module")
def kept():
    return MemoryRegistry()


@pytest.fixture(scope="module")
def registry(kept):
    with over_http(kept) as client:
        yield client


@pytest.fixture
def jobs(kept, registry):
    """Return the compile service with nothing in it."""
    kept.book.database.rows("DELETE FROM jobs")
    return registry.jobs


@pytest.fixture
def ask(kept, registry):
    token = token_for(kept, *SCOPES)
    with httpx2.Client(
        base_url=f"{registry.base_url}/api/v1",
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        trust_env=False,
    ) as client:
        yield client


def claim(jobs, worker="w", **more):
    return jobs.claim(worker, toolchain="torch 2.13.0", lease_s=30.0, **more)


def test_a_blueprint_is_submitted_claimed_published_and_finished(registry, jobs):
    """Where it stands is seen at every step; the report is kept beside the artifact, too."""
    blueprint = mlp_blueprint()
    job_id, status = jobs.submit(blueprint, CompileOptions(batch=4))
    assert status == "UNVALIDATED"
    assert jobs.submit(blueprint, CompileOptions(batch=4)) == (job_id, status)
    job = claim(jobs)
    assert (job.id, job.status, job.attempts) == (job_id, "COMPILING", 1)
    assert job.blueprint == blueprint.to_document()
    assert job.options == {"batch": 4, "size": 32}
    jobs.renew(job, lease_s=30.0)

    digest = registry.put(artifact(1))
    jobs.finish(job, artifact_id=digest, report=REPORT)

    found = jobs.find(job_id)
    assert (found.status, found.artifact_id, found.report) == ("VALIDATED", digest, REPORT)
    assert [each.findings for each in registry.validations(digest)] == [{"parameters": 7}]
    assert claim(jobs, "other") is None
    with pytest.raises(JobLostError):
        jobs.renew(job, lease_s=30.0)


def test_what_is_invalid_stays_so_until_it_is_asked_for_again(jobs):
    """Its reason is told, and another submission changes nothing without ``again``."""
    blueprint = mlp_blueprint()
    job_id, _ = jobs.submit(blueprint)
    jobs.finish(claim(jobs), artifact_id=None, report={**REPORT, "reason": "no gradient"})

    assert jobs.find(job_id).report["reason"] == "no gradient"
    assert jobs.submit(blueprint) == (job_id, "INVALID")
    assert claim(jobs) is None
    assert jobs.submit(blueprint, again=True) == (job_id, "UNVALIDATED")


def test_a_job_is_finished_only_with_what_is_published(jobs):
    """Whoever finishes first and publishes later is refused, and nothing is said of the job."""
    jobs.submit(mlp_blueprint())
    job = claim(jobs)
    with pytest.raises(KernelNotFoundError, match="put it first"):
        jobs.finish(job, artifact_id=digest_of(artifact(99)), report=REPORT)
    assert jobs.find(job.id).status == "COMPILING"


def test_a_job_that_is_given_back_is_had_at_once(jobs):
    """The next worker need not wait for the lease."""
    jobs.submit(mlp_blueprint())
    job = claim(jobs)
    jobs.give_back(job)
    assert claim(jobs, "other").attempts == 2
    with pytest.raises(JobLostError, match="attempt 1"):
        jobs.finish(job, artifact_id=None, report=REPORT)


def test_what_is_no_blueprint_is_not_stored(jobs, ask):
    """Limits, strict JSON and options are looked at before anything is kept."""
    body = {"blueprint": mlp_blueprint().to_document()}
    refused = [
        json.dumps({"blueprint": {**body["blueprint"], "id": "NOT A NAME"}}),
        json.dumps({"blueprint": {**body["blueprint"], "nodes": body["blueprint"]["nodes"] * 90}}),
        json.dumps({"blueprint": {**body["blueprint"], "init_seed": True}}),
        json.dumps({**body, "options": {"batch": 0}}),
        json.dumps({**body, "options": {"unknown": 1}}),
        json.dumps({**body, "toolchain": "torch\n2"}),
        json.dumps(body)[:-1] + ', "again": true, "again": false}',
        json.dumps(body).replace('"init_seed": 0', '"init_seed": NaN'),
    ]
    for text in refused:
        answer = ask.post("/blueprints", content=text)
        assert answer.status_code == 400, text[:200]
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert jobs.list() == []
    assert ask.post("/blueprints", content=json.dumps(body)).status_code == 202
    cyclic = mlp_blueprint()
    object.__setattr__(cyclic, "id", "NOT A NAME")
    with pytest.raises(BlueprintError, match="NOT A NAME"):
        jobs.submit(cyclic)


def test_jobs_come_in_pages(jobs):
    """A list goes on where the page before ended, and can be of those that stand somewhere."""
    ids = [jobs.submit(mlp_blueprint(init_seed=n))[0] for n in range(5)]
    claim(jobs)
    assert [job.id for job in jobs.list()] == ids
    first = jobs.list(limit=2)
    assert [job.id for job in first] == ids[:2]
    assert [job.id for job in jobs.list(after=first[-1].number, limit=2)] == ids[2:4]
    assert [job.id for job in jobs.list(status="COMPILING")] == ids[:1]


def test_a_worker_that_waits_gets_what_comes(jobs, registry):
    """It is answered when there is a job; where none comes, when its time is over."""
    from concurrent.futures import ThreadPoolExecutor

    assert claim(jobs, wait_s=0.3) is None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(claim, jobs, wait_s=20.0)
        job_id, _ = registry.jobs.submit(mlp_blueprint())
        assert waiting.result(timeout=20.0).id == job_id


def test_only_so_many_wait_at_once():
    """Whoever comes then is answered at once, so that there is room for other requests."""
    waiting = Waiting()
    places = [waiting.place() for _ in range(MOST_WAITING + 1)]
    assert [place.__enter__() for place in places] == [True] * MOST_WAITING + [False]
    places.pop().__exit__(None, None, None)
    places.pop().__exit__(None, None, None)
    with waiting.place() as may_wait:
        assert may_wait


def test_a_blueprint_that_nobody_asked_for_is_not_found(jobs):
    """An id that is none is the caller's mistake; one that is nobody's is not found."""
    with pytest.raises(KernelNotFoundError, match="submit it first"):
        jobs.find("0" * 32)
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        jobs.find("../kernels")
