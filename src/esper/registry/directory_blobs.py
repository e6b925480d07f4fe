"""Blobs as files of a directory, each of which is there whole or not at all.

ROOT/blobs/DIGEST                 bytes
ROOT/blobs/book                   name of the book that says what they are
ROOT/blobs/.DIGEST.RANDOM.part    bytes on their way
ROOT/quarantine/DIGEST.N          bytes that were not what their name said
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from esper.contracts import reference

if TYPE_CHECKING:
    from pathlib import Path

    from esper.registry.blobs import BlobPart
    from esper.registry.disk import Disk

_PART: Final = ".part"
_BOOK: Final = "book"
_LONGEST_NAME: Final = 256


@final
class DirectoryBlobs:
    """A :class:`~esper.registry.blobs.BlobStore` below a directory.

    Args:
        root: The directory; made where it is missing, its parents too.
        disk: Who makes the calls to the machine.
    """

    def __init__(self, root: Path, disk: Disk) -> None:
        self.place = str(root)
        self._blobs = root / "blobs"
        self._quarantine = root / "quarantine"
        self._disk = disk

    def make(self) -> None:
        """Make the directories that are missing."""
        for directory in (self._blobs, self._quarantine):
            self._make_directory(directory)

    def recover(self, *, alone: bool) -> None:
        """Remove what an interrupted put left, where nobody else may be writing it."""
        if alone:
            for name in self._disk.list_names(self._blobs):
                if name.endswith(_PART):
                    self._disk.remove(self._blobs / name)

    def owner(self) -> str | None:
        """Return the name of the book that says what the blobs are."""
        try:
            name = self._disk.read(self._blobs / _BOOK, _LONGEST_NAME)
        except FileNotFoundError:
            return None
        return name.decode(errors="replace").strip() or None

    def claim(self, book: str) -> None:
        """Write a book's name, where there is none, so that it is there whole or not at all."""
        if self.owner() is not None:
            return
        part = _FilePart(self._blobs / f".{secrets.token_hex(16)}{_PART}", self._disk)
        try:
            part.write(book.encode())
            part.seal(book)
            self._rename(part, _BOOK)
        finally:
            part.discard()

    def receive(self) -> BlobPart:
        """Begin a file under a name that no blob has."""
        return _FilePart(self._blobs / f".{secrets.token_hex(16)}{_PART}", self._disk)

    def put(self, digest: str, part: BlobPart) -> None:
        """Rename a part, and sync the directory."""
        assert isinstance(part, _FilePart)
        self._rename(part, digest)

    def stat(self, digest: str) -> int | None:
        """Return a blob's length in bytes, or None where there is none."""
        try:
            return self._disk.size(self._blobs / digest)
        except FileNotFoundError:
            return None

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return some of a blob's bytes."""
        return self._disk.read(self._blobs / digest, length, start)

    def remove(self, digest: str) -> None:
        """Remove a blob; does nothing where there is none."""
        with suppress(FileNotFoundError):
            self._disk.remove(self._blobs / digest)

    def set_aside(self, digest: str) -> str:
        """Move a blob into quarantine, beside what is there."""
        taken = set(self._disk.list_names(self._quarantine))
        number = next(n for n in range(len(taken) + 1) if f"{digest}.{n}" not in taken)
        target = self._quarantine / f"{digest}.{number}"
        self._disk.rename(self._blobs / digest, target)
        self._disk.sync_directory(self._quarantine)
        self._disk.sync_directory(self._blobs)
        return str(target)

    def list(self) -> set[str]:
        """Return the digests of all blobs."""
        return set(filter(reference.is_digest, self._disk.list_names(self._blobs)))

    def _rename(self, part: _FilePart, name: str) -> None:
        self._disk.rename(part.path, self._blobs / name)
        part.is_put = True
        self._disk.sync_directory(self._blobs)

    def _make_directory(self, path: Path) -> None:
        """Make a directory and its parents so that they survive a power failure."""
        if not self._disk.exists(path):
            self._make_directory(path.parent)
            self._disk.make_directory(path)
            self._disk.sync_directory(path.parent)


@final
class _FilePart:
    """A file that is being written; it has a blob's name only when all of it is safe."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.is_put = False
        self._disk = disk
        self._descriptor: int | None = disk.create(path)

    def write(self, data: bytes | memoryview) -> None:
        assert self._descriptor is not None, "a sealed part takes no bytes"
        rest = memoryview(data)
        while rest:
            rest = rest[self._disk.write(self._descriptor, rest) :]

    def seal(self, digest: str) -> None:  # noqa: ARG002 - a file is named when it is put
        assert self._descriptor is not None, "a part is sealed once"
        self._disk.sync(self._descriptor)
        self._close()

    def discard(self) -> None:
        with suppress(OSError):  # what stays is removed when the directory is opened again
            if self._descriptor is not None:
                self._close()
        if not self.is_put:
            with suppress(OSError):
                self._disk.remove(self.path)
            self.is_put = True

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        assert descriptor is not None
        self._disk.close(descriptor)
