"""The compile service of a registry over HTTP: as a client submits, and as a worker works."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, final

from esper.contracts.compile_job import CompileJob
from esper.contracts.compile_options import ANY_TOOLCHAIN, CompileOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.compile_job import JobStatus


@final
class HttpJobs:
    """What is to be compiled at a server; ``HttpRegistry.jobs`` makes it. Threads may share it.

    Args:
        ask: Sends a request of the registry's.
        listed: Reads a list of the registry's that comes in pages.
    """

    def __init__(self, ask: Callable[..., Any], listed: Callable[..., Any]) -> None:
        self._ask = ask
        self._listed = listed

    def submit(
        self,
        blueprint: BlueprintIR,
        options: CompileOptions | None = None,
        *,
        toolchain: str = ANY_TOOLCHAIN,
        again: bool = False,
    ) -> tuple[str, JobStatus]:
        """Ask for a blueprint to be compiled; one that was asked for already is that job.

        Args:
            blueprint: The blueprint.
            options: What it is tried on; the defaults if None.
            toolchain: What it is to be compiled with; ``"any"`` leaves it to the worker.
            again: Whether one that is ``"INVALID"`` is tried again.

        Returns:
            The job's id and where it stands.

        Raises:
            BlueprintError: The server does not take the blueprint.
            KernelSourceUnavailable: There was no answer.
        """
        body = {
            "blueprint": blueprint.to_document(),
            "toolchain": toolchain,
            "options": (options or CompileOptions()).to_document(),
            "again": again,
        }
        return self._ask(  # type: ignore[no-any-return] # of what is read here
            "POST", "/blueprints", body=body, read=lambda said: (said["id"], said["status"])
        )

    def find(self, job_id: str) -> CompileJob:
        """Return a job with its blueprint.

        Raises:
            KernelNotFoundError: There is none of that id.
            KernelSourceUnavailable: There was no answer.
            ValueError: It is no id.
        """
        path = f"/blueprints/{_checked(job_id)}"
        return self._ask("GET", path, read=CompileJob.from_document)  # type: ignore[no-any-return] # as above

    def list(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        status: JobStatus | None = None,
    ) -> list[CompileJob]:
        """Return jobs without their blueprints, oldest first.

        Args:
            limit: As many at most; None for all.
            after: Only those behind the one of this number.
            status: Only those that stand so.

        Raises:
            KernelSourceUnavailable: There was no answer.
        """
        asked = {} if status is None else {"status": status}
        return self._listed(  # type: ignore[no-any-return] # as above
            "/blueprints", asked, after, limit, "blueprints", CompileJob.from_document
        )

    def claim(
        self, worker: str, *, toolchain: str, lease_s: float, wait_s: float = 0.0
    ) -> CompileJob | None:
        """Lease the next job; None where there is none, and none came in time.

        Args:
            worker: Who asks; a name that no other worker has.
            toolchain: What the worker compiles with.
            lease_s: Seconds until others may have it, unless it is renewed.
            wait_s: Seconds to wait for one, at most 30, and less than a request may take.

        Raises:
            KernelSourceUnavailable: There was no answer.
        """
        return self._ask(  # type: ignore[no-any-return] # as above
            "POST",
            "/jobs/claim",
            body={"worker": worker, "toolchain": toolchain, "lease_s": lease_s},
            params={"wait": str(wait_s)},
            read=lambda said: None if said is None else CompileJob.from_document(said),
        )

    def renew(self, job: CompileJob, *, lease_s: float) -> None:
        """Keep a job that was claimed for longer.

        Raises:
            JobLostError: It is another's by now.
            KernelSourceUnavailable: There was no answer.
        """
        self._tell(job, "renew", {"lease_s": lease_s})

    def give_back(self, job: CompileJob) -> None:
        """Leave a job that was claimed to others, at once.

        Raises:
            JobLostError: It is another's by now.
            KernelSourceUnavailable: There was no answer.
        """
        self._tell(job, "renew", {"lease_s": 0.0})

    def finish(self, job: CompileJob, *, artifact_id: str | None, report: JsonObject) -> None:
        """Say what came of a job that was claimed.

        Args:
            job: As it was claimed.
            artifact_id: Digest of what was published; None where nothing passed.
            report: ``toolchain``, ``reason`` and ``findings`` of it.

        Raises:
            JobLostError: It is another's by now.
            KernelNotFoundError: Nothing is published under this digest.
            KernelSourceUnavailable: There was no answer.
        """
        said = {name: report[name] for name in ("toolchain", "reason", "findings")}
        self._tell(job, "finish", {"artifact_id": artifact_id, **said})

    def _tell(self, job: CompileJob, what: str, said: JsonObject) -> None:
        body = {"worker": job.worker, "attempt": job.attempts, **said}
        self._ask("POST", f"/jobs/{_checked(job.id)}/{what}", body=body)


def _checked(job_id: str) -> str:
    if not re.fullmatch("[0-9a-f]{32}", job_id):
        msg = f"a job's id is 32 hexadecimal digits, found {job_id!r:.80}; see the list of jobs"
        raise ValueError(msg)
    return job_id
