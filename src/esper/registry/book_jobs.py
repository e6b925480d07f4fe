"""The chapter of blueprints that are to be compiled: a row each, leased to one worker at a time.

A claim leases the oldest job that nobody is at, by the database's own clock. Whoever lets the lease
run out loses the job to the next who asks, and with it the attempt number, without which nothing
can be finished: one who wakes up later changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject
    from esper.registry.database import Database, Row

STATUSES: Final = ("UNVALIDATED", "COMPILING", "VALIDATED", "INVALID")
MAX_LOSSES: Final = 3
"""As many workers may be lost over a job; then it is invalid and goes to no other."""

_FIELDS: Final = (
    "id, blueprint_digest, toolchain, options, blueprint, status, attempts, worker, artifact_id, "
    "report, submitted_by, submitted_at_s"
)
_CLAIM: Final = f"""
    UPDATE jobs SET status = 'COMPILING', attempts = attempts + 1, worker = :worker,
        num_losses = num_losses + CASE WHEN status = 'COMPILING' THEN 1 ELSE 0 END,
        leased_until_s = {{now}} + :lease_s
    WHERE seq = (
        SELECT seq FROM jobs WHERE status = 'UNVALIDATED'
            OR (status = 'COMPILING' AND leased_until_s < {{now}})
        ORDER BY seq LIMIT 1 {{skip_locked}})
    RETURNING {_FIELDS}"""  # noqa: S608 - names of our own
_BURY: Final = """
    UPDATE jobs SET status = 'INVALID', report = :report, num_losses = num_losses + 1
    WHERE status = 'COMPILING' AND leased_until_s < {now} AND num_losses + 1 >= :most"""
_LEASED: Final = "id = :id AND worker = :worker AND attempts = :attempt AND status = 'COMPILING'"
_RENEW: Final = f"""
    UPDATE jobs SET leased_until_s = {{now}} + :lease_s WHERE {_LEASED} RETURNING id"""  # noqa: S608 - words of our own
_FINISH: Final = f"""
    UPDATE jobs SET status = :status, artifact_id = :artifact_id, report = :report,
        leased_until_s = NULL
    WHERE {_LEASED} RETURNING id"""  # noqa: S608 - words of our own


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One blueprint that is to be compiled, was, or cannot be.

    Attributes:
        id: Its name, which follows from the three that come next.
        blueprint_digest: sha256 of the blueprint's canonical JSON.
        toolchain: What it is to be compiled with.
        options: How, as JSON.
        blueprint: The blueprint, as JSON.
        status: One of ``STATUSES``.
        attempts: How often it was claimed; the number of the latest attempt.
        worker: Who claimed it last.
        artifact_id: Digest of what came of it; None until it is ``"VALIDATED"``.
        report: What was found, as JSON values; None until it is finished.
        submitted_by: Who asked for it.
        submitted_at_s: When, in seconds since 1970.
    """

    id: str
    blueprint_digest: str
    toolchain: str
    options: str
    blueprint: str
    status: str
    attempts: int
    worker: str | None
    artifact_id: str | None
    report: JsonObject | None
    submitted_by: str | None
    submitted_at_s: float


@final
class Jobs:
    """What is to be compiled.

    Args:
        database: Who keeps it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        words = database.words
        self._bury, self._claim, self._renew = (
            text.format_map(words) for text in (_BURY, _CLAIM, _RENEW)
        )

    def totals(self) -> dict[str, int]:
        """Return how many jobs have each of the ``STATUSES``."""
        found = self._database.rows("SELECT status, count(*) FROM jobs GROUP BY status")
        return dict.fromkeys(STATUSES, 0) | {status: int(count) for status, count in found}

    def submit(
        self,
        *,
        blueprint: str,
        blueprint_digest: str,
        toolchain: str,
        options: str,
        now_s: float,
        actor: str | None = None,
        again: bool = False,
    ) -> Job:
        """Ask for a blueprint to be compiled; one that was asked for already is that job.

        Args:
            blueprint: The blueprint, as JSON.
            blueprint_digest: sha256 of its canonical JSON.
            toolchain: What it is to be compiled with.
            options: How, as canonical JSON.
            now_s: Seconds since 1970.
            actor: Who asks.
            again: Whether one that is invalid is tried again.
        """
        key = "\n".join((blueprint_digest, toolchain, options))
        job_id = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._database.rows(
            "INSERT INTO jobs (id, blueprint_digest, toolchain, options, blueprint, status, "
            "attempts, num_losses, submitted_by, submitted_at_s) VALUES (:id, :blueprint_digest, "
            ":toolchain, :options, :blueprint, 'UNVALIDATED', 0, 0, :actor, :now_s) "
            "ON CONFLICT (blueprint_digest, toolchain, options) DO NOTHING",
            id=job_id,
            blueprint_digest=blueprint_digest,
            toolchain=toolchain,
            options=options,
            blueprint=blueprint,
            actor=actor,
            now_s=now_s,
        )
        if again:
            self._database.rows(
                "UPDATE jobs SET status = 'UNVALIDATED', num_losses = 0, report = NULL "
                "WHERE id = :id AND status = 'INVALID'",
                id=job_id,
            )
        found = self.find(job_id)
        assert found is not None, "it was entered, or was there"
        return found

    def find(self, job_id: str) -> Job | None:
        """Return a job, or None."""
        found = self._database.rows(f"SELECT {_FIELDS} FROM jobs WHERE id = :id", id=job_id)  # noqa: S608 - names of our own
        return _job(found[0]) if found else None

    def claim(self, worker: str, *, lease_s: float) -> Job | None:
        """Lease the oldest job that nobody is at; None where there is none.

        Args:
            worker: Who asks; a name that no other worker has.
            lease_s: Seconds until others may have it, unless it is renewed.
        """
        lost = {"reason": f"the workers that had this job were lost {MAX_LOSSES} times"}
        self._database.rows(self._bury, most=MAX_LOSSES, report=json.dumps(lost))
        found = self._database.rows(self._claim, worker=worker, lease_s=lease_s)
        return _job(found[0]) if found else None

    def renew(self, job_id: str, worker: str, attempt: int, *, lease_s: float) -> bool:
        """Lease a job for longer; says whether it is still the worker's."""
        return bool(
            self._database.rows(
                self._renew, id=job_id, worker=worker, attempt=attempt, lease_s=lease_s
            )
        )

    def finish(
        self, job_id: str, worker: str, attempt: int, *, artifact_id: str | None, report: JsonObject
    ) -> bool:
        """Say what came of a job; says whether it was still the worker's to say.

        Args:
            job_id: The job.
            worker: Who claimed it.
            attempt: ``attempts`` of the job that was claimed.
            artifact_id: Digest of what came of it; None makes it invalid.
            report: What was found; an invalid one has its ``reason``.
        """
        return bool(
            self._database.rows(
                _FINISH,
                id=job_id,
                worker=worker,
                attempt=attempt,
                status="INVALID" if artifact_id is None else "VALIDATED",
                artifact_id=artifact_id,
                report=json.dumps(report, sort_keys=True),
            )
        )


def _job(row: Row) -> Job:
    names = [name.strip() for name in _FIELDS.split(",")]
    values = dict(zip(names, row, strict=True))
    report = values.pop("report")
    return Job(report=None if report is None else json.loads(report), **values)
