"""A registry in memory: for tests, notebooks and runs that keep nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, final

from esper.registry.book import Book
from esper.registry.memory_blobs import MemoryBlobs
from esper.registry.screening import MAX_ARTIFACT_BYTES
from esper.registry.sqlite_database import SqliteMemory
from esper.registry.stored import StoredRegistry
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def _with_tables() -> bytes:
    """Return a database with nothing in its tables: to copy one is quicker than to make them."""
    database = SqliteMemory()
    Book(database).open()
    return database.content()


def empty_book() -> Book:
    """Return a book in memory with nothing in it."""
    return Book(SqliteMemory(_with_tables()))


@final
class MemoryRegistry(StoredRegistry):
    """A :class:`~esper.contracts.ports.Registry` that ends with its process.

    Args:
        wall_s: Seconds since 1970, for histories and grace periods.
        max_artifact_bytes: Longest artifact that is taken.
    """

    def __init__(
        self,
        *,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        blobs = MemoryBlobs()
        super().__init__(empty_book(), blobs, wall_s=wall_s, max_artifact_bytes=max_artifact_bytes)

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""
