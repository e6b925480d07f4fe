"""A registry that several servers share: a database for the book, a store for the bytes."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, final

from esper.registry.screening import MAX_ARTIFACT_BYTES
from esper.registry.stored import StoredRegistry
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.registry.blobs import BlobStore
    from esper.registry.book import Book


@final
class SharedRegistry(StoredRegistry):
    """A :class:`~esper.contracts.ports.Registry` over any book and any blob store.

    Args:
        book: What is published, and what is said of it; migrated where it is older.
        blobs: Where the bytes are.
        wall_s: Seconds since 1970, for histories and grace periods.
        max_artifact_bytes: Longest artifact that is taken.

    Raises:
        KernelSourceUnavailable: The book or the blob store did not do its part, or the book is
            gone, or another, while artifacts are there.
        ValueError: The book was written by a newer Esper.
    """

    def __init__(
        self,
        book: Book,
        blobs: BlobStore,
        *,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        super().__init__(book, blobs, wall_s=wall_s, max_artifact_bytes=max_artifact_bytes)
        with self.reporting("open"), ExitStack() as undo:
            undo.callback(self.close)
            self.refuse_orphans(lambda: book.database.version() > 0)
            book.open()
            with suppress(OSError):  # one that is away is looked at by a put and a collection
                self.refuse_bytes_of_others()
            blobs.recover(alone=False)
            undo.pop_all()

    def close(self) -> None:
        """Give back connections; see :class:`~esper.contracts.ports.Registry`."""
        self.book.close()
