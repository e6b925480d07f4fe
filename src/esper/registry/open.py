"""One door to every registry: an address says which."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry

if TYPE_CHECKING:
    from pathlib import Path

    from esper.contracts.ports import KernelSource, Registry


def open(url: str | Path) -> Registry:  # noqa: A001 - registry.open() is how it is called
    """Open a registry.

    Args:
        url: ``"memory:"`` for one that ends with the process, every call its own; or a directory
            as a path or as ``file:///...``, made where it is missing.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    address = str(url)
    if address == "memory:":
        return MemoryRegistry()
    if address.startswith("file:"):
        return DirectoryRegistry(_path_of(address))
    if not address or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", address):
        msg = (
            f"{address!r} is no registry: expected memory:, a directory, or file:///path; to fetch "
            "kernels from http(s)://host, use open_registry"
        )
        raise ValueError(msg)
    return DirectoryRegistry(address)


def open_registry(url: str | Path) -> KernelSource:
    """Open what kernels are fetched from, without the right to change it.

    Args:
        url: ``http://...`` or ``https://...``, without credentials; or an address that
            :func:`open` takes.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    if re.match(r"https?://", str(url), re.IGNORECASE):
        from esper.registry.http import HttpKernelSource  # an HTTP client comes with it: late

        return HttpKernelSource(str(url))
    return open(url)


def _path_of(address: str) -> str:
    parts = urlsplit(address)
    path = url2pathname(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/"):
        msg = f"{address!r} names no directory of this machine: expected file:///absolute/path"
        raise ValueError(msg)
    return path
