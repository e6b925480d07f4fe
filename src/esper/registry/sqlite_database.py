"""A book in an SQLite file, or in memory.

The file has a write-ahead log and ``synchronous=FULL``: a committed row survives a power failure.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final, final

from esper.registry.database import SQLITE, DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from esper.registry.database import Row
    from esper.registry.disk import Disk

_OF_A_PARENT_PROCESS: Final[list[sqlite3.Connection]] = []
"""Connections that came over a fork. Closing one here would disturb the parent's files."""


@final
class SqliteFile:
    """A :class:`~esper.registry.database.Database` in a file.

    One connection, used by one thread at a time and opened again where it failed or forked.

    Args:
        path: The SQLite file.
        disk: Who makes the calls.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.place = str(path)
        self.words: Mapping[str, str] = SQLITE
        self._path = path
        self._disk = disk
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()

    def rows(self, statement: str, /, **values: object) -> list[Row]:
        """Run one statement; see :class:`~esper.registry.database.Database`."""
        with self._lock, _translated():
            return self._disk.execute(self._connected(), statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Be the only writer; see :class:`~esper.registry.database.Database`.

        After any exception the connection is dropped, which undoes what it had begun: there is
        no statement left whose own failure would have to be handled.
        """
        with self._lock, ExitStack() as undo:
            undo.callback(self.close)
            self.rows("BEGIN IMMEDIATE")
            yield
            self.rows("COMMIT")
            undo.pop_all()

    def version(self) -> int:
        """Return the schema's number; see :class:`~esper.registry.database.Database`."""
        return int(self.rows("PRAGMA user_version")[0][0])

    def set_version(self, version: int) -> None:
        """Say the schema's number; see :class:`~esper.registry.database.Database`."""
        self.rows(f"PRAGMA user_version = {version:d}")

    def close(self) -> None:
        """Drop the connection. The next statement opens another."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            if self._process == os.getpid():
                with suppress(sqlite3.Error):
                    connection.close()
            else:
                _OF_A_PARENT_PROCESS.append(connection)

    def _connected(self) -> sqlite3.Connection:
        if self._process != os.getpid():
            self.close()
        if self._connection is None:
            self._process = os.getpid()
            connection = self._disk.connect(self._path)
            with ExitStack() as undo:
                undo.callback(connection.close)
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                    self._disk.execute(connection, f"PRAGMA {pragma}", {})
                undo.pop_all()
            self._connection = connection
        return self._connection


@final
class SqliteMemory:
    """A :class:`~esper.registry.database.Database` that ends with its process.

    It travels by its bytes: one that was pickled or copied has what was in it then.

    Args:
        content: The bytes of a database that it begins with; None for an empty one.
    """

    place: str = "memory"
    words: Mapping[str, str] = SQLITE

    def __init__(self, content: bytes | None = None) -> None:
        self._lock = threading.RLock()
        self._connection = _memory()
        if content is not None:
            self._connection.deserialize(content)

    def content(self) -> bytes:
        """Return the bytes of the database."""
        with self._lock:
            return self._connection.serialize()

    def rows(self, statement: str, /, **values: object) -> list[Row]:
        """Run one statement; see :class:`~esper.registry.database.Database`."""
        with self._lock, _translated():
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Be the only writer; see :class:`~esper.registry.database.Database`."""
        with self._lock, ExitStack() as undo:
            self.rows("BEGIN")
            undo.callback(self.rows, "ROLLBACK")
            yield
            undo.pop_all()
            self.rows("COMMIT")

    def version(self) -> int:
        """Return the schema's number; see :class:`~esper.registry.database.Database`."""
        return int(self.rows("PRAGMA user_version")[0][0])

    def set_version(self, version: int) -> None:
        """Say the schema's number; see :class:`~esper.registry.database.Database`."""
        self.rows(f"PRAGMA user_version = {version:d}")

    def close(self) -> None:
        """Do nothing: what is in memory is there until nobody has it any more."""

    def __reduce__(self) -> tuple[object, ...]:
        return SqliteMemory, (self.content(),)


def _memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(str(error)) from error
