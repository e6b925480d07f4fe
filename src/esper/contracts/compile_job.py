"""A blueprint on its way to being a kernel, as the registry, its server and a worker know it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Literal, Self, get_args

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject

JobStatus = Literal["UNVALIDATED", "COMPILING", "VALIDATED", "INVALID"]
"""Where a job stands: nobody is at it, one is, it has an artifact, it cannot have one."""
STATUSES: Final[tuple[JobStatus, ...]] = get_args(JobStatus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """One blueprint that is to be compiled, was, or cannot be.

    Attributes:
        id: Its name, which follows from blueprint, toolchain and options.
        number: Counts the jobs of a registry, oldest first.
        blueprint_id: Name of the blueprint.
        blueprint_digest: sha256 of the blueprint's canonical JSON.
        toolchain: What it is to be compiled with, for example ``"torch 2.13.0"``; ``"any"``.
        options: What it is tried on; see ``CompileOptions``.
        blueprint: The blueprint's JSON form; None in a list of jobs.
        status: One of ``STATUSES``.
        attempts: How often it was claimed; the number of the latest attempt.
        worker: Who claimed it last.
        artifact_id: Digest of what came of it; None until it is ``"VALIDATED"``.
        report: What was found, as JSON values, its ``reason`` where it is ``"INVALID"``; None until
            it is finished.
        submitted_by: Who asked for it.
        submitted_at_s: When, in seconds since 1970.
    """

    id: str
    number: int
    blueprint_id: str
    blueprint_digest: str
    toolchain: str
    options: JsonObject
    blueprint: JsonObject | None
    status: JobStatus
    attempts: int
    worker: str | None
    artifact_id: str | None
    report: JsonObject | None
    submitted_by: str | None
    submitted_at_s: float

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: JsonObject) -> Self:
        """Read the JSON form; the inverse of :meth:`to_document`.

        Raises:
            TypeError: It has other fields.
            ValueError: Its status is none.
        """
        if document.get("status") not in STATUSES:
            msg = f"a job's status is one of {STATUSES}, found {document.get('status')!r:.80}"
            raise ValueError(msg)
        return cls(**document)  # type: ignore[arg-type] # of a registry that speaks our version


def failure(reason: str, *, toolchain: str = "") -> JsonObject:
    """Return the report of a job that came to nothing.

    Args:
        reason: Why, in a sentence.
        toolchain: What was tried with, where that is known.
    """
    return {"toolchain": toolchain, "passed": False, "reason": reason[:1_000], "findings": {}}
