"""Every call that the directory registry makes to the machine, one method a call.

There is nothing to decide here, so that a test can put something else in its place: a disk
whose n-th call fails, or one that forgets what was not synced when the power goes.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.registry.database import Row

_BUSY_TIMEOUT_S: Final = 30.0


class Disk:
    """The machine's own file system. Every method may raise ``OSError``."""

    def make_directory(self, path: Path) -> None:
        """Make one directory, whose parent exists; does nothing where it is there."""
        path.mkdir(exist_ok=True)

    def list_names(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(os.listdir(path))  # noqa: PTH208 - names, not paths

    def create(self, path: Path) -> int:
        """Create a file that is not there yet, and return its descriptor for writing."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data``, and return how many bytes were taken."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes survive a power failure."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name in one step, in place of what had the name before."""
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory survive a power failure."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: Path, limit_bytes: int, start: int = 0) -> bytes:
        """Return a file's bytes from ``start`` on, at most ``limit_bytes`` of them."""
        with path.open("rb", buffering=0) as file:
            if start:
                file.seek(start)
            data = file.read(limit_bytes)
            while len(data) < limit_bytes and (more := file.read(limit_bytes - len(data))):
                data += more
        return data

    def remove(self, path: Path) -> None:
        """Take a file away."""
        path.unlink()

    def exists(self, path: Path) -> bool:
        """Say whether a name is there."""
        return path.exists()

    def size(self, path: Path) -> int:
        """Return a file's length in bytes."""
        return path.stat().st_size

    def lock(self, path: Path) -> tuple[int, bool]:
        """Hold a lock file together with everybody else who does.

        The machine lets go of it when the process ends, however it ends.

        Returns:
            The descriptor, which :meth:`share` and :meth:`close` take, and whether nobody else
            held it: then it is held alone until :meth:`share` is called.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.share(descriptor)
            return descriptor, False
        return descriptor, True

    def share(self, descriptor: int) -> None:
        """Hold the lock file with others from now on; waits for one who holds it alone."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open an SQLite file. Transactions are begun and ended by statements."""
        return sqlite3.connect(
            path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    def execute(
        self, connection: sqlite3.Connection, statement: str, values: Mapping[str, object]
    ) -> list[Row]:
        """Run one statement and return its rows. Raises ``sqlite3.Error`` too."""
        return connection.execute(statement, values).fetchall()
