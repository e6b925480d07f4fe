"""Blobs in memory, which end with their process."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from esper.registry.blobs import BlobPart


@final
class MemoryBlobs:
    """A :class:`~esper.registry.blobs.BlobStore` in a dict."""

    place = "memory"

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._aside: list[bytes] = []
        self._owner: str | None = None

    def recover(self, *, alone: bool) -> None:
        """Do nothing: nothing is left of others."""

    def owner(self) -> str | None:
        """Return the name of the book that says what the blobs are."""
        return self._owner

    def claim(self, book: str) -> None:
        """Keep a book's name, where there is none."""
        if self._owner is None:
            self._owner = book

    def receive(self) -> BlobPart:
        """Begin a blob."""
        return _MemoryPart()

    def put(self, digest: str, part: BlobPart) -> None:
        """Keep a part's bytes."""
        assert isinstance(part, _MemoryPart)
        self._blobs[digest] = part.data

    def stat(self, digest: str) -> int | None:
        """Return a blob's length in bytes, or None where there is none."""
        data = self._blobs.get(digest)
        return None if data is None else len(data)

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return some of a blob's bytes; all of them are the blob itself."""
        try:
            return self._blobs[digest][start : start + length]
        except KeyError:
            raise FileNotFoundError(digest) from None

    def remove(self, digest: str) -> None:
        """Remove a blob; does nothing where there is none."""
        self._blobs.pop(digest, None)

    def set_aside(self, digest: str) -> str:
        """Keep a blob where nobody is served from."""
        self._aside.append(self._blobs.pop(digest))
        return "memory"

    def list(self) -> list[str]:
        """Return the digests of all blobs."""
        return list(self._blobs)


@final
class _MemoryPart:
    def __init__(self) -> None:
        self.data = b""
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> None:
        self._parts.append(bytes(data))

    def seal(self, digest: str) -> None:  # noqa: ARG002 - bytes in memory have no name yet
        self.data = b"".join(self._parts)

    def discard(self) -> None:
        self._parts.clear()
