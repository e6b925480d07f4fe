"""Where bytes are kept, whoever says what they mean. Names are digests, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class BlobPart(Protocol):
    """Bytes on their way into a store. Whoever got one ends it by ``discard``, put or not."""

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes at the end."""

    def seal(self, digest: str) -> None:
        """End the bytes, whose sha256 is ``digest``, and do all of a put that takes long."""

    def discard(self) -> None:
        """Clear up. Does nothing to what was put; doing it twice does nothing."""


class BlobStore(Protocol):
    """Keeps blobs by digest, as many at a time as anyone likes.

    ``put``, ``remove`` and ``set_aside`` are called inside a write transaction of the book, so
    that they never meet each other, whoever else uses the store. Every method raises ``OSError``
    where the store did not do its part.

    Attributes:
        place: Where it is, for messages; without a password.
    """

    place: str

    def recover(self, *, alone: bool) -> None:
        """Make the store where it is missing; clear up after others where nobody else uses it."""

    def owner(self) -> str | None:
        """Return the name of the book that says what the blobs are; None where none does."""

    def claim(self, book: str) -> None:
        """Give the blobs a book's name, where they have none; it survives a power failure."""

    def receive(self) -> BlobPart:
        """Begin a blob."""

    def put(self, digest: str, part: BlobPart) -> None:
        """Give a sealed part its name, and look that it is there and survives a power failure.

        A blob that is there already is left, or written over by the same bytes.

        Raises:
            OSError: It is not there now; seal another part and try again.
        """

    def stat(self, digest: str) -> int | None:
        """Return a blob's length in bytes, or None where there is none."""

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a blob's bytes from ``start`` on, ``length`` at most; fewer only at its end.

        Raises:
            FileNotFoundError: There is none.
        """

    def remove(self, digest: str) -> None:
        """Remove a blob; does nothing where there is none."""

    def set_aside(self, digest: str) -> str:
        """Put a blob whose bytes are wrong where nobody is served from, and say where."""

    def list(self) -> Iterable[str]:
        """Return the digests of all blobs, in any order."""
