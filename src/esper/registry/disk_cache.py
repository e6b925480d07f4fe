"""Artifacts of registries elsewhere, kept on this machine by digest and within a budget.

    ROOT/lock                    held while room is made
    ROOT/artifacts/DIGEST        an artifact; it was last used when its file was last modified
    ROOT/partial/DIGEST          as much as has come of one, for whoever goes on with it
    ROOT/tags/REGISTRY/NAME/TAG  where a tag was seen to point, and when
    ROOT/signatures/REGISTRY/DIGEST  the signatures of an artifact, as they were last seen

Any number of processes share one. A file gets its name when it is whole and is never written again,
and who reads one has it open, so that it may be evicted meanwhile. What is read is compared with
its digest: a file that is torn or altered is removed, and is as one that never was. Where the disk
does not do its part the cache keeps nothing, says so in the log, and fails nobody.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, final

from esper.contracts.artifact_format import digest_of
from esper.contracts.reference import check_digest, split_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_CACHE_BYTES: Final = 10 * 2**30
_NUM_TRIES: Final = 10
_BETWEEN_TRIES_S: Final = 0.01
"""Others who make room are waited for ten times as long, which nobody's fetch misses."""

_SEEN: Final = re.compile(r"([0-9a-f]{64}) ([0-9]{1,12})\n")

_logger = logging.getLogger(__name__)


@final
class DiskCache:
    """Artifacts by digest, the least recently used of which go first; and tags, as last seen.

    Args:
        folder: Where; made when something is kept.
        max_size_bytes: Budget for artifacts, whole and partial, at least 0. One that is larger is
            not kept, and evicts nobody.

    Raises:
        ValueError: The budget is negative.
    """

    def __init__(self, folder: str | Path, max_size_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        if max_size_bytes < 0:
            msg = f"the budget of a cache is at least 0 bytes, found {max_size_bytes}"
            raise ValueError(msg)
        self.folder = Path(folder).absolute()
        self.max_size_bytes = max_size_bytes
        self._artifacts = self.folder / "artifacts"
        self._partial = self.folder / "partial"

    def get(self, digest: str) -> bytes | None:
        """Return an artifact, compared with its digest; None where it is not here."""
        path = self._artifacts / check_digest(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning("a kernel in the cache cannot be read: %s", error)
            return None
        if digest_of(data) != digest:
            _logger.warning("%s was torn or altered and is removed; it is fetched again", path)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    @contextmanager
    def receive(self, digest: str, *, wait_s: float = 0.0) -> Iterator[Part]:
        """Yield what takes an artifact as it comes; it is kept where the block calls it whole.

        What has come when the block is left by an error stays for the next who receives it. One
        who comes while another is at it, in this process or in another, waits until that one is
        done, has failed or is dead; after that the artifact may be there. Whoever has waited
        for long enough begins a file of its own.

        Args:
            digest: Which one.
            wait_s: Longest wait for another, in seconds, at least 0.
        """
        part = self._begin(check_digest(digest), wait_s)
        try:
            yield part
            if part.is_whole:
                self._admit(digest, part)
        finally:
            part.close()

    def remember(self, registry: str, reference: str, digest: str, now_s: float) -> None:
        """Remember where ``name:tag`` of a registry pointed, in seconds since 1970."""
        text = f"{check_digest(digest)} {int(now_s)}\n"
        _write(self._tag_path(registry, reference), text.encode())

    def recall(self, registry: str, reference: str) -> tuple[str, int] | None:
        """Return where ``name:tag`` was seen to point, and when; None where it was not."""
        try:
            text = self._tag_path(registry, reference).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        found = _SEEN.fullmatch(text)
        return None if found is None else (found[1], int(found[2]))

    def forget(self, registry: str, reference: str) -> None:
        """Forget where ``name:tag`` pointed."""
        with suppress(OSError):
            self._tag_path(registry, reference).unlink(missing_ok=True)

    def remember_signatures(self, registry: str, digest: str, text: bytes) -> None:
        """Remember what signatures a registry had of an artifact, as whoever asks writes them."""
        _write(self._signatures_path(registry, digest), text)

    def recall_signatures(self, registry: str, digest: str) -> bytes | None:
        """Return what was remembered of an artifact's signatures; None where nothing was."""
        try:
            return self._signatures_path(registry, digest).read_bytes()
        except OSError:
            return None

    def _signatures_path(self, registry: str, digest: str) -> Path:
        return self.folder / "signatures" / _place_of(registry) / check_digest(digest)

    def _tag_path(self, registry: str, reference: str) -> Path:
        name, tag = split_reference(reference)
        return self.folder / "tags" / _place_of(registry) / name / tag

    def _begin(self, digest: str, wait_s: float) -> Part:
        """Open what there is of an artifact, for this one alone."""
        path = self._partial / digest
        try:
            for folder in (self._artifacts, self._partial):
                folder.mkdir(parents=True, exist_ok=True)
            end_s = time.monotonic() + wait_s
            while (file := _open_alone(path)) is None and time.monotonic() < end_s:
                time.sleep(_BETWEEN_TRIES_S)
            if file is None:
                path = path.with_name(f"{digest}.{secrets.token_hex(8)}")
                file = path.open("x+b")
        except OSError as error:
            _say(error)
            file = None
        return Part(path, file, self.max_size_bytes)

    def _admit(self, digest: str, part: Part) -> None:
        """Give a whole artifact its name, where there is or can be made room for it."""
        if not part.is_kept:
            return
        try:
            with self._alone():
                self._make_room(part.size_bytes, sparing=part.path)
                part.path.replace(self._artifacts / digest)
        except OSError as error:
            _say(error)
            _remove(part.path)

    def _make_room(self, size_bytes: int, *, sparing: Path) -> None:
        """Remove what was used longest ago until so many more bytes are within the budget."""
        found = [_used(path) for folder in (self._artifacts, self._partial) for path in _in(folder)]
        items = sorted(item for item in found if item is not None and item[2] != sparing)
        over = sum(size for _, size, _ in items) + size_bytes - self.max_size_bytes
        for _, size, path in items:
            if over <= 0:
                return
            path.unlink(missing_ok=True)
            over -= size

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one who makes room.

        Raises:
            OSError: Another has been at it for too long, stopped perhaps.
        """
        with (self.folder / "lock").open("ab") as lock:
            for _ in range(_NUM_TRIES):
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(_BETWEEN_TRIES_S)
            else:
                raise OSError(errno.EBUSY, "another process keeps the cache's lock", lock.name)
            yield


@final
class Part:
    """An artifact that is on its way, in a file that the next one goes on with.

    Args:
        path: Its file.
        file: The same, open at its end; None where nothing can be kept.
        max_size_bytes: More than that is not kept.

    Attributes:
        path: Its file.
        is_whole: Whether all of it is here and is what its digest says; set by who knows.
    """

    def __init__(self, path: Path, file: BinaryIO | None, max_size_bytes: int) -> None:
        self.path = path
        self.is_whole = False
        self._file = file
        self._max_size_bytes = max_size_bytes

    @property
    def is_kept(self) -> bool:
        """Whether what comes is written anywhere."""
        return self._file is not None

    @property
    def size_bytes(self) -> int:
        """How much of it is kept."""
        return 0 if self._file is None else self._file.tell()

    def content(self) -> bytes:
        """Return what has come so far."""
        if self._file is None:
            return b""
        try:
            self._file.seek(0)
            return self._file.read()
        except OSError as error:
            self._give_up(error)
            return b""

    def append(self, data: bytes) -> None:
        """Keep some more."""
        if self._file is None:
            return
        if self.size_bytes + len(data) > self._max_size_bytes:
            self._give_up(None)
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def clear(self) -> None:
        """Begin anew: what has come was not the beginning of it."""
        if self._file is None:
            return
        try:
            self._file.seek(0)
            self._file.truncate()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the file, and take away one that nobody could go on with."""
        if self._file is None:
            return
        if not self.is_whole and (self.size_bytes == 0 or "." in self.path.name):
            _remove(self.path)
        with suppress(OSError):
            self._file.close()

    def _give_up(self, error: OSError | None) -> None:
        """Keep nothing of it, because of an error or because it is too long."""
        if error is not None:
            _say(error)
        assert self._file is not None
        _remove(self.path)
        with suppress(OSError):
            self._file.close()
        self._file = None


def _open_alone(path: Path) -> BinaryIO | None:
    """Open a file at its end, made where it is missing; None where another is at it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # not renamed before the lock
            file.seek(0, os.SEEK_END)
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


def _in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _used(path: Path) -> tuple[int, int, Path] | None:
    """Return when a file was last used and how long it is; None where it is gone by now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, path


def _place_of(registry: str) -> str:
    return digest_of(registry.encode())[:32]


def _write(path: Path, data: bytes) -> None:
    """Write a small file whole, or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        _say(error)
        _remove(partial)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _say(error: OSError) -> None:
    _logger.warning("the cache of kernels keeps nothing for now: %s", error)
