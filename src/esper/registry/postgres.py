"""A book in PostgreSQL; needs the extras ``server`` and ``postgres``."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from esper.registry.database import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from esper.registry.database import Row

_WORDS: Final = {
    "serial": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "text": 'TEXT COLLATE "C"',
    "now": "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)",
    "skip_locked": "FOR UPDATE SKIP LOCKED",
}
_WRITERS_LOCK: Final = 0x657370_6572
"""The advisory lock of whoever is the only writer: "esper"."""

_HAS_SCHEMA: Final = """
    SELECT 1 FROM pg_catalog.pg_tables
    WHERE tablename = 'esper_schema' AND schemaname = current_schema()"""
"""A query of rows, since ``to_regclass`` answers from a cache: who has waited for the lock while
another made the tables would still not see them."""

_SESSION: Final = (
    "-c synchronous_commit=on -c statement_timeout=30000 -c lock_timeout=20000 "
    "-c idle_in_transaction_session_timeout=60000"
)
"""An answered commit is on disk, whatever the server's default; and nothing is waited for without
end."""


@final
class PostgresDatabase:
    """A :class:`~esper.registry.database.Database` in PostgreSQL, for any number of threads.

    Args:
        url: ``postgresql://user:password@host:port/name``.

    Raises:
        ValueError: The address is of another kind.
    """

    def __init__(self, url: str) -> None:
        try:
            address = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
        except SQLAlchemyError as error:
            msg = "a database is at postgresql://user:password@host:port/name"
            raise ValueError(msg) from error
        self.place: str = address.render_as_string(hide_password=True).replace("+psycopg", "")
        self.words: Mapping[str, str] = _WORDS
        self._engine = sqlalchemy.create_engine(
            address,
            pool_pre_ping=True,  # a connection that the server has closed is replaced unnoticed
            pool_size=8,
            max_overflow=8,
            pool_timeout=10,
            connect_args={"connect_timeout": 5, "options": _SESSION},
        )
        self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._in_transaction = threading.local()

    def rows(self, statement: str, /, **values: object) -> list[Row]:
        """Run one statement; see :class:`~esper.registry.database.Database`."""
        connection = getattr(self._in_transaction, "connection", None)
        with _translated():
            if connection is not None:
                return _rows(connection, statement, values)
            with self._single.connect() as connection:
                return _rows(connection, statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Be the only writer; see :class:`~esper.registry.database.Database`."""
        with _translated(), self._engine.begin() as connection:
            _rows(connection, "SELECT pg_advisory_xact_lock(:lock)", {"lock": _WRITERS_LOCK})
            self._in_transaction.connection = connection
            try:
                yield
            finally:
                del self._in_transaction.connection

    def version(self) -> int:
        """Return the schema's number; see :class:`~esper.registry.database.Database`."""
        if not self.rows(_HAS_SCHEMA):
            return 0
        return int(self.rows("SELECT version FROM esper_schema")[0][0])

    def set_version(self, version: int) -> None:
        """Say the schema's number; see :class:`~esper.registry.database.Database`."""
        self.rows("CREATE TABLE IF NOT EXISTS esper_schema (version INTEGER NOT NULL)")
        self.rows("DELETE FROM esper_schema")
        self.rows("INSERT INTO esper_schema VALUES (:version)", version=version)

    def close(self) -> None:
        """Close every connection; the next statement opens others."""
        self._engine.dispose()


def _rows(
    connection: sqlalchemy.Connection, statement: str, values: Mapping[str, object]
) -> list[Row]:
    result = connection.execute(sqlalchemy.text(statement), values)
    return [tuple(row) for row in result] if result.returns_rows else []


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise DatabaseError(f"{type(error).__name__}: {error}") from error
