"""The bodies of requests and answers about blueprints and jobs, as the API documents them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from esper.contracts.compile_job import JobStatus
from esper.contracts.compile_options import ANY_TOOLCHAIN
from esper.server.models import Whole

_Name = Field(min_length=1, max_length=128, description="A name that no other worker has.")
_Attempt = Field(ge=1, le=1 << 31, description="attempts of the job as it was claimed.")


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class BlueprintIn(_Said):
    """A blueprint to be compiled."""

    blueprint: dict[str, Any] = Field(description="A BlueprintIR's JSON form.")
    toolchain: str = Field(
        default=ANY_TOOLCHAIN,
        pattern=r"^[ -~]{1,64}$",
        description="What it is to be compiled with, for example torch 2.13.0; any.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="batch and size of what it is tried on."
    )
    again: bool = Field(default=False, description="Whether one that is INVALID is tried again.")


class Submitted(BaseModel):
    """Where a blueprint stands that was asked for, now or before."""

    id: str
    status: JobStatus


class JobLine(BaseModel):
    """Where a blueprint stands; see ``CompileJob``."""

    id: str
    number: int
    blueprint_id: str
    blueprint_digest: str
    toolchain: str
    options: dict[str, Any]
    blueprint: None = None
    status: JobStatus
    attempts: int
    worker: str | None
    artifact_id: str | None
    report: dict[str, Any] | None
    submitted_by: str | None
    submitted_at_s: float


class JobOut(JobLine):
    """Where a blueprint stands, and the blueprint."""

    blueprint: dict[str, Any]  # type: ignore[assignment] # what a list leaves out


class JobPage(BaseModel):
    """A page of jobs; ``after`` asks for the next one, and is null where there is none."""

    blueprints: list[JobLine]
    after: int | None


class Claim(_Said):
    """Who wants a job."""

    worker: str = _Name
    toolchain: str = Field(
        min_length=1, max_length=64, description="What the worker compiles with."
    )
    lease_s: float = Field(
        default=30.0, ge=0.1, le=3_600, description="Seconds until others may have it."
    )


class Renewal(_Said):
    """Whose job it is, and for how long."""

    worker: str = _Name
    attempt: Whole = _Attempt
    lease_s: float = Field(
        default=30.0, ge=0, le=3_600, description="Seconds from now; 0 gives it back."
    )


class Outcome(_Said):
    """What came of a job."""

    worker: str = _Name
    attempt: Whole = _Attempt
    artifact_id: str | None = Field(
        pattern=r"^[0-9a-f]{64}$", description="What was published; null where nothing passed."
    )
    toolchain: str = Field(max_length=64)
    reason: str = Field(max_length=1_000, description="Why nothing passed; else empty.")
    findings: dict[str, Any]
