"""What a registry says, as JSON: the same words for the server that writes and who reads them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from esper.contracts import reference
from esper.contracts.artifact import KernelMetadata
from esper.contracts.kernel_reports import Deprecation
from esper.contracts.ports import RegistryCheck, RegistryEntry, TagMove
from esper.contracts.standing import Standing

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject

T = TypeVar("T")


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
        KeyError, TypeError, ValueError, KernelCorruptError: It is none.
    """
    deprecation, standing = document["deprecation"], document.get("standing")
    published_at_s = document["published_at_s"]
    return RegistryEntry(
        digest=reference.check_digest(document["id"]),
        size_bytes=_of(int, document["size_bytes"]),
        metadata=KernelMetadata.from_document(document["metadata"]),
        record=_of(dict, document["record"]),
        tags=tuple(":".join(reference.split_reference(tag)) for tag in _of(list, document["tags"])),
        number=_of(int, document["number"]),
        published_at_s=None if published_at_s is None else _number(published_at_s),
        deprecation=None if deprecation is None else _to_deprecation(deprecation),
        standing=None if standing is None else _to_standing(standing),
    )


def of_move(move: TagMove) -> JsonObject:
    """Return a line of a tag's history as JSON."""
    return asdict(move)


def to_move(document: Any) -> TagMove:
    """Read a line of a tag's history.

    Raises:
        TypeError, ValueError: It is none.
    """
    move = TagMove(**document)
    if move.digest is not None:
        reference.check_digest(move.digest)
    _number(move.moved_at_s)
    _of(str, move.actor or "")
    return move


def to_tags(document: Any) -> dict[str, str]:
    """Read where the tags of a name point.

    Raises:
        TypeError, ValueError: It is none.
    """
    return {
        reference.check_name(tag, what="tag"): reference.check_digest(digest)
        for tag, digest in _of(dict, document).items()
    }


def to_place(document: Any) -> int | str | None:
    """Read where the next page begins.

    Raises:
        TypeError: It is none.
    """
    if document is None or isinstance(document, str):
        return document
    return _of(int, document)


def of_check(check: RegistryCheck) -> JsonObject:
    """Return what a look found as JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(check).items()}


def to_check(document: Any) -> RegistryCheck:
    """Read what a look found.

    Raises:
        TypeError, ValueError: It is none.
    """
    lists = {
        name: tuple(map(reference.check_digest, v))
        for name, v in document.items()
        if isinstance(v, list)
    }
    check = RegistryCheck(**{**document, **lists})
    _of(int, check.intact)
    for digests in (check.quarantined, check.missing, check.unreferenced):
        _of(tuple, digests)
    if check.after is not None:
        reference.check_digest(check.after)
    return check


def _to_deprecation(document: Any) -> Deprecation:
    said = Deprecation(**document)
    _of(str, said.reason)
    _of(str, said.actor or "")
    if said.successor is not None:
        reference.check_digest(said.successor)
    _number(said.deprecated_at_s)
    return said


def _to_standing(document: Any) -> Standing:
    said = Standing(**document)
    for number in (said.effect, said.standard_error, said.lower):
        _number(number)
    _of(int, said.num_runs)
    return said


def _number(value: object) -> float:
    """Return a number that is finite; JSON knows others."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    msg = f"expected a finite number, found {value!r:.80}"
    raise TypeError(msg)


def _of(kind: type[T], value: object) -> T:
    """Return a value that is of a type, and no flag where a number is."""
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    msg = f"expected a {kind.__name__}, found {value!r:.80}"
    raise TypeError(msg)
