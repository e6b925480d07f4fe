"""A registry of container images as a registry of kernels: Docker's, GHCR, Harbor, ECR (ADR 0029).

It has no conditional moves, no history and no reports: what needs them raises
``KernelSourceRefused``. How kernels are written there is in ``oci_manifest``.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, TypeVar, final

from esper.contracts import reference
from esper.contracts.errors import KernelNotFoundError
from esper.contracts.kernel_reports import Deprecation
from esper.contracts.ports import ANY, RegistryCheck, RegistryEntry
from esper.registry import oci_manifest, refusals
from esper.registry.endpoint import Endpoint
from esper.registry.listing import WithoutReports, entry_of, search_among, verify_among
from esper.registry.oci import OciSession
from esper.registry.oci_repository import OciRepository
from esper.registry.screening import MAX_ARTIFACT_BYTES, Screening
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.ports import SearchCriteria, SearchOrder, TagMove
    from esper.contracts.signature import KernelSignature
    from esper.registry.http import Shelf

R = TypeVar("R")


@final
class OciRegistry(WithoutReports):
    """A :class:`~esper.contracts.ports.Registry` in a repository of images; threads may share it.

    Every operation ends by one deadline, with all the requests that it takes. A search reads the
    manifest of every artifact and tag, and finds what this library has put there. Numbers of
    entries are microseconds of their publishing, by the publisher's clock.

    Args:
        address: ``oci://host/repository``.
        token: ``user:password``, or a token that stands for a password.
        timeout_s: Seconds for an operation with its retries, above 0; what it sends has a second
            more for every 64 KiB.
        max_artifact_bytes: Longest artifact that is taken, at least 1.
        wall_s: Seconds since 1970, for when something was published.
        sleep: Waits before a retry, seconds.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout_s: float = 10.0,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
        wall_s: Callable[[], float] = wall_time_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._session = OciSession(address, credentials=token, timeout_s=timeout_s)
        self._repository = OciRepository(self._session, max_artifact_bytes)
        self.endpoint = Endpoint(self._session.address, timeout_s=timeout_s, sleep=sleep)
        self._max_bytes = max_artifact_bytes
        self._wall_s = wall_s

    @property
    def address(self) -> str:
        """What opens it."""
        return self._session.address

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        screening = Screening(digest=digest, record=record, max_bytes=self._max_bytes)
        screening.update(data)
        screened = screening.finish()
        now_s = self._wall_s()
        entry = entry_of(screened, number=int(now_s * 1e6), published_at_s=now_s)
        self.endpoint.call(
            lambda until_s: self._repository.publish(entry, bytes(data), until_s),
            may_repeat=True,
            num_bytes=len(data),
        )
        return screened.digest

    def fetch(self, digest: str, *, shelf: Shelf | None = None, waited_s: float = 0.0) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`."""
        reference.check_digest(digest)
        return self._call(
            lambda until_s: self._repository.fetch(digest, shelf, until_s), waited_s=waited_s
        )

    get = fetch

    def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        reference.check_digest(digest)
        return self._call(lambda until_s: self._repository.size(digest, until_s))

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`."""
        refusals.check_range(start, length)
        if length == 0:
            self.stat(digest)
            return b""
        reference.check_digest(digest)
        return self._call(lambda until_s: self._repository.read(digest, start, length, until_s))

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        try:
            self.stat(digest)
        except KernelNotFoundError:
            return False
        return True

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return self._call(lambda until_s: self._repository.entry(digest, until_s))

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        search_among((), criteria, limit=limit, after=after, order=order)  # refuse it unasked
        entries = self._call(self._repository.entries)
        return search_among(entries, criteria, limit=limit, after=after, order=order)

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        found = oci_manifest.references_in(self._call(self._repository.tags))
        return sorted({name for name, _ in found if name > after})[:limit]

    def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_name(name)
        return self._call(lambda until_s: self._tags(name, until_s))

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
        key, _ = oci_manifest.tag_of(name, tag), reference.check_digest(digest)
        self._check_unguarded(expected)
        moved: JsonObject = {"name": name, "tag": tag, "moved_at_s": self._wall_s(), "actor": actor}
        self._call(lambda until_s: self._repository.point(key, digest, moved, until_s))

    def untag(
        self,
        name: str,
        tag: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,  # noqa: ARG002 - nobody keeps who took a tag away
    ) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`. ``actor`` is not kept."""
        key = oci_manifest.tag_of(name, tag)
        self._check_unguarded(expected)
        withdraw = functools.partial(self._repository.withdraw, key)
        self.endpoint.call(withdraw, may_repeat=False)

    def resolve(self, name_and_tag: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        name, tag = reference.split_reference(name_and_tag)
        key = oci_manifest.tag_of(name, tag)
        pointed = self._call(lambda until_s: self._repository.pointed(key, until_s))
        if pointed is None:
            raise refusals.no_such_tag(name, tag)
        return pointed[0]

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Raise: none is kept; see :class:`~esper.contracts.ports.Registry`."""
        oci_manifest.tag_of(name, tag)
        self._cannot("keeps no history of its tags")

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        delete = functools.partial(self._repository.delete, digest)
        self.endpoint.call(delete, may_repeat=False)

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Raise: the registry collects by itself; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_grace(grace_s)
        self._cannot("collects what nothing refers to by itself")

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`.

        What cannot be served is counted as missing; nothing can be put aside.
        """
        refusals.check_limit(limit)
        digests = oci_manifest.published_in(self._call(self._repository.tags))
        return verify_among(digests, self, after=after, limit=limit)

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
        for each in (digest, *(() if successor is None else (successor,))):
            reference.check_digest(each)
        said = Deprecation(
            reason=reason, successor=successor, actor=actor, deprecated_at_s=self._wall_s()
        )
        self._call(lambda until_s: self._repository.deprecate(digest, said, until_s))

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        self._call(lambda until_s: self._repository.deprecate(digest, None, until_s))

    def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`.

        Of two that come at the same moment one may be lost: there is no guarded change.
        """
        self._call(lambda until_s: self._repository.sign(signature, until_s))

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return an artifact's signatures; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return self._call(lambda until_s: self._repository.signatures(digest, until_s))

    def close(self) -> None:
        """Close connections; a later request opens others."""
        self._session.exchange.close()

    @property
    def _what_it_is(self) -> str:
        return f"{self.address} is a registry of images"

    def _call(self, fn: Callable[[float], R], *, waited_s: float = 0.0) -> R:
        """Do what may be done twice."""
        return self.endpoint.call(fn, may_repeat=True, waited_s=waited_s)

    def _tags(self, name: str, until_s: float) -> dict[str, str]:
        found = {}
        for each, tag in oci_manifest.references_in(self._repository.tags(until_s)):
            if each == name:
                pointed = self._repository.pointed(oci_manifest.tag_of(name, tag), until_s)
                if pointed is not None:
                    found[tag] = pointed[0]
        return found

    def _check_unguarded(self, expected: str | None) -> None:
        if expected != ANY:
            self._cannot("moves tags without looking where they point; leave expected= out")
