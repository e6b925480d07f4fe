"""The book of a registry: everything that is said of artifacts, whichever database keeps it.

There is one text of it for SQLite and PostgreSQL (ADR 0028). Each of its chapters is a class over
the same database; what must hold together is done inside one ``transaction``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from esper.registry.book_access import Audit, Tokens
from esper.registry.book_artifacts import Artifacts
from esper.registry.book_jobs import Jobs
from esper.registry.book_reports import Reports
from esper.registry.book_tags import Tags
from esper.registry.schema import migrate

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from esper.registry.database import Database


@final
class Book:
    """What is published, and what is said of it.

    Args:
        database: Who keeps it.

    Attributes:
        artifacts: What is published, and which bytes are on their way out.
        tags: Names, where they point, and where they pointed.
        reports: What was said of artifacts after they were published.
        jobs: Blueprints that are to be compiled, and who is at it.
        tokens: Who may do what.
        audit: Who did what.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.artifacts = Artifacts(database)
        self.tags = Tags(database)
        self.reports = Reports(database)
        self.jobs = Jobs(database)
        self.tokens = Tokens(database)
        self.audit = Audit(database)

    @property
    def place(self) -> str:
        """Where it is kept, for messages."""
        return self.database.place

    def open(self) -> None:
        """Bring the database to the schema of this Esper.

        Raises:
            ValueError: It was written by a newer Esper.
            DatabaseError: The database could not do it.
        """
        migrate(self.database)

    def identity(self) -> str:
        """Return the name by which this book is known from every other; empty where it lost it."""
        return "".join(name for (name,) in self.database.rows("SELECT id FROM identity LIMIT 1"))

    def is_blank(self, probe: str) -> bool:
        """Say whether nothing was ever entered, the digest of a probe aside."""
        return not self.database.rows(
            "SELECT 1 FROM artifacts UNION ALL SELECT 1 FROM tag_moves "
            "UNION ALL SELECT 1 FROM condemned WHERE digest <> :probe LIMIT 1",
            probe=probe,
        )

    def transaction(self) -> AbstractContextManager[None]:
        """Be the only writer; see :class:`~esper.registry.database.Database`."""
        return self.database.transaction()

    def close(self) -> None:
        """Give back connections."""
        self.database.close()
