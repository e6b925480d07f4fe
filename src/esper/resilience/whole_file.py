"""A file that is written whole or not at all, and that is named where it cannot be."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees what was there before or all of ``data``.

    A link stays one, and what is no file, a pipe or a device, is written to where it is.

    Args:
        path: The file; its folder exists.
        data: Its content.

    Raises:
        OSError: The file cannot be written; it is named, and what was there before is there still.
    """
    target = path.resolve()
    partial = target.with_name(f".{target.name}.part")
    try:
        if target.exists() and not target.is_file():  # to rename over it would take it away
            target.write_bytes(data)
            return
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise named(error, path) from error


def named(error: OSError, path: Path) -> OSError:
    """Return an error that says which file it is about: a full disk does not say so itself."""
    full = "; the disk is full: make room" if error.errno == errno.ENOSPC else ""
    return OSError(error.errno, f"{error.strerror or error}{full}", str(path))
