"""A file that is there whole or not at all, also where the power fails while it is written."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from esper.resilience.whole_file import named

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class WritesFiles(Protocol):
    """The calls to the machine that a durable file takes; each may raise ``OSError``."""

    def create(self, path: Path) -> int:
        """Create a file that is not there yet, and return its descriptor for writing."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data``, and return how many bytes were taken."""

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes survive a power failure."""

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name in one step, in place of what had the name before."""

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory survive a power failure."""

    def remove(self, path: Path) -> None:
        """Take a file away."""

    def list_names(self, path: Path) -> list[str]:
        """Return the names in a directory."""


def write_synced(disk: WritesFiles, path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whose bytes survive a power failure, though its name may not.

    Args:
        disk: Who makes the calls to the machine.
        path: The file, which is not there yet.
        parts: Its content, in order.
    """
    descriptor = disk.create(path)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[disk.write(descriptor, rest) :]
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def write_durably(disk: WritesFiles, path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, so that at every moment its name has what was there before, or all of it.

    Once this returns, what was written survives a power failure. Until then it is written to
    ``.NAME.RANDOM.part`` beside it; what an interrupted process has left of these is removed.

    Args:
        disk: Who makes the calls to the machine.
        path: The file; its folder exists.
        parts: Its content, in order.

    Raises:
        OSError: The file cannot be written; it is named. What was there before is there still, or,
            where only the folder could not be synced, all of what was to be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        write_synced(disk, partial, parts)
        disk.rename(partial, path)
        disk.sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            disk.remove(partial)
        raise named(error, path) from error
    with suppress(OSError):
        for name in disk.list_names(path.parent):
            if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part", name):
                disk.remove(path.with_name(name))
