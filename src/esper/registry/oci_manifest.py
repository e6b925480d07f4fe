"""How kernels are written in a registry of container images (ADR 0029).

    blob sha256:DIGEST            the artifact's bytes
    manifest tag sha256-DIGEST    makes it published: names the blob, which is kept for that, and
                                  has as annotations what a registry knows of an artifact, and
                                  its signatures
    manifest tag NAME.TAG.TAG     name:tag, a manifest of its own that names the same blob

A name and its tag have no capital letters, so that ``.TAG.`` stands between them and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from esper.contracts import reference
from esper.contracts.errors import KernelCorruptError, KernelSourceUnavailable
from esper.contracts.signature import KernelSignature
from esper.registry import documents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.ports import RegistryEntry

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
EMPTY: Final = b"{}"
"""The blob that stands where images have their settings."""

_KERNEL_TYPE: Final = "application/vnd.esper-morph.kernel.v1"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_ENTRY, _MOVE = "esper-morph.kernel", "esper-morph.tag"
_SIGNATURES: Final = "esper-morph.signatures"
_BETWEEN: Final = ".TAG."
_PUBLISHED: Final = "sha256-"
_LONGEST_TAG: Final = 128
_NOT_TO_BE_READ: Final = (AttributeError, LookupError, TypeError, ValueError, RecursionError)


def tag_of(name: str, tag: str) -> str:
    """Return the manifest tag of ``name:tag``.

    Raises:
        ValueError: One of them is malformed, or both are too long for one tag.
    """
    found = f"{reference.check_name(name)}{_BETWEEN}{reference.check_name(tag, what='tag')}"
    if len(found) > _LONGEST_TAG:
        room = _LONGEST_TAG - len(_BETWEEN)
        msg = f"a registry of images has {room} characters for a name and its tag; expected fewer"
        raise ValueError(msg)
    return found


def published_tag(digest: str) -> str:
    """Return the manifest tag that makes an artifact published."""
    return _PUBLISHED + digest


def published_in(tags: list[str]) -> list[str]:
    """Return the digests of what is published, by all manifest tags."""
    digests = (tag.removeprefix(_PUBLISHED) for tag in tags if tag.startswith(_PUBLISHED))
    return [digest for digest in digests if reference.is_digest(digest)]


def references_in(tags: list[str]) -> list[tuple[str, str]]:
    """Return every name and tag, by all manifest tags; sorted."""
    found = []
    for each in tags:
        name, between, tag = each.partition(_BETWEEN)
        if between and reference.is_name(name) and reference.is_name(tag):
            found.append((name, tag))
    return sorted(found)


def of_entry(entry: RegistryEntry, signatures: Sequence[KernelSignature] = ()) -> bytes:
    """Return the manifest that publishes an artifact."""
    said: dict[str, object] = {
        _ENTRY: documents.of_entry(entry),
        _SIGNATURES: [signature.to_document() for signature in signatures],
    }
    annotations = {name: json.dumps(value, sort_keys=True) for name, value in said.items()}
    return _manifest(entry.digest, entry.size_bytes, annotations)


def of_move(digest: str, size_bytes: int, moved: JsonObject) -> bytes:
    """Return the manifest of a tag: unlike that of any other, so that it can be taken away."""
    return _manifest(digest, size_bytes, {_MOVE: json.dumps(moved, sort_keys=True)})


def to_entry(data: bytes, place: str) -> RegistryEntry | None:
    """Read a manifest that publishes an artifact; None where somebody else wrote it.

    Raises:
        KernelSourceUnavailable: It cannot be read.
    """
    digest, size_bytes = layer_of(data, place)
    said = (json.loads(data).get("annotations") or {}).get(_ENTRY)
    if said is None:
        return None
    try:
        entry = documents.to_entry(json.loads(said))
    except (*_NOT_TO_BE_READ, KernelCorruptError) as error:
        raise _unreadable(place, error) from error
    if (entry.digest, entry.size_bytes) != (digest, size_bytes):
        raise _unreadable(place, "its annotation is of another artifact")
    return entry


def signatures_in(data: bytes, place: str) -> list[KernelSignature]:
    """Return the signatures in a manifest that publishes an artifact, oldest first.

    Raises:
        KernelSourceUnavailable: They cannot be read.
    """
    try:
        said = (json.loads(data).get("annotations") or {}).get(_SIGNATURES, "[]")
        return [KernelSignature.from_document(each) for each in json.loads(said)]
    except _NOT_TO_BE_READ as error:
        raise _unreadable(place, error) from error


def layer_of(data: bytes, place: str) -> tuple[str, int]:
    """Return the digest and the size in bytes of the artifact that a manifest names.

    Raises:
        KernelSourceUnavailable: It names none, or more than one.
    """
    try:
        (layer,) = json.loads(data)["layers"]
        algorithm, _, digest = layer["digest"].partition(":")
        size_bytes = layer["size"]
        reference.check_digest(digest)
    except _NOT_TO_BE_READ as error:
        raise _unreadable(place, error) from error
    if algorithm != "sha256" or type(size_bytes) is not int:
        raise _unreadable(place, layer)
    return digest, size_bytes


def blob_name(data: bytes) -> str:
    """Return what a blob or a manifest is called."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _manifest(digest: str, size_bytes: int, annotations: Mapping[str, str]) -> bytes:
    layer = {"mediaType": _KERNEL_TYPE, "digest": f"sha256:{digest}", "size": size_bytes}
    config = {"mediaType": _EMPTY_TYPE, "digest": blob_name(EMPTY), "size": len(EMPTY)}
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": _KERNEL_TYPE,
        "config": config,
        "layers": [layer],
        "annotations": dict(annotations),
    }
    return json.dumps(manifest).encode()


def _unreadable(place: str, why: object) -> KernelSourceUnavailable:
    return KernelSourceUnavailable(f"{place} answered with no manifest of a kernel: {why!r:.200}")
