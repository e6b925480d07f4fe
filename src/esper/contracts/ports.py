"""The ports: what a room asks of another without knowing who answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from esper.contracts.artifact import KernelMetadata
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Mode, Position
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryEntry:
    """What a registry knows of one artifact without opening it.

    Attributes:
        digest: sha256 of the bytes, 64 lower-case hexadecimal digits.
        size_bytes: Length of the bytes.
        metadata: What its header says about the kernel.
        record: What the publisher kept beside it: compile time, toolchain (JSON values).
        tags: Every ``name:tag`` that points to it now, sorted.
    """

    digest: str
    size_bytes: int
    metadata: KernelMetadata
    record: JsonObject
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TagMove:
    """One line of a tag's history.

    Attributes:
        digest: Where the tag pointed from then on; None where it was taken away.
        moved_at_s: When, in seconds since 1970 by the registry's clock.
    """

    digest: str | None
    moved_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCheck:
    """What a look at every stored artifact found.

    Attributes:
        intact: Number of artifacts whose bytes are what their digest says.
        quarantined: Digests put aside by this look because their bytes were wrong.
        missing: Digests that were published and cannot be served.
        unreferenced: Digests of stored bytes that nobody published or that were deleted.
    """

    intact: int
    quarantined: tuple[str, ...]
    missing: tuple[str, ...]
    unreferenced: tuple[str, ...]


class SearchCriteria(TypedDict, total=False):
    """What :meth:`Registry.search` can ask for. Everything given must hold; all are optional."""

    blueprint_id: str
    blueprint_digest: str
    mode: Mode
    position: Position
    adds_capacity: bool
    draws_random: bool
    min_parameter_count: int
    max_parameter_count: int


class Registry(KernelSource, Protocol):
    """Where artifacts are kept, by digest. Every operation is wholly done or not at all.

    There is no operation that changes an artifact: a digest means the same bytes for ever.
    Every method raises ``KernelSourceUnavailable`` where the storage did not do its part; an
    operation that raised it may be repeated.
    """

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact. When this returns, the bytes survive any crash.

        Publishing the same bytes again changes nothing, the first ``record`` included, and
        repairs the stored bytes where they were damaged.

        Args:
            data: The artifact's bytes.
            digest: What the caller believes their sha256 to be; compared before storing.
            record: What is kept beside the artifact, as JSON values.

        Returns:
            The digest, 64 lower-case hexadecimal digits.

        Raises:
            KernelCorruptError: The bytes are no artifact, or not the one of ``digest``.
            ValueError: They are longer than the registry takes, or ``record`` is not JSON.
        """
        ...

    def get(self, digest: str) -> bytes:
        """Return an artifact's bytes, compared with their digest; the same as ``fetch``.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            KernelCorruptError: It was published and its stored bytes are damaged or gone.
            ValueError: ``digest`` is not a digest.
        """
        ...

    def exists(self, digest: str) -> bool:
        """Say whether ``digest`` is published and its bytes are at hand.

        Raises:
            ValueError: ``digest`` is not a digest.
        """
        ...

    def search(self, **criteria: Unpack[SearchCriteria]) -> list[RegistryEntry]:
        """Return what is published and meets every criterion, oldest first.

        Raises:
            TypeError: A criterion is not one of :class:`SearchCriteria`.
        """
        ...

    def tag(self, name: str, tag: str, digest: str) -> None:
        """Point ``name:tag`` to a published artifact, and remember where it pointed before.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: The name, the tag or the digest is malformed.
        """
        ...

    def untag(self, name: str, tag: str) -> None:
        """Take ``name:tag`` away. Its history stays.

        Raises:
            KernelNotFoundError: There is no such tag.
            ValueError: The name or the tag is malformed.
        """
        ...

    def resolve(self, reference: str) -> str:
        """Return the digest that ``name:tag`` points to now.

        Raises:
            KernelNotFoundError: There is no such tag.
            ValueError: ``reference`` is malformed.
        """
        ...

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return every move of a tag, oldest first; empty where it never was.

        Raises:
            ValueError: The name or the tag is malformed.
        """
        ...

    def delete(self, digest: str) -> None:
        """Withdraw an artifact that no tag points to. Its bytes go at a later collection.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: A tag points to it, or ``digest`` is not a digest.
        """
        ...

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove bytes that two collections, ``grace_s`` apart, both found unreferenced.

        Args:
            grace_s: Seconds, at least 0.

        Returns:
            The digests whose bytes were removed, sorted.

        Raises:
            ValueError: ``grace_s`` is negative.
        """
        ...

    def verify(self) -> RegistryCheck:
        """Read every stored artifact, and put aside those whose bytes are wrong."""
        ...

    def close(self) -> None:
        """Give back files and connections. Closing twice does nothing."""
        ...


class EventSink(Protocol):
    """Something that takes events. It may not raise.

    It is called on a thread of its own where it may keep its caller waiting; one that never does
    says ``never_waits = True``.
    """

    def publish(self, event: Event) -> None:
        """Take one event."""
        ...


class Clock(Protocol):
    """A monotonic clock, injected wherever a duration is measured."""

    def now(self) -> float:
        """Return seconds since an arbitrary start; never falls."""
        ...
