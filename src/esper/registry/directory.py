"""A registry in a directory: files named by digest, and an index that says what is published.

    ROOT/lock                         held, shared, by everyone who has the registry open
    ROOT/index.sqlite                 what is published, and what is said of it
    ROOT/blobs/DIGEST                 bytes; published where the index has a row
    ROOT/blobs/.DIGEST.RANDOM.part    bytes on their way
    ROOT/quarantine/DIGEST.N          bytes that were not what their name said

A put writes a part, syncs it, renames it, syncs the directory, and only then commits the row, so
that a row is never without its bytes. A withdrawn row leaves the bytes to a later collection.
Renaming, removing and putting aside happen inside a write transaction of the index: they cannot
meet each other, whoever else has the directory open.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import weakref
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper.contracts import artifact_format, reference
from esper.contracts.artifact import KernelMetadata
from esper.contracts.errors import KernelCorruptError, KernelSourceUnavailable
from esper.contracts.ports import RegistryCheck, RegistryEntry, TagMove
from esper.registry import criteria, refusals
from esper.registry.disk import Disk
from esper.registry.index import Index
from esper.registry.screening import MAX_ARTIFACT_BYTES, Screened, screen
from esper.resilience.clock import wall_time_s
from esper.resilience.durable_file import write_synced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Unpack

    from esper.contracts.ports import SearchCriteria

_PART: Final = ".part"
_TAGS: Final = "SELECT group_concat(name || ':' || tag) FROM tags WHERE digest = ?"
_SEARCH: Final = """
    SELECT digest, size_bytes, metadata, record,
        (SELECT group_concat(name || ':' || tag) FROM tags WHERE tags.digest = artifacts.digest)
    FROM artifacts WHERE {condition} ORDER BY seq"""


class DirectoryRegistry:
    """A :class:`~esper.contracts.ports.Registry` on disk, for threads and processes alike.

    Opening it removes what an interrupted put left, if nobody else has the directory open, and
    reads every blob: one whose bytes are wrong goes to quarantine.

    Args:
        root: The directory; made where it is missing, its parents too.
        disk: Who makes the calls to the machine.
        wall_s: Seconds since 1970, for histories and grace periods. It may jump: that can only
            hasten or delay a collection, which takes nothing that is published.
        max_artifact_bytes: Longest artifact that is taken.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written.
        ValueError: It was written by a newer Esper.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        disk: Disk | None = None,
        wall_s: Callable[[], float] = wall_time_s,
        max_artifact_bytes: int = MAX_ARTIFACT_BYTES,
    ) -> None:
        self._root = Path(root).absolute()
        self._blobs = self._root / "blobs"
        self._quarantine = self._root / "quarantine"
        self._disk = disk or Disk()
        self._wall_s = wall_s
        self._max_artifact_bytes = max_artifact_bytes
        self._index = Index(self._root / "index.sqlite", self._disk)
        with self._reporting("open"):
            for directory in (self._blobs, self._quarantine):
                self._make_directory(directory)
            lock, alone = self._disk.lock(self._root / "lock")
            self._closing = weakref.finalize(self, _close, self._disk, self._index, lock)
            with ExitStack() as undo:
                undo.callback(self.close)
                self._recover(alone=alone)
                self._disk.share(lock)
                undo.pop_all()

    @property
    def root(self) -> Path:
        """The directory, absolute."""
        return self._root

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        screened = screen(data, digest=digest, record=record, max_bytes=self._max_artifact_bytes)
        with self._reporting(f"put {screened.digest}"):
            if not self._holds(screened.digest):
                self._store(data, screened)
        return screened.digest

    def get(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self._reporting(f"get {digest}"):
            size = self._published_size(digest)
            if size is None:
                raise refusals.not_published(digest)
            data = self._read_intact(digest, size)
            if data is None and self._published_size(digest) is None:
                raise refusals.not_published(digest)  # withdrawn and collected in between
        if data is None:
            msg = (
                f"the stored bytes of {digest} were damaged or are gone; what was left of them is "
                f"in {self._quarantine}; put the artifact again to repair it"
            )
            raise KernelCorruptError(msg)
        return data

    fetch = get

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        path = self._blobs / reference.check_digest(digest)
        with self._reporting(f"look for {digest}"):
            return self._published_size(digest) is not None and self._disk.exists(path)

    def search(self, **wanted: Unpack[SearchCriteria]) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        criteria.check(wanted)
        condition, values = criteria.as_sql(wanted)
        with self._reporting("search"):
            found = self._index.rows(_SEARCH.format(condition=condition), *values)
        return [
            RegistryEntry(
                digest=digest,
                size_bytes=size_bytes,
                metadata=KernelMetadata.from_document(json.loads(metadata)),
                record=json.loads(record),
                tags=_as_tags(tags),
            )
            for digest, size_bytes, metadata, record, tags in found
        ]

    def tag(self, name: str, tag: str, digest: str) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        reference.check_digest(digest)
        with self._reporting(f"tag {name}:{tag}"), self._index.transaction():
            if self._published_size(digest) is None:
                raise refusals.not_published(digest)
            if self._pointed_to(key) != digest:
                self._index.rows("REPLACE INTO tags VALUES (?, ?, ?)", *key, digest)
                self._remember(key, digest)

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        with self._reporting(f"untag {name}:{tag}"), self._index.transaction():
            if self._pointed_to(key) is None:
                raise refusals.no_such_tag(*key)
            self._index.rows("DELETE FROM tags WHERE name = ? AND tag = ?", *key)
            self._remember(key, None)

    def resolve(self, name_and_tag: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.split_reference(name_and_tag)
        with self._reporting(f"resolve {name_and_tag}"):
            digest = self._pointed_to(key)
        if digest is None:
            raise refusals.no_such_tag(*key)
        return digest

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        key = reference.check_name(name), reference.check_name(tag, what="tag")
        with self._reporting(f"read the history of {name}:{tag}"):
            moves = self._index.rows(
                "SELECT digest, moved_at_s FROM tag_moves WHERE name = ? AND tag = ? ORDER BY seq",
                *key,
            )
        return [TagMove(digest=digest, moved_at_s=moved_at_s) for digest, moved_at_s in moves]

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        with self._reporting(f"delete {digest}"), self._index.transaction():
            if self._published_size(digest) is None:
                raise refusals.not_published(digest)
            ((tags,),) = self._index.rows(_TAGS, digest)
            if tags:
                raise refusals.still_tagged(digest, _as_tags(tags))
            self._index.rows("DELETE FROM artifacts WHERE digest = ?", digest)

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_grace(grace_s)
        removed = []
        with self._reporting("collect"), self._index.transaction():
            now = self._wall_s()
            condemned: dict[str, float] = dict(
                self._index.rows("SELECT digest, since_s FROM condemned")
            )
            unreferenced = self._stored() - self._published()
            for digest in sorted(unreferenced & condemned.keys()):
                if now - condemned[digest] >= grace_s:
                    self._disk.remove(self._blobs / digest)
                    removed.append(digest)
            self._index.rows("DELETE FROM condemned")
            for digest in unreferenced.difference(removed):
                since_s = condemned.get(digest, now)
                self._index.rows("INSERT INTO condemned VALUES (?, ?)", digest, since_s)
        return tuple(removed)

    def verify(self) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        with self._reporting("verify"):
            looked_at = sorted(self._stored())
            wrong = [digest for digest in looked_at if self._read_intact(digest) is None]
            with self._index.transaction():
                stored, published = self._stored(), self._published()
        return RegistryCheck(
            intact=len(looked_at) - len(wrong),
            quarantined=tuple(wrong),
            missing=tuple(sorted(published - stored)),
            unreferenced=tuple(sorted(stored - published)),
        )

    def close(self) -> None:
        """Give back files and connections; see :class:`~esper.contracts.ports.Registry`."""
        self._closing()

    def __reduce__(self) -> tuple[object, ...]:
        """Travel as an address: a copy opens the same directory."""
        return DirectoryRegistry, (self._root,)

    @contextmanager
    def _reporting(self, doing: str) -> Iterator[None]:
        """Turn what the machine says into what a caller can act upon."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            msg = f"could not {doing} in {self._root}: {error}; see to the disk and try again"
            raise KernelSourceUnavailable(msg) from error

    def _make_directory(self, path: Path) -> None:
        """Make a directory and its parents so that they survive a power failure."""
        if not self._disk.exists(path):
            self._make_directory(path.parent)
            self._disk.make_directory(path)
            self._disk.sync_directory(path.parent)

    def _recover(self, *, alone: bool) -> None:
        """Make the index, and clear up after those who were interrupted."""
        self._index.prepare()
        self._disk.sync_directory(self._root)
        if alone:
            for name in self._disk.list_names(self._blobs):
                if name.endswith(_PART):
                    self._disk.remove(self._blobs / name)
        for digest in self._stored():
            self._read_intact(digest)

    def _store(self, data: bytes, screened: Screened) -> None:
        digest = screened.digest
        part = self._blobs / f".{digest}.{secrets.token_hex(8)}{_PART}"
        with ExitStack() as undo:
            undo.callback(self._clear_up, part)
            write_synced(self._disk, part, [data])
            with self._index.transaction():
                self._disk.rename(part, self._blobs / digest)
                self._disk.sync_directory(self._blobs)
                self._index.rows("DELETE FROM condemned WHERE digest = ?", digest)
                self._index.rows(
                    "INSERT INTO artifacts (digest, size_bytes, metadata, record) "
                    "VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
                    digest,
                    len(data),
                    json.dumps(screened.metadata.to_document(), sort_keys=True),
                    screened.record,
                )
            undo.pop_all()

    def _clear_up(self, part: Path) -> None:
        with suppress(OSError):  # what stays is removed when the registry is opened again
            self._disk.remove(part)

    def _holds(self, digest: str) -> bool:
        """Say whether an artifact is published and its bytes are right."""
        size = self._published_size(digest)
        return size is not None and self._read_intact(digest, size) is not None

    def _read_intact(self, digest: str, size_bytes: int | None = None) -> bytes | None:
        """Return a blob, or None where there is none; one that is wrong is put aside first."""
        limit = 1 + (self._max_artifact_bytes if size_bytes is None else size_bytes)
        data = self._read(digest, limit)
        if data is None or artifact_format.digest_of(data) == digest:
            return data
        with self._index.transaction():
            data = self._read(digest, limit)  # a put may have repaired it meanwhile
            if data is None or artifact_format.digest_of(data) == digest:
                return data
            self._put_aside(digest)
        return None

    def _read(self, digest: str, limit_bytes: int) -> bytes | None:
        try:
            return self._disk.read(self._blobs / digest, limit_bytes)
        except FileNotFoundError:
            return None

    def _put_aside(self, digest: str) -> None:
        taken = set(self._disk.list_names(self._quarantine))
        number = next(n for n in range(len(taken) + 1) if f"{digest}.{n}" not in taken)
        self._disk.rename(self._blobs / digest, self._quarantine / f"{digest}.{number}")
        self._disk.sync_directory(self._quarantine)
        self._disk.sync_directory(self._blobs)

    def _stored(self) -> set[str]:
        return set(filter(reference.is_digest, self._disk.list_names(self._blobs)))

    def _published(self) -> set[str]:
        return {digest for (digest,) in self._index.rows("SELECT digest FROM artifacts")}

    def _published_size(self, digest: str) -> int | None:
        found = self._index.rows("SELECT size_bytes FROM artifacts WHERE digest = ?", digest)
        return int(found[0][0]) if found else None

    def _pointed_to(self, key: tuple[str, str]) -> str | None:
        found = self._index.rows("SELECT digest FROM tags WHERE name = ? AND tag = ?", *key)
        return str(found[0][0]) if found else None

    def _remember(self, key: tuple[str, str], digest: str | None) -> None:
        self._index.rows(
            "INSERT INTO tag_moves (name, tag, digest, moved_at_s) VALUES (?, ?, ?, ?)",
            *key,
            digest,
            self._wall_s(),
        )


def _as_tags(joined: str | None) -> tuple[str, ...]:
    return tuple(sorted(joined.split(","))) if joined else ()


def _close(disk: Disk, index: Index, lock: int) -> None:
    index.close()
    disk.close(lock)
