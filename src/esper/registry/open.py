"""One door to every registry: an address says which."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, overload
from urllib.parse import urlsplit
from urllib.request import url2pathname

from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry

if TYPE_CHECKING:
    from pathlib import Path

    from esper.contracts.ports import KernelSource, Registry


@overload
def open_registry(url: Path | Literal["memory:"]) -> Registry: ...


@overload
def open_registry(url: str) -> KernelSource: ...


def open_registry(url: str | Path) -> KernelSource:
    """Open where kernels are kept: a registry, or behind HTTP a source that is only read.

    Args:
        url: ``"memory:"`` for a registry that ends with the process, every call its own; a
            directory as a path or as ``file:///...``, made where it is missing; or
            ``http://...`` or ``https://...``, without credentials, to fetch from.

    Returns:
        A ``Registry``, which the Grower takes too; for HTTP a ``KernelSource``. A type checker
        cannot read addresses: give it a ``Path`` where it is to know of a registry.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written.
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    address = _checked(url)
    if address == "memory:":
        return MemoryRegistry()
    if re.match(r"https?://", address, re.IGNORECASE):
        from esper.registry.http import HttpKernelSource  # an HTTP client comes with it: late

        return HttpKernelSource(address)
    if address.startswith("file:"):
        return DirectoryRegistry(_path_of(address))
    if not address or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", address):
        msg = (
            f"{address!r} is no address of kernels: expected memory:, a directory, file:///path, "
            "or http:// or https:// to fetch from"
        )
        raise ValueError(msg)
    return DirectoryRegistry(address)


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
