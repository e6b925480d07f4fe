"""What a registry looks at before it stores anything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from esper.contracts import artifact_format
from esper.contracts.artifact import KernelMetadata
from esper.contracts.errors import KernelCorruptError
from esper.contracts.reference import check_digest
from esper.registry.refusals import TooLargeError

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
        size_bytes: Length of the bytes.
    """

    digest: str
    metadata: KernelMetadata
    record: str
    size_bytes: int


@final
class Screening:
    """Checks an artifact from end to end as it comes, keeping no more of it than its header.

    Args:
        digest: What the caller believes the sha256 of its bytes to be.
        record: What is kept beside the artifact.
        max_bytes: Longest artifact that is taken.

    Raises:
        ValueError: ``digest`` is no digest, or ``record`` is not JSON.
    """

    def __init__(
        self, *, digest: str | None, record: Mapping[str, object] | None, max_bytes: int
    ) -> None:
        self._expected = None if digest is None else check_digest(digest)
        self._record = record_text(record or {})
        self._max_bytes = max_bytes
        self._sha256 = hashlib.sha256()
        self._front = bytearray()
        self.size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Look at some bytes.

        Raises:
            KernelCorruptError: They say that the header is longer than one may be.
            ValueError: The artifact is longer than is taken.
        """
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            msg = (
                f"an artifact of {self.size_bytes} bytes or more was put, and this registry takes "
                f"{self._max_bytes}"
            )
            raise TooLargeError(msg)
        self._sha256.update(data)
        view = memoryview(data)
        while view and (lacking := self._lacking()):
            self._front += view[:lacking]
            view = view[lacking:]

    def finish(self) -> Screened:
        """Return what is known of the artifact, all of whose bytes have come.

        Raises:
            KernelCorruptError: The bytes are no artifact, or not the one of ``digest``.
        """
        found = self._sha256.hexdigest()
        if self._expected not in (None, found):
            msg = (
                f"the bytes put as {self._expected} have the digest {found}; nothing was stored, "
                "send again"
            )
            raise KernelCorruptError(msg)
        header = artifact_format.read_header(bytes(self._front), self.size_bytes)
        metadata = KernelMetadata.from_document(header.get("metadata"))
        return Screened(
            digest=found, metadata=metadata, record=self._record, size_bytes=self.size_bytes
        )

    def _lacking(self) -> int:
        """Return how many bytes the front still lacks."""
        if len(self._front) < 8:
            return 8 - len(self._front)
        return artifact_format.header_size(self._front) - len(self._front)


def record_text(record: Mapping[str, object]) -> str:
    """Return what is kept beside an artifact as JSON.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.dumps(dict(record), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"a record is kept as JSON, and this one is not: {error}"
        raise ValueError(msg) from error
