"""What the book asks of a database, and the few words in which databases differ.

Statements are SQL that SQLite and PostgreSQL read alike, with values by name (``:digest``). Where
they have no word in common, a statement has the name of one in braces (``{now}``), and the database
fills in its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

Row = tuple[Any, ...]
"""What a database gives for a row; its statement says of what types."""


NO_LIMIT: Final = 1 << 62
"""The limit of a query that has none; no database counts as far."""


class DatabaseError(OSError):
    """The database did not do its part; what was asked of it may be asked again."""


class Database(Protocol):
    """Runs statements. Every method raises ``DatabaseError`` where the database failed.

    Attributes:
        place: Where it is, for messages; without a password.
        words: What statements have in braces: ``serial``, ``text``, ``now``, ``skip_locked``.
    """

    place: str
    words: Mapping[str, str]

    def rows(self, statement: str, /, **values: object) -> list[Row]:
        """Run one statement and return its rows."""

    def transaction(self) -> AbstractContextManager[None]:
        """Be the only writer, whoever else has the database open; all of it is kept or none.

        What is kept when this returns survives a power failure.
        """

    def version(self) -> int:
        """Return the number of the schema that the database has; 0 where it has none."""

    def set_version(self, version: int) -> None:
        """Say which schema the database has now; inside a transaction."""

    def close(self) -> None:
        """Give back connections. The next statement opens others."""


SQLITE: dict[str, str] = {
    "serial": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "text": "TEXT",
    "now": "((julianday('now') - 2440587.5) * 86400.0)",
    "skip_locked": "",
}
"""SQLite's words. It has one writer at a time, so that nothing is locked row by row."""
