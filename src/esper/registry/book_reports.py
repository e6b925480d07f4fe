"""The chapter of what is said of artifacts after they were published."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, final

from esper.contracts.kernel_reports import FieldReport, ValidationReport
from esper.contracts.signature import KernelSignature
from esper.registry import refusals
from esper.registry.standings import OF_ARTIFACT, pool

if TYPE_CHECKING:
    from esper.registry.database import Database


@final
class Reports:
    """Deprecations, outcomes, validations and signatures; they stay where an artifact is withdrawn.

    Args:
        database: Who keeps them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def deprecate(
        self, digest: str, *, reason: str, successor: str | None, actor: str | None, now_s: float
    ) -> None:
        """Say that an artifact should not be used; what was said before gives way."""
        self._database.rows(
            "INSERT INTO deprecations (digest, reason, successor, actor, deprecated_at_s) "
            "VALUES (:digest, :reason, :successor, :actor, :now_s) ON CONFLICT (digest) DO UPDATE "
            "SET reason = excluded.reason, successor = excluded.successor, "
            "actor = excluded.actor, deprecated_at_s = excluded.deprecated_at_s",
            digest=digest,
            reason=reason,
            successor=successor,
            actor=actor,
            now_s=now_s,
        )

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back."""
        self._database.rows("DELETE FROM deprecations WHERE digest = :digest", digest=digest)

    def add_outcome(self, report: FieldReport) -> None:
        """Keep an outcome, and pool its blueprint's; one of the same run and graft stays."""
        kept = self._database.rows(
            "INSERT INTO outcomes "  # noqa: S608 - words of our own
            "(digest, run_id, graft_id, blueprint_digest, site_kind, report) "
            f"VALUES (:digest, :run_id, :graft_id, {OF_ARTIFACT}, :site_kind, :report) "
            "ON CONFLICT (run_id, graft_id) DO NOTHING RETURNING blueprint_digest",
            digest=report.artifact_id,
            run_id=report.run_id,
            graft_id=report.graft_id,
            said=report.blueprint_digest,
            site_kind=report.site_kind,
            report=json.dumps(report.to_document(), sort_keys=True),
        )
        for (blueprint_digest,) in kept:
            pool(self._database, blueprint_digest, report.site_kind)

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return the outcomes of an artifact, oldest first."""
        found = self._database.rows(
            "SELECT report FROM outcomes WHERE digest = :digest ORDER BY seq", digest=digest
        )
        return [FieldReport.from_document(json.loads(text)) for (text,) in found]

    def add_validation(self, report: ValidationReport) -> None:
        """Keep what a validation found."""
        self._database.rows(
            "INSERT INTO validations (digest, report) VALUES (:digest, :report)",
            digest=report.artifact_id,
            report=json.dumps(report.to_document(), sort_keys=True),
        )

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations of an artifact found, oldest first."""
        found = self._database.rows(
            "SELECT report FROM validations WHERE digest = :digest ORDER BY seq", digest=digest
        )
        return [ValidationReport.from_document(json.loads(text)) for (text,) in found]

    def add_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; one that is there already stays. Inside a transaction.

        Raises:
            ValueError: Its artifact has as many as are kept.
        """
        if not refusals.keep_signature(signature, self.signatures(signature.artifact_id)):
            return
        self._database.rows(
            "INSERT INTO signatures (digest, key_id, signed_at_s, signature) "
            "VALUES (:artifact_id, :key_id, :signed_at_s, :signature)",
            **signature.to_document(),
        )

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return the signatures of an artifact, oldest first."""
        found = self._database.rows(
            "SELECT key_id, signed_at_s, signature FROM signatures "
            "WHERE digest = :digest ORDER BY seq",
            digest=digest,
        )
        return [
            KernelSignature(artifact_id=digest, key_id=key_id, signed_at_s=when, signature=text)
            for key_id, when, text in found
        ]
