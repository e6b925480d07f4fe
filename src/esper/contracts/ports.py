"""The ports: what a room asks of another without knowing who answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from esper.contracts.events import Event


class KernelSource(Protocol):
    """Where kernels come from. One method: an address is a digest and nothing else."""

    def fetch(self, digest: str) -> bytes:
        """Return the artifact whose sha256 is ``digest``.

        Args:
            digest: 64 lower-case hexadecimal digits.

        Returns:
            The artifact's bytes. The caller compares their sha256 with ``digest``.

        Raises:
            KernelNotFoundError: The source answered that it has no such artifact.
            KernelCorruptError: The source has it and its bytes are damaged.
            KernelSourceUnavailable: The source did not answer.
        """
        ...


class EventSink(Protocol):
    """Something that takes events. It may not raise and may not keep the caller waiting."""

    def publish(self, event: Event) -> None:
        """Take one event."""
        ...


class Clock(Protocol):
    """A monotonic clock, injected wherever a duration is measured."""

    def now(self) -> float:
        """Return seconds since an arbitrary start; never falls."""
        ...
