"""What a registry says, as JSON: the same words for the server that writes and who reads them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from esper.contracts.artifact import KernelMetadata
from esper.contracts.kernel_reports import Deprecation
from esper.contracts.ports import RegistryCheck, RegistryEntry, TagMove
from esper.contracts.standing import Standing

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject


def of_entry(entry: RegistryEntry) -> JsonObject:
    """Return an entry as JSON."""
    return {
        "id": entry.digest,
        "size_bytes": entry.size_bytes,
        "metadata": entry.metadata.to_document(),
        "record": entry.record,
        "tags": list(entry.tags),
        "number": entry.number,
        "published_at_s": entry.published_at_s,
        "deprecation": None if entry.deprecation is None else asdict(entry.deprecation),
        "standing": None if entry.standing is None else asdict(entry.standing),
    }


def to_entry(document: Any) -> RegistryEntry:
    """Read an entry; the inverse of :func:`of_entry`.

    Raises:
        KeyError, TypeError, KernelCorruptError: It is none.
    """
    deprecation, standing = document["deprecation"], document.get("standing")
    return RegistryEntry(
        digest=document["id"],
        size_bytes=document["size_bytes"],
        metadata=KernelMetadata.from_document(document["metadata"]),
        record=document["record"],
        tags=tuple(document["tags"]),
        number=document["number"],
        published_at_s=document["published_at_s"],
        deprecation=None if deprecation is None else Deprecation(**deprecation),
        standing=None if standing is None else Standing(**standing),
    )


def of_move(move: TagMove) -> JsonObject:
    """Return a line of a tag's history as JSON."""
    return asdict(move)


def to_move(document: Any) -> TagMove:
    """Read a line of a tag's history.

    Raises:
        TypeError: It is none.
    """
    return TagMove(**document)


def of_check(check: RegistryCheck) -> JsonObject:
    """Return what a look found as JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(check).items()}


def to_check(document: Any) -> RegistryCheck:
    """Read what a look found.

    Raises:
        TypeError: It is none.
    """
    lists = {name: tuple(v) for name, v in document.items() if isinstance(v, list)}
    return RegistryCheck(**{**document, **lists})
