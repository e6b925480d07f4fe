"""The chapter of blueprints that are to be compiled: a row each, leased to one worker at a time.

A claim leases the oldest job that nobody is at, by the database's own clock. Whoever lets the lease
run out loses the job to the next who asks, and with it the attempt number, without which nothing
can be finished: one who wakes up later changes nothing. Every worker that was lost over a job makes
it younger, so that what kills workers does not get all of them first, and what was only unlucky
does not wait behind everything else.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Final, final

from esper.contracts import canonical_json
from esper.contracts.compile_job import STATUSES, CompileJob, JobStatus, failure
from esper.contracts.compile_options import ANY_TOOLCHAIN
from esper.registry.schema import TURN

if TYPE_CHECKING:
    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.compile_options import CompileOptions
    from esper.registry.database import Database, Row

MAX_LOSSES: Final = 3
"""As many workers may be lost over a job; then it is invalid and goes to no other."""

_FIELDS: Final = (
    "id, seq, blueprint_digest, toolchain, options, blueprint, status, attempts, worker, "
    "artifact_id, report, submitted_by, submitted_at_s"
)
_ENTER: Final = (
    "INSERT INTO jobs (id, blueprint_digest, toolchain, options, blueprint, status, attempts, "
    "num_losses, submitted_by, submitted_at_s) VALUES (:id, :blueprint_digest, :toolchain, "
    ":options, :blueprint, 'UNVALIDATED', 0, 0, :actor, :now_s) "
    "ON CONFLICT DO NOTHING"  # on any index: who comes at the same moment may meet either first
)
# It compares no status beside the turn's: SQLite would take the index of those, and sort.
_CLAIM: Final = f"""
    UPDATE jobs SET status = 'COMPILING', attempts = attempts + 1, worker = :worker,
        num_losses = num_losses + CASE WHEN status = 'COMPILING' THEN 1 ELSE 0 END,
        leased_until_s = {{now}} + :lease_s
    WHERE seq = (
        SELECT seq FROM jobs WHERE {TURN} >= 0 AND toolchain IN (:toolchain, '{ANY_TOOLCHAIN}')
            AND (leased_until_s IS NULL OR leased_until_s < {{now}})
        ORDER BY {TURN}, seq
        LIMIT 1 {{skip_locked}})
    RETURNING {_FIELDS}"""  # noqa: S608 - names of our own
_BURY: Final = """
    UPDATE jobs SET status = 'INVALID', report = :report, num_losses = num_losses + 1
    WHERE status = 'COMPILING' AND leased_until_s < {now} AND num_losses + 1 >= :most"""
_LEASED: Final = "id = :id AND worker = :worker AND attempts = :attempt AND status = 'COMPILING'"
_RENEW: Final = f"""
    UPDATE jobs SET leased_until_s = {{now}} + :lease_s WHERE {_LEASED} RETURNING id"""  # noqa: S608 - words of our own
_GIVE_BACK: Final = f"""
    UPDATE jobs SET status = 'UNVALIDATED', leased_until_s = NULL
    WHERE {_LEASED} RETURNING id"""  # noqa: S608 - words of our own
_FINISH: Final = f"""
    UPDATE jobs SET status = :status, artifact_id = :artifact_id, report = :report,
        leased_until_s = NULL
    WHERE {_LEASED} RETURNING id"""  # noqa: S608 - words of our own


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
        blueprint: BlueprintIR,
        options: CompileOptions,
        *,
        toolchain: str = ANY_TOOLCHAIN,
        now_s: float,
        actor: str | None = None,
        again: bool = False,
    ) -> CompileJob:
        """Ask for a blueprint to be compiled; one that was asked for already is that job.

        Args:
            blueprint: The blueprint.
            options: What it is tried on.
            toolchain: What it is to be compiled with; ``"any"`` leaves it to the worker.
            now_s: Seconds since 1970.
            actor: Who asks.
            again: Whether one that is invalid is tried again.
        """
        said = canonical_json.encode(options.to_document()).decode()
        key = "\n".join((blueprint.digest, toolchain, said))
        job_id = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._database.rows(
            _ENTER,
            id=job_id,
            blueprint_digest=blueprint.digest,
            toolchain=toolchain,
            options=said,
            blueprint=blueprint.to_json().decode(),
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

    def find(self, job_id: str) -> CompileJob | None:
        """Return a job, or None."""
        found = self._database.rows(f"SELECT {_FIELDS} FROM jobs WHERE id = :id", id=job_id)  # noqa: S608 - names of our own
        return _job(found[0]) if found else None

    def list(
        self, *, limit: int, after: int = 0, status: JobStatus | None = None
    ) -> list[CompileJob]:
        """Return jobs without their blueprints, oldest first.

        Args:
            limit: As many at most.
            after: Only those that come behind the one of this number.
            status: Only those that stand so.
        """
        found = self._database.rows(
            f"SELECT {_FIELDS} FROM jobs WHERE seq > :after AND (:every OR status = :status) "  # noqa: S608 - names of our own
            "ORDER BY seq LIMIT :limit",
            after=after,
            every=status is None,
            status=status or "",
            limit=limit,
        )
        return [_job(row, with_blueprint=False) for row in found]

    def claim(self, worker: str, *, lease_s: float, toolchain: str) -> CompileJob | None:
        """Lease the oldest job that nobody is at; None where there is none.

        Args:
            worker: Who asks; a name that no other worker has.
            lease_s: Seconds until others may have it, unless it is renewed.
            toolchain: What the worker compiles with.
        """
        lost = failure(f"the workers that had this job were lost {MAX_LOSSES} times")
        self._database.rows(self._bury, most=MAX_LOSSES, report=json.dumps(lost))
        found = self._database.rows(
            self._claim, worker=worker, lease_s=lease_s, toolchain=toolchain
        )
        return _job(found[0]) if found else None

    def renew(self, job_id: str, worker: str, attempt: int, *, lease_s: float) -> bool:
        """Lease a job for longer; says whether it is still the worker's."""
        return bool(
            self._database.rows(
                self._renew, id=job_id, worker=worker, attempt=attempt, lease_s=lease_s
            )
        )

    def give_back(self, job_id: str, worker: str, attempt: int) -> bool:
        """Leave a job to others, who need not wait; says whether it was still the worker's.

        The worker is not lost over it: it only ends.
        """
        return bool(self._database.rows(_GIVE_BACK, id=job_id, worker=worker, attempt=attempt))

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


def _job(row: Row, *, with_blueprint: bool = True) -> CompileJob:
    names = [name.strip() for name in _FIELDS.split(",")]
    values = dict(zip(names, row, strict=True))
    report, blueprint = values.pop("report"), json.loads(values.pop("blueprint"))
    return CompileJob(
        number=values.pop("seq"),
        blueprint_id=blueprint["id"],
        blueprint=blueprint if with_blueprint else None,
        options=json.loads(values.pop("options")),
        report=None if report is None else json.loads(report),
        **values,
    )
