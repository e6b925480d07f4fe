"""The index of a directory registry: which bytes are published, and what is said of them.

One SQLite file, write-ahead log, ``synchronous=FULL``: a committed row survives a power failure.
A row in ``artifacts`` is what makes an artifact published; the bytes are there before it is.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from esper.registry.disk import Disk, Row

FORMAT_VERSION: Final = 1

_SCHEMA: Final = (
    """CREATE TABLE artifacts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE,
        size_bytes INTEGER NOT NULL, metadata TEXT NOT NULL, record TEXT NOT NULL)""",
    """CREATE TABLE tags (
        name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT NOT NULL REFERENCES artifacts (digest), PRIMARY KEY (name, tag))""",
    "CREATE INDEX tags_by_digest ON tags (digest)",
    """CREATE TABLE tag_moves (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT, moved_at_s REAL NOT NULL)""",
    "CREATE INDEX tag_moves_by_name ON tag_moves (name, tag)",
    "CREATE TABLE condemned (digest TEXT PRIMARY KEY, since_s REAL NOT NULL)",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)

_OF_A_PARENT_PROCESS: Final[list[sqlite3.Connection]] = []
"""Connections that came over a fork. Closing one here would disturb the parent's files."""


class Index:
    """One connection, used by one thread at a time and opened again where it failed or forked.

    Args:
        path: The SQLite file.
        disk: Who makes the calls.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._disk = disk
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()

    def prepare(self) -> None:
        """Create the tables where they are missing.

        Raises:
            ValueError: The file was written by a newer Esper.
        """
        with self.transaction():
            version = int(self.rows("PRAGMA user_version")[0][0])
            if version > FORMAT_VERSION:
                msg = (
                    f"{self._path} has format {version}, and this Esper knows formats up to "
                    f"{FORMAT_VERSION}; open it with a newer Esper"
                )
                raise ValueError(msg)
            if version < FORMAT_VERSION:
                for statement in _SCHEMA:
                    self.rows(statement)

    def rows(self, statement: str, *values: object) -> list[Row]:
        """Run one statement and return its rows.

        Raises:
            sqlite3.Error: SQLite could not do it.
        """
        with self._lock:
            return self._disk.execute(self._connected(), statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Be the only writer, on this machine, of this index; all of it is kept or none.

        After any exception the connection is dropped, which undoes what it had begun: there is
        no statement left whose own failure would have to be handled.
        """
        with self._lock, ExitStack() as undo:
            undo.callback(self.close)
            self.rows("BEGIN IMMEDIATE")
            yield
            self.rows("COMMIT")
            undo.pop_all()

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
                    self._disk.execute(connection, f"PRAGMA {pragma}", ())
                undo.pop_all()
            self._connection = connection
        return self._connection
