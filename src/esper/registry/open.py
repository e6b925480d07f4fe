"""One door to every registry: an address says which."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from esper.contracts.errors import EsperError
from esper.registry.cached_registry import CachedRegistry
from esper.registry.directory import DirectoryRegistry
from esper.registry.disk_cache import DEFAULT_CACHE_BYTES, DiskCache
from esper.registry.memory import MemoryRegistry
from esper.registry.trusted_source import TrustedSource, keys_of

if TYPE_CHECKING:
    from esper.contracts.ports import Registry
    from esper.registry.cached_registry import RemoteRegistry

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def open_registry(
    url: str | Path,
    *,
    token: str | None = None,
    cache: str | Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    offline: bool = False,
    trusted_keys: str | None = None,
) -> Registry:
    """Open a registry: where kernels are kept, and what is said of them.

    Args:
        url: ``"memory:"`` for a registry that ends with the process, every call its own; a
            directory as a path or as ``file:///...``, made where it is missing; ``http://...`` or
            ``https://...``, without credentials, what ``esper registry serve`` serves;
            ``oci://host/repository`` of a registry of container images; or ``hf://owner/name``, a
            model repository of the Hugging Face Hub. Nothing is asked of a server until it is used.
        token: What a server knows the caller by; for ``oci://`` it is ``user:password`` or a token
            that stands for a password. Not for what is on this machine.
        cache: A folder in which artifacts of a server, and where its tags pointed, are kept on this
            machine; processes may share it. What is on this machine anyway needs none.
        cache_bytes: Budget of that folder, at least 0; the least recently used goes first.
        offline: Whether nothing is asked and no socket opened: what is in the cache is served.
        trusted_keys: Public keys, ``ed25519:...`` between commas or PEM blocks: what none of them
            has signed is refused before a byte of it is read. None trusts every kernel that is
            there. Needs the extra ``sign``.

    Returns:
        A ``Registry``, which the Grower takes too.

    Raises:
        EsperError: ``trusted_keys`` is given, or ``hf://`` asked for, without the extra.
        KernelSourceUnavailable: The directory cannot be made, read or written.
        TypeError: The address is neither text nor a path.
        ValueError: The address is of another kind, or a file's, the directory of a newer Esper, or
            a key none; or a server is to be used offline and without a cache.
    """
    if trusted_keys is not None:
        trust = keys_of(trusted_keys)
        registry = open_registry(
            url, token=token, cache=cache, cache_bytes=cache_bytes, offline=offline
        )
        return cast("Registry", TrustedSource(registry, trust))
    address = _checked(url)
    if address == "memory:":
        return MemoryRegistry()
    remote = _remote(address, token)
    if remote is not None:
        return _cached(remote, cache, cache_bytes, offline=offline)
    directory = directory_of(address)
    if directory is None:
        msg = (
            f"{address!r} is no address of kernels: expected memory:, a directory, file:///path, "
            "http:// or https:// of a server, oci://host/repository, or hf://owner/name"
        )
        raise ValueError(msg)
    if directory.exists() and not directory.is_dir():
        msg = f"{address!r} is no directory: a registry on this machine is kept in one; name it"
        raise ValueError(msg)
    return DirectoryRegistry(directory)


def directory_of(address: str) -> Path | None:
    """Return the directory that an address stands for; None where it is another kind.

    Raises:
        ValueError: It begins with ``file:`` and names no directory of this machine.
    """
    if address.startswith("file:"):
        return Path(_path_of(address))
    return None if not address or _SCHEME.match(address) else Path(address)


def _remote(address: str, token: str | None) -> RemoteRegistry | None:
    """Return the registry at an address elsewhere; None where it is on this machine."""
    scheme = address.partition("://")[0].lower()
    if scheme in ("http", "https"):
        from esper.registry.http_registry import HttpRegistry  # an HTTP client comes with it: late

        return HttpRegistry(address, token=token)
    if scheme == "oci":
        from esper.registry.oci_registry import OciRegistry

        return OciRegistry(address, token=token)
    if scheme == "hf":
        try:
            from esper.registry.hub_registry import HubRegistry
        except ModuleNotFoundError as error:
            msg = "hf:// needs the extra 'hf': pip install 'esper-morph[hf]'"
            raise EsperError(msg) from error
        return HubRegistry(address, token=token)
    return None


def _cached(
    remote: RemoteRegistry, cache: str | Path | None, cache_bytes: int, *, offline: bool
) -> Registry:
    if cache is not None:
        return CachedRegistry(remote, DiskCache(cache, cache_bytes), offline=offline)
    if offline:
        msg = f"{remote.address} cannot be used offline without a cache: give one, cache=folder"
        raise ValueError(msg)
    return remote


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
