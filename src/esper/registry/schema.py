"""The tables of a book, and how one that an earlier Esper made becomes one of today.

Step ``n`` makes version ``n`` out of the one before, on SQLite and PostgreSQL alike, so that a
database that is empty and one that is old take the same way. A released step is never changed.
A row in ``artifacts`` is what makes an artifact published; the bytes are there before it is.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Final

from esper.contracts.artifact import KernelMetadata
from esper.contracts.kernel_reports import FieldReport
from esper.registry.standings import OF_ARTIFACT, pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.registry.database import Database

    _Step = str | Callable[[Database], None]

SEARCHED: Final = (
    "blueprint_id",
    "blueprint_digest",
    "mode",
    "position",
    "adds_capacity",
    "draws_random",
    "parameter_count",
    "dtype",
    "in_features",
    "out_features",
    "num_axes",
)
"""What the metadata says that has a column of its own, by the name of its attribute."""


TURN: Final = (
    "(CASE status WHEN 'UNVALIDATED' THEN submitted_at_s + 30.0 * num_losses "
    "WHEN 'COMPILING' THEN submitted_at_s + 30.0 * (num_losses + 1) END)"
)
"""When a job's turn is, in seconds since 1970; null where it has none.

Each worker that was lost over it makes it half a minute younger, and the one that has it is lost
if it is ever claimed again. Jobs are indexed by these very words: whoever changes them adds a step.
"""


def columns_of(metadata: KernelMetadata) -> dict[str, object]:
    """Return the values of the columns in ``SEARCHED``; flags are 0 and 1."""
    values = {name: getattr(metadata, name) for name in SEARCHED}
    return {name: int(v) if isinstance(v, bool) else v for name, v in values.items()}


def migrate(database: Database) -> int:
    """Bring a database to the schema of this Esper, all of the way or not at all.

    Any number of processes may do this at once: one does it, the others find it done.

    Returns:
        The version that it had before.

    Raises:
        ValueError: The database was written by a newer Esper.
        DatabaseError: The database could not do it; it is as it was.
    """
    found = _check(database)
    if found == VERSION:
        return found
    with database.transaction():
        before = _check(database)
        for version in range(before + 1, VERSION + 1):
            for step in _STEPS[version - 1]:
                if isinstance(step, str):
                    database.rows(step.format_map(database.words))
                else:
                    step(database)
            database.set_version(version)
    return before


def _check(database: Database) -> int:
    found = database.version()
    if found > VERSION:
        msg = (
            f"{database.place} has format {found}, and this Esper knows formats up to {VERSION}; "
            "open it with a newer Esper"
        )
        raise ValueError(msg)
    return found


def _fill_columns(database: Database) -> None:
    """Give the artifacts of version 1 the columns that version 2 searches by."""
    assignments = ", ".join(f"{name} = :{name}" for name in SEARCHED)
    for digest, metadata in database.rows("SELECT digest, metadata FROM artifacts"):
        values = columns_of(KernelMetadata.from_document(json.loads(metadata)))
        statement = f"UPDATE artifacts SET {assignments} WHERE digest = :digest"  # noqa: S608 - names of our own
        database.rows(statement, digest=digest, **values)


def _pool_outcomes(database: Database) -> None:
    """Give the outcomes of version 2 the columns that version 3 pools by, and pool them."""
    for seq, text in database.rows("SELECT seq, report FROM outcomes"):
        report = FieldReport.from_document(json.loads(text))
        database.rows(
            f"UPDATE outcomes SET blueprint_digest = {OF_ARTIFACT}, site_kind = :site_kind "  # noqa: S608 - words of our own
            "WHERE seq = :seq",
            seq=seq,
            digest=report.artifact_id,
            said=report.blueprint_digest,
            site_kind=report.site_kind,
        )
    for found in database.rows("SELECT DISTINCT blueprint_digest, site_kind FROM outcomes"):
        pool(database, *found)


def _name_book(database: Database) -> None:
    """Give the book the name by which its bytes are known from those of another."""
    database.rows("INSERT INTO identity VALUES (:id)", id=secrets.token_hex(16))


_STEPS: Final[tuple[tuple[_Step, ...], ...]] = (
    (
        """CREATE TABLE artifacts (
            seq {serial}, digest {text} NOT NULL UNIQUE,
            size_bytes BIGINT NOT NULL, metadata {text} NOT NULL, record {text} NOT NULL)""",
        """CREATE TABLE tags (
            name {text} NOT NULL, tag {text} NOT NULL,
            digest {text} NOT NULL REFERENCES artifacts (digest), PRIMARY KEY (name, tag))""",
        "CREATE INDEX tags_by_digest ON tags (digest)",
        """CREATE TABLE tag_moves (
            seq {serial}, name {text} NOT NULL, tag {text} NOT NULL,
            digest {text}, moved_at_s DOUBLE PRECISION NOT NULL)""",
        "CREATE INDEX tag_moves_by_name ON tag_moves (name, tag)",
        "CREATE TABLE condemned (digest {text} PRIMARY KEY, since_s DOUBLE PRECISION NOT NULL)",
    ),
    (
        "ALTER TABLE artifacts ADD COLUMN blueprint_id {text} NOT NULL DEFAULT ''",
        "ALTER TABLE artifacts ADD COLUMN blueprint_digest {text} NOT NULL DEFAULT ''",
        "ALTER TABLE artifacts ADD COLUMN mode {text} NOT NULL DEFAULT ''",
        "ALTER TABLE artifacts ADD COLUMN position {text} NOT NULL DEFAULT ''",
        "ALTER TABLE artifacts ADD COLUMN adds_capacity INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE artifacts ADD COLUMN draws_random INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE artifacts ADD COLUMN parameter_count BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE artifacts ADD COLUMN dtype {text} NOT NULL DEFAULT ''",
        "ALTER TABLE artifacts ADD COLUMN in_features BIGINT",
        "ALTER TABLE artifacts ADD COLUMN out_features BIGINT",
        "ALTER TABLE artifacts ADD COLUMN num_axes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE artifacts ADD COLUMN published_at_s DOUBLE PRECISION",
        "CREATE INDEX artifacts_by_blueprint ON artifacts (blueprint_digest)",
        "CREATE INDEX artifacts_by_fit ON artifacts (out_features, in_features, num_axes, dtype)",
        "ALTER TABLE tag_moves ADD COLUMN actor {text}",
        """CREATE TABLE deprecations (
            digest {text} PRIMARY KEY, reason {text} NOT NULL, successor {text}, actor {text},
            deprecated_at_s DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE outcomes (
            seq {serial}, digest {text} NOT NULL, run_id {text} NOT NULL, graft_id {text} NOT NULL,
            report {text} NOT NULL, UNIQUE (run_id, graft_id))""",
        "CREATE INDEX outcomes_by_digest ON outcomes (digest)",
        """CREATE TABLE validations (
            seq {serial}, digest {text} NOT NULL, report {text} NOT NULL)""",
        "CREATE INDEX validations_by_digest ON validations (digest)",
        """CREATE TABLE jobs (
            seq {serial}, id {text} NOT NULL UNIQUE,
            blueprint_digest {text} NOT NULL, toolchain {text} NOT NULL, options {text} NOT NULL,
            blueprint {text} NOT NULL, status {text} NOT NULL, attempts INTEGER NOT NULL,
            num_losses INTEGER NOT NULL, worker {text}, leased_until_s DOUBLE PRECISION,
            artifact_id {text}, report {text}, submitted_by {text},
            submitted_at_s DOUBLE PRECISION NOT NULL,
            UNIQUE (blueprint_digest, toolchain, options))""",
        "CREATE INDEX jobs_to_do ON jobs (status, leased_until_s, seq)",
        """CREATE TABLE tokens (
            id {text} PRIMARY KEY, name {text} NOT NULL, sha256 {text} NOT NULL UNIQUE,
            scopes {text} NOT NULL, created_at_s DOUBLE PRECISION NOT NULL,
            revoked_at_s DOUBLE PRECISION)""",
        """CREATE TABLE audit (
            seq {serial}, at_s DOUBLE PRECISION NOT NULL, actor {text} NOT NULL,
            action {text} NOT NULL, subject {text} NOT NULL, detail {text} NOT NULL)""",
        _fill_columns,
    ),
    (
        """CREATE TABLE signatures (
            seq {serial}, digest {text} NOT NULL, key_id {text} NOT NULL,
            signed_at_s BIGINT NOT NULL, signature {text} NOT NULL,
            UNIQUE (digest, key_id, signed_at_s, signature))""",
        "ALTER TABLE outcomes ADD COLUMN blueprint_digest {text} NOT NULL DEFAULT ''",
        "ALTER TABLE outcomes ADD COLUMN site_kind {text} NOT NULL DEFAULT ''",
        "CREATE INDEX outcomes_by_blueprint ON outcomes (blueprint_digest, site_kind)",
        """CREATE TABLE standings (
            of_blueprint {text} NOT NULL, at_kind {text} NOT NULL,
            effect DOUBLE PRECISION NOT NULL, standard_error DOUBLE PRECISION NOT NULL,
            lower_bound DOUBLE PRECISION NOT NULL, num_runs BIGINT NOT NULL,
            PRIMARY KEY (of_blueprint, at_kind))""",
        _pool_outcomes,
    ),
    (f"CREATE INDEX jobs_in_turn ON jobs ({TURN}, seq)",),
    ("CREATE TABLE identity (id {text} PRIMARY KEY)", _name_book),
)

VERSION: Final = len(_STEPS)
