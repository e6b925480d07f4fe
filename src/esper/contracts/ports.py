"""The ports: what a room asks of another without knowing who answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from esper.contracts.artifact import KernelMetadata
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Mode, Position
    from esper.contracts.events import Event
    from esper.contracts.kernel_reports import Deprecation, FieldReport, ValidationReport
    from esper.contracts.signature import KernelSignature
    from esper.contracts.standing import Standing


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


class RangedSource(Protocol):
    """A source that can be asked for a part, so that a fetch can go on where it was cut off."""

    def stat(self, digest: str) -> int:
        """Return the length in bytes of the artifact whose sha256 is ``digest``.

        Raises:
            KernelNotFoundError: The source answered that it has no such artifact.
            KernelSourceUnavailable: The source did not answer.
            ValueError: ``digest`` is not a digest.
        """
        ...

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact. A part is compared with nothing: only the whole can be.

        Args:
            digest: 64 lower-case hexadecimal digits.
            start: First byte, at least 0.
            length: How many bytes at most, at least 0; less comes only at the artifact's end.

        Raises:
            KernelNotFoundError: The source answered that it has no such artifact.
            KernelCorruptError: It was published and its stored bytes are gone.
            KernelSourceUnavailable: The source did not answer.
            ValueError: An argument is not as above.
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
        number: Its place in the order of publishing; a page of a search goes on after one.
        published_at_s: When, in seconds since 1970 by the registry's clock; None where it was
            published before that was kept.
        deprecation: Why it should not be used any more; None where it may be.
        standing: How kernels of its blueprint have done in the field, at sites of the kind that
            was asked for; None where nobody has reported.
    """

    digest: str
    size_bytes: int
    metadata: KernelMetadata
    record: JsonObject
    tags: tuple[str, ...]
    number: int
    published_at_s: float | None = None
    deprecation: Deprecation | None = None
    standing: Standing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagMove:
    """One line of a tag's history.

    Attributes:
        digest: Where the tag pointed from then on; None where it was taken away.
        moved_at_s: When, in seconds since 1970 by the registry's clock.
        actor: Who moved it, as far as the registry was told.
    """

    digest: str | None
    moved_at_s: float
    actor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCheck:
    """What a look at stored artifacts found, in the order of their digests.

    Attributes:
        intact: Number of artifacts whose bytes are what their digest says.
        quarantined: Digests put aside by this look because their bytes were wrong.
        missing: Digests that were published and have no bytes, but for those of this look.
        unreferenced: Digests of stored bytes that nobody published or that were deleted.
        after: The last digest of this look where more are to be looked at; None at the end.
    """

    intact: int
    quarantined: tuple[str, ...]
    missing: tuple[str, ...]
    unreferenced: tuple[str, ...]
    after: str | None = None


class SearchCriteria(TypedDict, total=False):
    """What :meth:`Registry.search` can ask for. Everything given must hold; all are optional.

    ``kind``, ``in_features`` and ``out_features`` are those of a site, as ``SiteSpec`` has them:
    what is found reads and gives tensors of that layout and these widths, by its position.
    """

    blueprint_id: str
    blueprint_digest: str
    mode: Mode
    position: Position
    adds_capacity: bool
    draws_random: bool
    min_parameter_count: int
    max_parameter_count: int
    kind: str
    in_features: int
    out_features: int
    num_axes: int
    dtype: str
    min_size_bytes: int
    max_size_bytes: int
    deprecated: bool


SearchOrder = Literal["oldest", "newest", "proven"]
"""Which of what was found comes first.

``"oldest"`` and ``"newest"`` go by when it was published. ``"proven"`` goes by what field reports
of its blueprint say, at sites of the ``kind`` that is asked for: first those whose pooled effect
is above 0, then those of which nothing is known, then the others; within each by the lower bound
of the effect, the highest first. See :mod:`esper.contracts.standing`.
"""

ANY: Final = "any"
"""For ``expected=``: wherever a tag points, and if it is not there."""


class Registry(KernelSource, RangedSource, Protocol):
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

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of one artifact.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: ``digest`` is not a digest.
        """
        ...

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what is published and meets every criterion.

        Args:
            limit: Most entries that are returned, at least 1; None for all of them.
            after: ``number`` of the last entry of the page before, in the same order. A report that
                comes meanwhile moves what is ``"proven"``, so that one page may have what another
                had, or miss it.
            order: See :data:`SearchOrder`.
            criteria: See :class:`SearchCriteria`.

        Raises:
            TypeError: A criterion is not one of :class:`SearchCriteria`.
            ValueError: ``limit``, ``order`` or a criterion has a value that it cannot have.
        """
        ...

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return every name that has a tag, sorted; at most ``limit`` of those after ``after``."""
        ...

    def tags(self, name: str) -> dict[str, str]:
        """Return where each tag of a name points, sorted; empty where the name has none.

        Raises:
            ValueError: ``name`` is malformed.
        """
        ...

    def tag(
        self,
        name: str,
        tag: str,
        digest: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,
    ) -> None:
        """Point ``name:tag`` to a published artifact, and remember where it pointed before.

        Args:
            name: The name.
            tag: The tag.
            digest: Where it points from now on.
            expected: Where the mover has seen it point: a digest, None for nowhere, or ``ANY``.
            actor: Who moves it; a registry that knows its callers enters whom it knows.

        Raises:
            TagMovedError: It does not point there any more; nothing was moved.
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: The name, the tag or a digest is malformed.
        """
        ...

    def untag(
        self, name: str, tag: str, *, expected: str | None = ANY, actor: str | None = None
    ) -> None:
        """Take ``name:tag`` away. Its history stays.

        Raises:
            TagMovedError: It does not point to ``expected`` any more; see :meth:`tag`.
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

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Read stored artifacts, and put aside those whose bytes are wrong.

        Args:
            after: Only those with a higher digest: where an earlier look has ended.
            limit: Most artifacts that are read, at least 1; None for all of them.

        Raises:
            ValueError: ``limit`` is below 1.
        """
        ...

    def deprecate(
        self,
        digest: str,
        *,
        reason: str,
        successor: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Say that an artifact should not be used any more. It can be had as before.

        Args:
            digest: What is deprecated.
            reason: Why, for people.
            successor: Digest of what to use in its place.
            actor: Who says so.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: A digest is malformed, or the reason is empty or over 1,000 characters.
        """
        ...

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back; does nothing where there is none.

        Raises:
            KernelNotFoundError: Nothing is published under ``digest``.
            ValueError: ``digest`` is not a digest.
        """
        ...

    def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft of an artifact brought. One run reports one graft once.

        Raises:
            KernelNotFoundError: The artifact is not published here.
        """
        ...

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return what grafts of an artifact brought, oldest report first.

        Raises:
            ValueError: ``digest`` is not a digest.
        """
        ...

    def report_validation(self, report: ValidationReport) -> None:
        """Keep what a validation of an artifact found.

        Raises:
            KernelNotFoundError: The artifact is not published here.
        """
        ...

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations of an artifact found, oldest first.

        Raises:
            ValueError: ``digest`` is not a digest.
        """
        ...

    def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature beside its artifact. One that is there already stays, once.

        It is not checked here: whose word counts is for those to say who fetch.

        Raises:
            KernelNotFoundError: The artifact is not published here.
            ValueError: It has 100 signatures already.
        """
        ...

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return the signatures of an artifact, oldest first, true and false ones.

        Raises:
            ValueError: ``digest`` is not a digest.
        """
        ...

    def close(self) -> None:
        """Give back files and connections. Closing twice does nothing."""
        ...


class EventSink(Protocol):
    """Something that takes events. It may not raise.

    It is called on a thread of its own where it may keep its caller waiting; one that never does
    says ``never_waits = True``, and one that is known to, as it asks a network, ``is_slow = True``:
    its caller waits for it not even once.
    """

    def publish(self, event: Event) -> None:
        """Take one event."""
        ...


class Clock(Protocol):
    """A monotonic clock, injected wherever a duration is measured."""

    def now(self) -> float:
        """Return seconds since an arbitrary start; never falls."""
        ...
