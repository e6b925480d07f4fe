"""An artifact on its way into a registry, in parts, none of which is kept in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, Self, final

SLOWEST_BYTES_PER_S: Final = 65_536.0
"""How fast an artifact has to travel to a registry and from it, on average."""

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType

    from esper.registry.blobs import BlobPart, BlobStore
    from esper.registry.screening import Screened, Screening


class Publishes(Protocol):
    """What of a registry an upload needs."""

    def reporting(self, doing: str) -> AbstractContextManager[None]:
        """Turn what the machine says into what a caller can act upon."""

    def holds(self, digest: str) -> bool:
        """Say whether an artifact is published and intact."""

    def seal(self, digest: str, part: BlobPart) -> None:
        """End an artifact's bytes, and do all of a put that takes long."""

    def enter(self, screened: Screened, part: BlobPart, actor: str | None) -> None:
        """Give sealed bytes their name and publish them."""


@final
class Upload:
    """An artifact on its way in: ``write`` its bytes, then ``publish``; a context manager.

    Args:
        registry: Where it is published.
        blobs: Where its bytes go.
        screening: What looks at them as they come.
        actor: Who publishes it, where that is known.
    """

    def __init__(
        self, registry: Publishes, blobs: BlobStore, screening: Screening, actor: str | None
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._screening = screening
        self._actor = actor
        self._part: BlobPart | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Take some bytes.

        Raises:
            KernelCorruptError: They are no artifact's.
            KernelSourceUnavailable: They could not be stored.
            ValueError: The artifact is longer than the registry takes.
        """
        self._screening.update(data)
        with self._registry.reporting("store an artifact"):
            if self._part is None:
                self._part = self._blobs.receive()
            self._part.write(data)

    def publish(self) -> str:
        """End the bytes, and publish them; see ``Registry.put``.

        Returns:
            The digest.

        Raises:
            KernelCorruptError: The bytes are no artifact, or not the one that was announced.
            KernelSourceUnavailable: They could not be stored; nothing was published.
        """
        screened = self._screening.finish()
        with self._registry.reporting(f"put {screened.digest}"):
            if not self._registry.holds(screened.digest):
                assert self._part is not None, "an artifact has bytes"
                self._registry.seal(screened.digest, self._part)
                self._registry.enter(screened, self._part, self._actor)
        return screened.digest

    def close(self) -> None:
        """Clear up; what was published stays."""
        if self._part is not None:
            self._part.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
