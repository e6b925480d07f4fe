"""A registry in a directory: files named by digest, and an index that says what is published.

    ROOT/lock               held, shared, by everyone who has the registry open
    ROOT/index.sqlite       the book
    ROOT/blobs, quarantine  the bytes, as ``directory_blobs`` says

Renaming, removing and putting aside happen inside a write transaction of the index: they cannot
meet each other, whoever else has the directory open.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, final

from esper.registry.book import Book
from esper.registry.directory_blobs import DirectoryBlobs
from esper.registry.disk import Disk
from esper.registry.screening import MAX_ARTIFACT_BYTES
from esper.registry.sqlite_database import SqliteFile
from esper.registry.stored import StoredRegistry
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable


@final
class DirectoryRegistry(StoredRegistry):
    """A :class:`~esper.contracts.ports.Registry` on disk, for threads and processes alike.

    Opening it reads no artifact, and removes what an interrupted put left, if nobody else has the
    directory open. Bytes that are wrong go to quarantine when they are got, or by ``verify``.

    Args:
        root: The directory; made where it is missing, its parents too.
        disk: Who makes the calls to the machine.
        wall_s: Seconds since 1970, for histories and grace periods. It may jump: that can only
            hasten or delay a collection, which takes nothing that is published.
        max_artifact_bytes: Longest artifact that is taken.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written, or its index is
            gone, or another, while artifacts are there.
        ValueError: It was written by a newer Esper.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        disk: Disk | None = None,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        self._root = Path(root).absolute()
        self._disk = disk or Disk()
        blobs = DirectoryBlobs(self._root, self._disk)
        index = self._root / "index.sqlite"
        book = Book(SqliteFile(index, self._disk))
        super().__init__(book, blobs, wall_s=wall_s, max_artifact_bytes=max_artifact_bytes)
        with self.reporting("open"):
            blobs.make()
            lock, alone = self._disk.lock(self._root / "lock")
            self._closing = weakref.finalize(self, _close, self._disk, book, lock)
            with ExitStack() as undo:
                undo.callback(self.close)
                self.refuse_orphans(lambda: self._disk.exists(index) and self._disk.size(index) > 0)
                book.open()
                self.refuse_bytes_of_others()
                self._disk.sync_directory(self._root)
                blobs.recover(alone=alone)
                self._disk.share(lock)
                undo.pop_all()

    @property
    def root(self) -> Path:
        """The directory, absolute."""
        return self._root

    def close(self) -> None:
        """Give back files and connections; see :class:`~esper.contracts.ports.Registry`."""
        self._closing()

    def __reduce__(self) -> tuple[object, ...]:
        """Travel as an address: a copy opens the same directory."""
        return DirectoryRegistry, (self._root,)


def _close(disk: Disk, book: Book, lock: int) -> None:
    book.close()
    disk.close(lock)
