"""The one implementation of a registry: a book, which says what is published, and a blob store.

A put seals the bytes, and then, as the only writer of the book, gives them their name, looks that
they are there, and enters the row: a row is never without its bytes, and no collection comes in
between. A withdrawn row leaves the bytes to a later collection.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from esper.contracts import artifact_format, reference
from esper.contracts.errors import KernelSourceUnavailable
from esper.contracts.ports import ANY, RegistryCheck, RegistryEntry, TagMove
from esper.registry import refusals
from esper.registry.screening import MAX_ARTIFACT_BYTES, Screening
from esper.registry.upload import Upload
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Unpack

    from esper.contracts.kernel_reports import FieldReport, ValidationReport
    from esper.contracts.ports import SearchCriteria, SearchOrder
    from esper.contracts.signature import KernelSignature
    from esper.registry.blobs import BlobPart, BlobStore
    from esper.registry.book import Book
    from esper.registry.screening import Screened

_CHUNK_BYTES: Final = 1 << 20
_DAY_S: Final = 86_400.0
_PROBE: Final = b"whether this store keeps what it is given\n"
_PROBE_ID: Final = hashlib.sha256(_PROBE).hexdigest()


class StoredRegistry(ABC):
    """A :class:`~esper.contracts.ports.Registry` over a book and a blob store.

    Nothing here is overridden: what derives from it only says which of the two it is made of.

    Args:
        book: What is published, and what is said of it.
        blobs: Where the bytes are.
        wall_s: Seconds since 1970, for histories and grace periods. It may jump: that can only
            hasten or delay a collection, which takes nothing that is published.
        max_artifact_bytes: Longest artifact that is taken.

    Attributes:
        book: As given.
        max_artifact_bytes: As given.
    """

    def __init__(
        self,
        book: Book,
        blobs: BlobStore,
        *,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        self.book = book
        self.max_artifact_bytes = max_artifact_bytes
        self._blobs = blobs
        self._wall_s = wall_s
        self._is_owner = False

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        screening = Screening(digest=digest, record=record, max_bytes=self.max_artifact_bytes)
        screening.update(data)
        screened = screening.finish()
        with self.reporting(f"put {screened.digest}"):
            if not self.holds(screened.digest):
                with ExitStack() as cleaning:
                    part = self._blobs.receive()
                    cleaning.callback(part.discard)
                    part.write(data)
                    self.seal(screened.digest, part)
                    self.enter(screened, part, None)
        return screened.digest

    def receive(
        self,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
        actor: str | None = None,
    ) -> Upload:
        """Begin to publish an artifact that comes in parts, none of which is kept in memory.

        Args:
            digest: What the caller believes the sha256 of all of them to be.
            record: What is kept beside the artifact, as JSON values.
            actor: Who publishes it; entered into the audit where given.

        Raises:
            ValueError: ``digest`` is no digest, or ``record`` is not JSON.
        """
        screening = Screening(digest=digest, record=record, max_bytes=self.max_artifact_bytes)
        return Upload(self, self._blobs, screening, actor)

    def get(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"get {digest}"):
            size = self.book.artifacts.size(digest)
            if size is None:
                raise refusals.not_published(digest)
            data = self._read(digest, 0, size + 1)
            if data is None or artifact_format.digest_of(data) != digest:
                data = self._look_again(digest, size)
        return data

    fetch = get

    def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        reference.check_digest(digest)
        with self.reporting(f"look for {digest}"):
            size = self.book.artifacts.size(digest)
        if size is None:
            raise refusals.not_published(digest)
        return size

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`."""
        refusals.check_range(start, length)
        size = self.stat(digest)
        with self.reporting(f"read {digest}"):
            data = self._read(digest, start, min(length, max(0, size - start)))
        if data is None:
            raise refusals.bytes_gone(digest, self._blobs.place)
        return data

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"look for {digest}"):
            size = self.book.artifacts.size(digest)
            return size is not None and self._blobs.stat(digest) is not None

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of one; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"look for {digest}"):
            found = self.book.artifacts.entry(digest)
        if found is None:
            raise refusals.not_published(digest)
        return found

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        with self.reporting("search"):
            return self.book.artifacts.search(criteria, limit=limit, after=after, order=order)

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        with self.reporting("list the names"):
            return self.book.tags.names(limit=limit, after=after)

    def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_name(name)
        with self.reporting(f"list the tags of {name}"):
            return self.book.tags.of_name(name)

    def tag(
        self,
        name: str,
        tag: str,
        digest: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,
    ) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        self._move(name, tag, digest, expected=expected, actor=actor)

    def untag(
        self, name: str, tag: str, *, expected: str | None = ANY, actor: str | None = None
    ) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        self._move(name, tag, None, expected=expected, actor=actor)

    def resolve(self, name_and_tag: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.split_reference(name_and_tag)
        with self.reporting(f"resolve {name_and_tag}"):
            digest = self.book.tags.pointed_to(key)
        if digest is None:
            raise refusals.no_such_tag(*key)
        return digest

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        with self.reporting(f"read the history of {name}:{tag}"):
            return self.book.tags.history(key)

    def delete(self, digest: str, *, actor: str | None = None) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        with self._changing(digest, "withdraw", actor):
            tags = self.book.tags.of_digest(digest)
            if tags:
                raise refusals.still_tagged(digest, tags)
            self.book.artifacts.withdraw(digest)

    def collect(self, *, grace_s: float = _DAY_S) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_grace(grace_s)
        with self.reporting("collect"), self.book.transaction():
            self._check_owner()
            now_s = self._wall_s()
            condemned = self.book.artifacts.condemned()
            unreferenced = set(self._blobs.list()) - self.book.artifacts.digests()
            since_s = {digest: condemned.get(digest, now_s) for digest in unreferenced}
            removed = sorted(
                d for d in unreferenced & condemned.keys() if now_s - since_s[d] >= grace_s
            )
            for digest in removed:
                self._blobs.remove(digest)
                del since_s[digest]
            self.book.artifacts.condemn(since_s)
        return tuple(removed)

    def condemned(self, *, grace_s: float = _DAY_S) -> tuple[str, ...]:
        """Return what a collection would remove now, and remove nothing; see ``collect``."""
        refusals.check_grace(grace_s)
        with self.reporting("look what may be collected"), self.book.transaction():
            self._check_owner()
            now_s, condemned = self._wall_s(), self.book.artifacts.condemned()
            unreferenced = set(self._blobs.list()) - self.book.artifacts.digests()
        due = unreferenced & condemned.keys()
        return tuple(sorted(d for d in due if now_s - condemned[d] >= grace_s))

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        with self.reporting("verify"):
            left = sorted(digest for digest in self._blobs.list() if digest > after)
            looked_at = left[:limit]
            last = looked_at[-1] if len(looked_at) < len(left) else None
            wrong = [digest for digest in looked_at if not self._is_intact(digest)]
            with self.book.transaction():
                stored, published = set(self._blobs.list()), self.book.artifacts.digests()
        return RegistryCheck(
            intact=len(looked_at) - len(wrong),
            quarantined=tuple(wrong),
            missing=_between(published - stored - set(wrong), after, last),
            unreferenced=_between(stored - published, after, last),
            after=last,
        )

    def deprecate(
        self,
        digest: str,
        *,
        reason: str,
        successor: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Say not to use an artifact; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_reason(reason)
        if successor is not None:
            reference.check_digest(successor)
        with self._changing(digest, "deprecate", actor):
            self.book.reports.deprecate(
                digest, reason=reason, successor=successor, actor=actor, now_s=self._wall_s()
            )

    def reinstate(self, digest: str, *, actor: str | None = None) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        with self._changing(digest, "reinstate", actor):
            self.book.reports.reinstate(digest)

    def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft brought; see :class:`~esper.contracts.ports.Registry`."""
        with self._changing(report.artifact_id, "report an outcome of", None):
            self.book.reports.add_outcome(report)

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return what grafts brought; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"read the outcomes of {digest}"):
            return self.book.reports.outcomes(digest)

    def report_validation(self, report: ValidationReport) -> None:
        """Keep what a validation found; see :class:`~esper.contracts.ports.Registry`."""
        with self._changing(report.artifact_id, "report a validation of", None):
            self.book.reports.add_validation(report)

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations found; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"read the validations of {digest}"):
            return self.book.reports.validations(digest)

    def attach_signature(self, signature: KernelSignature, *, actor: str | None = None) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`."""
        with self._changing(signature.artifact_id, "sign", actor):
            self.book.reports.add_signature(signature)

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return an artifact's signatures; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self.reporting(f"read the signatures of {digest}"):
            return self.book.reports.signatures(digest)

    def check_ready(self) -> None:
        """Write to the book and to the blob store, and read back what was written.

        Raises:
            KernelSourceUnavailable: One of them did not do its part.
        """
        digest = _PROBE_ID
        with self.reporting("write and read back"), ExitStack() as cleaning:
            part = self._blobs.receive()
            cleaning.callback(part.discard)
            part.write(_PROBE)
            part.seal(digest)
            with self.book.transaction():
                self._blobs.put(digest, part)
                self.book.artifacts.condemn(
                    {digest: self._wall_s(), **self.book.artifacts.condemned()}
                )
            if self._read(digest, 0, len(_PROBE)) != _PROBE:
                msg = f"{self._blobs.place} gave back other bytes than it was given"
                raise OSError(msg)

    @abstractmethod
    def close(self) -> None:
        """Give back files and connections; see :class:`~esper.contracts.ports.Registry`."""

    def refuse_orphans(self, is_begun: Callable[[], bool]) -> None:
        """Refuse to begin an empty book over artifacts, which a collection would then remove.

        Args:
            is_begun: Whether the book is there; asked again after the look at the artifacts, since
                another process may begin it and publish meanwhile.

        Raises:
            KernelSourceUnavailable: It is not, and there are artifacts.
        """
        if is_begun():
            return
        num_orphans = len(set(self._blobs.list()) - {_PROBE_ID})
        if num_orphans and not is_begun():
            raise refusals.book_lost(self.book.place, self._blobs.place, num_orphans)

    def refuse_bytes_of_others(self) -> None:
        """Refuse bytes that another book says what they are, all of which would be collected.

        Bytes that no book has claimed, as an earlier Esper left them, become this one's where it
        has ever said anything.

        Raises:
            KernelSourceUnavailable: They are another's, or nobody says what they are.
        """
        if self._blobs.owner() is None:
            num_orphans = len(set(self._blobs.list()) - {_PROBE_ID})
            if num_orphans and not self.book.is_blank(_PROBE_ID):
                self._blobs.claim(self.book.identity())
            elif num_orphans and self._blobs.owner() is None:  # it may be claimed meanwhile
                raise refusals.book_lost(self.book.place, self._blobs.place, num_orphans)
        self._check_owner()

    def seal(self, digest: str, part: BlobPart) -> None:
        """End an artifact's bytes, after the store's first are claimed for this book."""
        if not self._is_owner:
            self._blobs.claim(self.book.identity())
            self._check_owner()
            self._is_owner = True
        part.seal(digest)

    @contextmanager
    def reporting(self, doing: str) -> Iterator[None]:
        """Turn what the machine says into what a caller can act upon.

        Raises:
            KernelSourceUnavailable: The book or the blob store did not do its part.
        """
        try:
            yield
        except OSError as error:
            msg = f"could not {doing} in {self._place()}: {error}; see to it and try again"
            raise KernelSourceUnavailable(msg) from error

    def enter(self, screened: Screened, part: BlobPart, actor: str | None) -> None:
        """Give sealed bytes their name and publish them; the row comes last."""
        with self.book.transaction():
            self._blobs.put(screened.digest, part)
            self.book.artifacts.publish(screened, self._wall_s())
            self._note(actor, "publish", screened.digest)

    def holds(self, digest: str) -> bool:
        """Say whether an artifact is published and intact; wrong bytes are put aside."""
        size = self.book.artifacts.size(digest)
        if size is None:
            return False
        return self._is_intact(digest)

    def _check_owner(self) -> None:
        if self._blobs.owner() not in (None, self.book.identity()):
            raise refusals.bytes_of_another_book(self.book.place, self._blobs.place)

    def _place(self) -> str:
        book, blobs = self.book.place, self._blobs.place
        return blobs if book.startswith(blobs) else f"{book} and {blobs}"

    @contextmanager
    def _changing(self, digest: str, action: str, actor: str | None) -> Iterator[None]:
        """Be the only writer of something said of an artifact that is published."""
        reference.check_digest(digest)
        with self.reporting(f"{action} {digest}"), self.book.transaction():
            if self.book.artifacts.size(digest) is None:
                raise refusals.not_published(digest)
            yield
            self._note(actor, action, digest)

    def _move(
        self, name: str, tag: str, digest: str | None, *, expected: str | None, actor: str | None
    ) -> None:
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        if expected is not None and expected != ANY:
            reference.check_digest(expected)
        with self.reporting(f"move {name}:{tag}"), self.book.transaction():
            if digest is not None and self.book.artifacts.size(digest) is None:
                raise refusals.not_published(digest)
            self.book.tags.move(key, digest, expected=expected, actor=actor, now_s=self._wall_s())
            self._note(actor, "untag" if digest is None else "tag", f"{name}:{tag}", digest or "")

    def _note(self, actor: str | None, action: str, subject: str, detail: str = "") -> None:
        """Add a line to the audit, where it is known who acts."""
        if actor is not None:
            self.book.audit.add(actor, action, subject, now_s=self._wall_s(), detail=detail)

    def _look_again(self, digest: str, size: int) -> bytes:
        """Return the bytes after all, or say why there are none.

        Raises:
            KernelNotFoundError: The artifact was withdrawn and collected in between.
            KernelCorruptError: Its bytes are damaged, and put aside now, or gone.
        """
        with self.book.transaction():
            data = self._read(digest, 0, size + 1)  # a put may have repaired it meanwhile
            if data is not None and artifact_format.digest_of(data) == digest:
                return data
            place = self._blobs.place if data is None else self._blobs.set_aside(digest)
            if self.book.artifacts.size(digest) is None:
                raise refusals.not_published(digest)
        raise refusals.bytes_gone(digest, place)

    def _is_intact(self, digest: str) -> bool:
        """Say whether a blob is there and right; one that is wrong is put aside."""
        if self._hash(digest) == digest:
            return True
        with self.book.transaction():
            found = self._hash(digest)  # a put may have repaired it meanwhile
            if found not in (digest, None):
                self._blobs.set_aside(digest)
        return found == digest

    def _hash(self, digest: str) -> str | None:
        """Return the sha256 of a blob's bytes; None where there is none."""
        size = self._blobs.stat(digest)
        if size is None:
            return None
        sha256 = hashlib.sha256()
        for start in range(0, size, _CHUNK_BYTES):
            data = self._read(digest, start, _CHUNK_BYTES)
            if data is None:
                return None
            sha256.update(data)
        return sha256.hexdigest()

    def _read(self, digest: str, start: int, length: int) -> bytes | None:
        try:
            return self._blobs.read(digest, start, length)
        except FileNotFoundError:
            return None


def _between(digests: set[str], after: str, last: str | None) -> tuple[str, ...]:
    """Return those that a look at a part was about, sorted."""
    return tuple(sorted(d for d in digests if d > after and (last is None or d <= last)))
