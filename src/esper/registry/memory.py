"""A registry in memory: for tests, notebooks and runs that keep nothing."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from esper.contracts import reference
from esper.contracts.ports import RegistryCheck, RegistryEntry, TagMove
from esper.registry import criteria, refusals
from esper.registry.screening import MAX_ARTIFACT_BYTES, Screened, screen
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from esper.contracts.ports import SearchCriteria


class MemoryRegistry:
    """A :class:`~esper.contracts.ports.Registry` that ends with its process.

    Args:
        wall_s: Seconds since 1970, for histories and grace periods.
        max_artifact_bytes: Longest artifact that is taken.
    """

    def __init__(
        self,
        *,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        self._wall_s = wall_s
        self._max_artifact_bytes = max_artifact_bytes
        self._lock = threading.Lock()
        self._bytes: dict[str, bytes] = {}
        self._published: dict[str, Screened] = {}
        self._tags: dict[tuple[str, str], str] = {}
        self._moves: dict[tuple[str, str], list[TagMove]] = {}
        self._condemned: dict[str, float] = {}

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        screened = screen(data, digest=digest, record=record, max_bytes=self._max_artifact_bytes)
        with self._lock:
            self._bytes.setdefault(screened.digest, bytes(data))
            self._published.setdefault(screened.digest, screened)
            self._condemned.pop(screened.digest, None)
        return screened.digest

    def get(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self._lock:
            self._expect_published(digest)
            return self._bytes[digest]

    fetch = get

    def exists(self, digest: str) -> bool:
        """Say whether an artifact is published; see :class:`~esper.contracts.ports.Registry`."""
        return reference.check_digest(digest) in self._published

    def search(self, **wanted: Unpack[SearchCriteria]) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        criteria.check(wanted)
        with self._lock:
            return [
                self._entry(screened)
                for screened in self._published.values()
                if criteria.matches(screened.metadata, wanted)
            ]

    def tag(self, name: str, tag: str, digest: str) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        reference.check_digest(digest)
        with self._lock:
            self._expect_published(digest)
            if self._tags.get(key) != digest:
                self._tags[key] = digest
                self._remember(key, digest)

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        with self._lock:
            if self._tags.pop(key, None) is None:
                raise refusals.no_such_tag(*key)
            self._remember(key, None)

    def resolve(self, name_and_tag: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.split_reference(name_and_tag)
        digest = self._tags.get(key)
        if digest is None:
            raise refusals.no_such_tag(*key)
        return digest

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        with self._lock:
            return list(self._moves.get(key, ()))

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self._lock:
            self._expect_published(digest)
            tags = self._tags_of(digest)
            if tags:
                raise refusals.still_tagged(digest, tags)
            del self._published[digest]

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_grace(grace_s)
        with self._lock:
            now = self._wall_s()
            due = sorted(d for d, since in self._condemned.items() if now - since >= grace_s)
            for digest in due:
                del self._bytes[digest], self._condemned[digest]
            for digest in self._bytes.keys() - self._published.keys():
                self._condemned.setdefault(digest, now)
        return tuple(due)

    def verify(self) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        with self._lock:
            return RegistryCheck(
                intact=len(self._bytes),
                quarantined=(),
                missing=(),
                unreferenced=tuple(sorted(self._bytes.keys() - self._published.keys())),
            )

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _expect_published(self, digest: str) -> None:
        if digest not in self._published:
            raise refusals.not_published(digest)

    def _remember(self, key: tuple[str, str], digest: str | None) -> None:
        move = TagMove(digest=digest, moved_at_s=self._wall_s())
        self._moves.setdefault(key, []).append(move)

    def _tags_of(self, digest: str) -> tuple[str, ...]:
        return tuple(sorted(f"{n}:{t}" for (n, t), found in self._tags.items() if found == digest))

    def _entry(self, screened: Screened) -> RegistryEntry:
        return RegistryEntry(
            digest=screened.digest,
            size_bytes=len(self._bytes[screened.digest]),
            metadata=screened.metadata,
            record=json.loads(screened.record),
            tags=self._tags_of(screened.digest),
        )
