"""What a registry looks at before it stores anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esper.contracts import artifact_format
from esper.contracts.artifact import KernelMetadata
from esper.contracts.errors import KernelCorruptError
from esper.contracts.reference import check_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ARTIFACT_BYTES: Final = 2**26 * 8 + 2**23
"""The most parameters that a blueprint may have, in float64, and more than any header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """What is known of an artifact that may be stored.

    Attributes:
        digest: sha256 of the bytes.
        metadata: What its header says about the kernel.
        record: The publisher's record, as JSON.
    """

    digest: str
    metadata: KernelMetadata
    record: str


def screen(
    data: bytes, *, digest: str | None, record: Mapping[str, object] | None, max_bytes: int
) -> Screened:
    """Check an artifact from end to end.

    Args:
        data: The artifact's bytes.
        digest: What the caller believes their sha256 to be.
        record: What is kept beside the artifact.
        max_bytes: Longest artifact that is taken.

    Raises:
        KernelCorruptError: The bytes are no artifact, or not the one of ``digest``.
        ValueError: They are too long, ``digest`` is no digest, or ``record`` is not JSON.
    """
    if len(data) > max_bytes:
        msg = f"an artifact of {len(data)} bytes was put, and this registry takes {max_bytes}"
        raise ValueError(msg)
    found = artifact_format.digest_of(data)
    if digest is not None and found != check_digest(digest):
        msg = f"the bytes put as {digest} have the digest {found}; nothing was stored, send again"
        raise KernelCorruptError(msg)
    header = artifact_format.parse(data).header
    metadata = KernelMetadata.from_document(header.get("metadata"))
    return Screened(digest=found, metadata=metadata, record=_as_json(record or {}))


def _as_json(record: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(record), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"a record is kept as JSON, and this one is not: {error}"
        raise ValueError(msg) from error
