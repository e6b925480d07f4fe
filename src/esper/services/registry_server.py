"""A registry that others reach over HTTP: opening what it is kept in, its first token, serving."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError
from esper.registry.book_access import SCOPES
from esper.registry.directory import DirectoryRegistry
from esper.resilience.clock import wall_time_s
from esper.services.settings import hidden_from_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from uvicorn import Server

    from esper.registry.blobs import BlobStore
    from esper.registry.database import Database
    from esper.registry.stored import StoredRegistry
    from esper.services.settings import Environment

OWNERS_TOKEN: Final = "owner"  # noqa: S105 - its name, not its text
"""Name of the token that a server makes or is given when it starts."""


def open_storage(
    *, data: Path, database: str | None, blobs: str | None, environment: Environment
) -> StoredRegistry:
    """Open what a registry is kept in, and migrate it where it is older.

    Args:
        data: A directory, which both are below where nothing else is said.
        database: ``postgresql://...``, in place of the directory; together with ``blobs``.
        blobs: ``s3://bucket/prefix``, in place of the directory.
        environment: How a bucket is reached.

    Raises:
        EsperError: Only one of the two addresses is given, or an extra is not installed.
        KernelSourceUnavailable: One of them did not answer.
        ValueError: An address is of another kind, or what is there is of a newer Esper.
    """
    if database is None and blobs is None:
        return DirectoryRegistry(data)
    if database is None or blobs is None:
        msg = (
            "--database and --blobs are given together, or neither of them: bytes and what is said "
            "of them have to be reached from the same machines"
        )
        raise EsperError(msg)
    from esper.registry.book import Book
    from esper.registry.shared import SharedRegistry

    book = Book(_open_database(database))
    return SharedRegistry(book, _open_blobs(blobs, environment))


def first_token(registry: StoredRegistry, text: str | None) -> str | None:
    """See to it that somebody can come in.

    Args:
        registry: Where the tokens are.
        text: The owner's token, where there is one already.

    Returns:
        The text of a token with every scope that was made now; None where one was given, or where
        there are tokens already. It cannot be had again.
    """
    tokens = registry.book.tokens
    with registry.reporting("look for a token"), registry.book.transaction():
        if text is not None:
            tokens.create(OWNERS_TOKEN, SCOPES, now_s=wall_time_s(), text=text)
            return None
        if any(token.revoked_at_s is None for token in tokens.all()):
            return None
        return tokens.create(OWNERS_TOKEN, SCOPES, now_s=wall_time_s())[0]


def serve(
    registry: StoredRegistry, *, host: str, port: int, on_listening: Callable[[int], None]
) -> None:
    """Serve a registry until the process is told to stop.

    Args:
        registry: What is served.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        on_listening: Called with the port when others can connect.

    Raises:
        EsperError: The extra is not installed, or the address is taken.
    """
    with _extra("server"):
        from esper.server.running import server_of
    _run(server_of(registry), host, port, on_listening)


def address_of(host: str, port: int) -> str:
    """Return what a browser is told of a host and a port; of version 6 in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _run(server: Server, host: str, port: int, on_listening: Callable[[int], None]) -> None:
    from esper.server.running import listen

    try:
        listener = listen(host, port)
    except OSError as error:
        msg = f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port"
        raise EsperError(msg) from error
    with listener:
        on_listening(listener.getsockname()[1])
        server.run(sockets=[listener])


def _open_database(url: str) -> Database:
    if not url.startswith(("postgresql://", "postgres://")):
        msg = "--database is postgresql://user:password@host:port/name"
        raise EsperError(msg)
    with _extra("postgres"):
        from esper.registry.postgres import PostgresDatabase

        return PostgresDatabase(url.replace("postgres://", "postgresql://", 1))


def _open_blobs(url: str, environment: Environment) -> BlobStore:
    with _extra("s3"):
        from esper.registry.object_blobs import BucketAccess, ObjectBlobs, open_bucket

        with hidden_from_libraries():
            bucket = open_bucket(url, BucketAccess(**environment.bucket))
    return ObjectBlobs(bucket, url.partition("?")[0])


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say how to install what only some servers need."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("esper"):
            raise
        msg = f"this needs the extra {name!r}: pip install 'esper-morph[server,{name}]'"
        raise EsperError(msg.replace("[server,server]", "[server]")) from error
