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

    from esper.contracts.ports import Registry


def open_registry(url: str | Path, *, token: str | None = None) -> Registry:
    """Open a registry: where kernels are kept, and what is said of them.

    Args:
        url: ``"memory:"`` for a registry that ends with the process, every call its own; a
            directory as a path or as ``file:///...``, made where it is missing; or
            ``http://...`` or ``https://...``, without credentials, what ``esper registry serve``
            serves. Nothing is asked of a server until it is used.
        token: What a server knows the caller by; for HTTP only.

    Returns:
        A ``Registry``, which the Grower takes too.

    Raises:
        KernelSourceUnavailable: The directory cannot be made, read or written.
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, or the directory of a newer Esper.
    """
    address = _checked(url)
    if address == "memory:":
        return MemoryRegistry()
    if re.match(r"https?://", address, re.IGNORECASE):
        from esper.registry.http_registry import HttpRegistry  # an HTTP client comes with it: late

        return HttpRegistry(address, token=token)
    if address.startswith("file:"):
        return DirectoryRegistry(_path_of(address))
    if not address or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", address):
        msg = (
            f"{address!r} is no address of kernels: expected memory:, a directory, file:///path, "
            "or http:// or https:// of a server"
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
