"""One door to every registry: an address says which."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry
from esper.registry.trusted_source import TrustedSource, keys_of

if TYPE_CHECKING:
    from pathlib import Path

    from esper.contracts.ports import Registry


def open_registry(
    url: str | Path, *, token: str | None = None, trusted_keys: str | None = None
) -> Registry:
    """Open a registry: where kernels are kept, and what is said of them.

    Args:
        url: ``"memory:"`` for a registry that ends with the process, every call its own; a
            directory as a path or as ``file:///...``, made where it is missing; or
            ``http://...`` or ``https://...``, without credentials, what ``esper registry serve``
            serves. Nothing is asked of a server until it is used.
        token: What a server knows the caller by; for HTTP only.
        trusted_keys: Public keys, ``ed25519:...`` between commas or PEM blocks: what none of them
            has signed is refused before a byte of it is read. None trusts every kernel that is
            there. Needs the extra ``sign``.

    Returns:
        A ``Registry``, which the Grower takes too.

    Raises:
        EsperError: ``trusted_keys`` is given, and the extra is not installed.
        KernelSourceUnavailable: The directory cannot be made, read or written.
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, the directory of a newer Esper, or a key none.
    """
    if trusted_keys is not None:
        trust = keys_of(trusted_keys)
        return cast("Registry", TrustedSource(open_registry(url, token=token), trust))
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
