"""One door to every registry: an address says which."""

from __future__ import annotations

import re
from pathlib import PurePath
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
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    address = _checked(url)
    if address == "memory:":
        return MemoryRegistry()
    if address.startswith("file:"):
        return DirectoryRegistry(_path_of(address))
    if not address or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", address):
        msg = (
            f"{address!r} is no registry: expected memory:, a directory, or file:///path; kernels "
            "are only fetched from http:// and https://, by open_registry"
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
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    if re.match(r"https?://", _checked(url), re.IGNORECASE):
        from esper.registry.http import HttpKernelSource  # an HTTP client comes with it: late

        return HttpKernelSource(str(url))
    return open(url)


def _checked(url: object) -> str:
    if not isinstance(url, (str, PurePath)):
        msg = f"the address of a registry is a str or a Path; got {url!r} (a {type(url).__name__})"
        raise TypeError(msg)
    return str(url)


def _path_of(address: str) -> str:
    parts = urlsplit(address)
    path = url2pathname(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/"):
        msg = f"{address!r} names no directory of this machine: expected file:///absolute/path"
        raise ValueError(msg)
    return path
