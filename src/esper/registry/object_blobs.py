"""Blobs in a bucket that speaks S3; needs the extra ``s3``.

    BUCKET/PREFIX/blobs/DIGEST           bytes
    BUCKET/PREFIX/blobs/book             name of the book that says what they are
    BUCKET/PREFIX/quarantine/DIGEST.RANDOM bytes that were not what their name said

Bytes on their way are in a file of this machine. What the bucket has acknowledged is looked at
before anybody relies on it: there are some that answer 200 and keep nothing.
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, final
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import S3Store

from esper.contracts import reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import ClientConfig, RetryConfig, S3Config

    from esper.registry.blobs import BlobPart

_ONE_REQUEST_BYTES: Final = 16 << 20
"""Up to here a blob is put in one request, which the bucket refuses where the name is taken. It is
in memory meanwhile; longer ones go in parts, for which there is no such condition."""

_BOOK: Final = "blobs/book"
_NO_BUCKET: Final = "404 Not Found"
"""What the library says of a list that is not there, for which it has no class."""

_CLIENT: Final[ClientConfig] = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=20),
    "timeout": timedelta(seconds=120),
    "http1_only": True,
}
_RETRY: Final[RetryConfig] = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2)},
}
"""The library's own limits add up to minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketAccess:
    """How a bucket is reached; all of it is said here, and nothing found in the environment.

    Attributes:
        endpoint: ``http://`` or ``https://`` address of the service; None for Amazon's.
        region: Name of the region.
        access_key: Id of the key; None for the machine's own role.
        secret_key: The key.
        session_token: What temporary keys come with.
    """

    endpoint: str | None = None
    region: str = "us-east-1"
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)


def open_bucket(url: str, access: BucketAccess) -> S3Store:
    """Return a store for ``s3://bucket/prefix``; ``?endpoint=`` and ``?region=`` may follow.

    The library reads ``AWS_*`` and proxies from the environment while this is running: whoever
    calls it hides them first.

    Raises:
        ValueError: The address is of another kind.
    """
    parts = urlsplit(url)
    said = dict(parse_qsl(parts.query))
    if parts.scheme != "s3" or not parts.hostname or set(said) - {"endpoint", "region"}:
        msg = f"blobs are at s3://bucket/prefix, with ?endpoint= and ?region=; found {url!r:.200}"
        raise ValueError(msg)
    endpoint = said.get("endpoint", access.endpoint)
    plain = endpoint is not None and endpoint.startswith("http://")
    keys: S3Config = {
        "region": said.get("region", access.region),
        "virtual_hosted_style_request": endpoint is None,
        "skip_signature": False,
        "conditional_put": "etag",
    }
    if endpoint is not None:
        keys["endpoint"] = endpoint
    if access.access_key is not None and access.secret_key is not None:
        keys["access_key_id"] = access.access_key
        keys["secret_access_key"] = access.secret_key
    if access.session_token is not None:
        keys["session_token"] = access.session_token
    return S3Store(
        parts.hostname,
        prefix=parts.path.strip("/") or None,
        config=keys,
        client_options={**_CLIENT, "allow_http": plain},
        retry_config=_RETRY,
    )


@final
class ObjectBlobs:
    """A :class:`~esper.registry.blobs.BlobStore` in a bucket.

    Args:
        store: The bucket.
        place: What messages call it; without credentials.
    """

    def __init__(self, store: S3Store, place: str) -> None:
        self.place = place
        self._store = store

    def recover(self, *, alone: bool) -> None:
        """Do nothing: bytes on their way are another process's own."""

    def owner(self) -> str | None:
        """Return the name of the book that says what the blobs are."""
        try:
            with _translated():
                name = bytes(obstore.get(self._store, _BOOK).bytes())
        except FileNotFoundError:
            return None
        return name.decode(errors="replace").strip() or None

    def claim(self, book: str) -> None:
        """Put a book's name, which the bucket refuses where there is one, and look for it."""
        with _translated(), suppress(AlreadyExistsError):
            obstore.put(self._store, _BOOK, book.encode(), mode="create", use_multipart=False)
        if self.owner() is None:
            msg = f"{self.place} acknowledged the name of its book and has none; try again"
            raise OSError(msg)

    def receive(self) -> BlobPart:
        """Begin a file."""
        return _SentPart(self._store)

    def put(self, digest: str, part: BlobPart) -> None:
        """Look that what was sent is there."""
        assert isinstance(part, _SentPart)
        found = self.stat(digest)
        if found != part.size_bytes:
            msg = (
                f"{self.place} acknowledged {part.size_bytes} bytes of {digest} and has "
                f"{'none' if found is None else found}; send them again"
            )
            raise OSError(msg)

    def stat(self, digest: str) -> int | None:
        """Return a blob's length in bytes, or None where there is none."""
        try:
            with _translated():
                return int(obstore.head(self._store, _path(digest))["size"])
        except FileNotFoundError:
            return None

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return some of a blob's bytes."""
        with _translated():
            found = (
                obstore.get(self._store, _path(digest), options={"range": (start, start + length)})
                if length
                else None
            )
            return b"" if found is None else bytes(found.bytes())

    def remove(self, digest: str) -> None:
        """Remove a blob; does nothing where there is none."""
        with _translated():
            obstore.delete(self._store, _path(digest))

    def set_aside(self, digest: str) -> str:
        """Copy a blob into quarantine, beside what is there, and remove it."""
        target = f"quarantine/{digest}.{secrets.token_hex(8)}"
        with _translated():
            obstore.copy(self._store, _path(digest), target)
            obstore.delete(self._store, _path(digest))
        return f"{self.place}/{target}"

    def list(self) -> set[str]:
        """Return the digests of all blobs; a bucket that is not there yet has none."""
        try:
            with _translated():
                names = {
                    found["path"].rpartition("/")[2]
                    for page in obstore.list(self._store, "blobs", chunk_size=1_000)
                    for found in page
                }
        except OSError as error:
            if _NO_BUCKET not in str(error):
                raise
            return set()
        return set(filter(reference.is_digest, names))


@final
class _SentPart:
    """A file of this machine, which is sent when it is whole."""

    def __init__(self, store: S3Store) -> None:
        self.size_bytes = 0
        self._store = store
        self._file = tempfile.NamedTemporaryFile(prefix="esper-registry-")  # noqa: SIM115 - discarded by its user

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size_bytes += len(data)

    def seal(self, digest: str) -> None:
        self._file.flush()
        path, source = _path(digest), Path(self._file.name)
        with _translated():
            if self.size_bytes <= _ONE_REQUEST_BYTES:
                try:
                    obstore.put(self._store, path, source, mode="create", use_multipart=False)
                except AlreadyExistsError:
                    return
            elif self._is_there(path):
                return
            else:
                obstore.put(self._store, path, source, use_multipart=True, max_concurrency=2)

    def discard(self) -> None:
        self._file.close()

    def _is_there(self, path: str) -> bool:
        try:
            return int(obstore.head(self._store, path)["size"]) == self.size_bytes
        except (FileNotFoundError, NotFoundError):
            return False


def _path(digest: str) -> str:
    return f"blobs/{digest}"


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what the library says as ``OSError``, without addresses that may be signed."""
    try:
        yield
    except FileNotFoundError:
        raise
    except NotFoundError as error:
        raise FileNotFoundError(str(error)) from error
    except BaseError as error:
        raise OSError(f"{type(error).__name__}: {error!s:.300}") from error
