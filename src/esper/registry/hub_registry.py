"""A model repository of the Hugging Face Hub as a registry of kernels: push, name and pull.

What is published, moved or withdrawn is one commit, whose parent is the one that was read (ADR
0029).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from esper.contracts import reference
from esper.contracts.kernel_reports import Deprecation
from esper.contracts.ports import ANY, RegistryCheck, RegistryEntry, TagMove
from esper.registry import refusals
from esper.registry.endpoint import Endpoint
from esper.registry.hub_repository import HubRepository, path_of
from esper.registry.listing import WithoutReports, entry_of, search_among, verify_among
from esper.registry.screening import MAX_ARTIFACT_BYTES, Screening
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from esper.contracts.ports import SearchCriteria, SearchOrder
    from esper.contracts.signature import KernelSignature
    from esper.registry.http import Shelf
    from esper.registry.hub_index import HubIndex
    from esper.registry.hub_repository import Hub


@final
class HubRegistry(WithoutReports):
    """A :class:`~esper.contracts.ports.Registry` in a model repository, which exists.

    A search reads one file. There are no reports, and nothing is collected: what was withdrawn
    stays in the repository's history.

    Args:
        address: ``hf://owner/name``.
        token: Of the Hub; None takes that of its own login.
        hub: Who asks; by default the Hub's client.
        timeout_s: Seconds in which a retry may begin, above 0. The Hub's client ends a request by
            times of its own.
        max_artifact_bytes: Longest artifact that is taken, at least 1.
        wall_s: Seconds since 1970, for when something was published or moved.
        sleep: Waits before a retry, seconds.

    Raises:
        ValueError: The address is not as above.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        hub: Hub | None = None,
        timeout_s: float = 60.0,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
        wall_s: Callable[[], float] = wall_time_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address.rstrip("/")
        self.endpoint = Endpoint(self.address, timeout_s=timeout_s, sleep=sleep)
        self._repository = HubRepository(
            self.address,
            hub or HfApi(token=token),
            self.endpoint,
            max_bytes=max_artifact_bytes,
            sleep=sleep,
        )
        self._max_bytes = max_artifact_bytes
        self._wall_s = wall_s

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

        def publish(index: HubIndex) -> list[Any] | None:
            if screened.digest in index.kernels:
                return None
            last = max((entry.number for entry in index.kernels.values()), default=0)
            index.kernels[screened.digest] = entry_of(
                screened, number=last + 1, published_at_s=self._wall_s()
            )
            return [CommitOperationAdd(path_of(screened.digest), bytes(data))]

        self._repository.change(f"Publish {screened.digest}", publish)
        return screened.digest

    def fetch(
        self,
        digest: str,
        *,
        shelf: Shelf | None = None,
        waited_s: float = 0.0,  # noqa: ARG002 - the Hub's own client has its own times
    ) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`."""
        reference.check_digest(digest)
        data = self._repository.fetch(digest)
        if shelf is not None:
            shelf.clear()
            shelf.append(data)
        return data

    get = fetch

    def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        reference.check_digest(digest)
        return self._repository.index().entry(digest).size_bytes

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact, all of which is fetched; see ``RangedSource``."""
        refusals.check_range(start, length)
        return self.fetch(digest)[start : start + length]

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return digest in self._repository.index().kernels

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        index = self._repository.index()
        index.entry(digest)
        return next(entry for entry in index.entries() if entry.digest == digest)

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        entries = self._repository.index().entries()
        return search_among(entries, criteria, limit=limit, after=after, order=order)

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        return sorted({name for name, _ in self._repository.index().pointing() if name > after})[
            :limit
        ]

    def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_name(name)
        pointing = self._repository.index().pointing()
        return {tag: digest for (each, tag), digest in pointing.items() if each == name}

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
        name, tag = reference.split_reference(name_and_tag)
        digest = self._repository.index().pointed(name, tag)
        if digest is None:
            raise refusals.no_such_tag(name, tag)
        return digest

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_name(name)
        reference.check_name(tag, what="tag")
        return list(self._repository.index().moves.get(f"{name}:{tag}", ()))

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)

        def withdraw(index: HubIndex) -> list[Any]:
            index.entry(digest)
            pointing = index.pointing().items()
            tags = tuple(f"{name}:{tag}" for (name, tag), each in pointing if each == digest)
            if tags:
                raise refusals.still_tagged(digest, tags)
            del index.kernels[digest]
            return [CommitOperationDelete(path_of(digest))]

        self._repository.change(f"Withdraw {digest}", withdraw)

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Raise: what was withdrawn stays in the history; see ``Registry``."""
        refusals.check_grace(grace_s)
        self._cannot("collects nothing")

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`.

        What cannot be served is counted as missing; nothing can be put aside.
        """
        refusals.check_limit(limit)
        digests = self._repository.index().kernels
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
        if successor is not None:
            reference.check_digest(successor)
        said = Deprecation(
            reason=reason, successor=successor, actor=actor, deprecated_at_s=self._wall_s()
        )
        self._say(f"Deprecate {digest}", digest, said)

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        self._say(f"Reinstate {digest}", digest, None)

    def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`."""

        def attach(index: HubIndex) -> list[Any] | None:
            index.entry(signature.artifact_id)
            kept = index.signatures.setdefault(signature.artifact_id, [])
            return [] if refusals.keep_signature(signature, kept) else None

        self._repository.change(f"Sign {signature.artifact_id}", attach)

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return an artifact's signatures; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return list(self._repository.index().signatures.get(digest, ()))

    def close(self) -> None:
        """Do nothing: the Hub's client is the process's."""

    @property
    def _what_it_is(self) -> str:
        return f"{self.address} is a repository of the Hub"

    def _move(
        self, name: str, tag: str, digest: str | None, *, expected: str | None, actor: str | None
    ) -> None:
        reference.check_name(name)
        reference.check_name(tag, what="tag")
        if expected not in (None, ANY):
            reference.check_digest(str(expected))

        def move(index: HubIndex) -> list[Any] | None:
            found = index.pointed(name, tag)
            if digest is not None:
                index.entry(digest)
            elif found is None:
                raise refusals.no_such_tag(name, tag)
            if expected not in (ANY, found):
                raise refusals.tag_moved(name, tag, found)
            if found == digest:
                return None
            moved = TagMove(digest=digest, moved_at_s=self._wall_s(), actor=actor)
            index.moves.setdefault(f"{name}:{tag}", []).append(moved)
            return []

        self._repository.change(f"{name}:{tag} is {digest or 'taken away'}", move)

    def _say(self, what: str, digest: str, said: Deprecation | None) -> None:
        reference.check_digest(digest)

        def say(index: HubIndex) -> list[Any]:
            index.kernels[digest] = replace(index.entry(digest), deprecation=said)
            return []

        self._repository.change(what, say)
