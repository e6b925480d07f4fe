"""A signature of a kernel: who vouches for which bytes. It stands beside them, not in them.

What is signed is canonical JSON:

    {"artifact_id": DIGEST, "format": "esper-kernel-signature-1", "key_id": ID, "signed_at_s": N}

and the signature is Ed25519's (RFC 8032) over these bytes. Which keys count is decided where a
registry is opened, not here.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from esper.contracts import canonical_json

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject

FORMAT: Final = "esper-kernel-signature-1"
MOST_OF_ONE_KERNEL: Final = 100
"""Signatures that a registry keeps of one artifact; they are answered all at once."""

_FORMS: Final = {
    "artifact_id": re.compile(r"[0-9a-f]{64}"),
    "key_id": re.compile(r"[0-9a-f]{64}"),
    "signature": re.compile(r"[0-9a-f]{128}"),
}
_LATEST_S: Final = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSignature:
    """A word of the owner of a key that an artifact is what it is meant to be.

    Attributes:
        artifact_id: Digest of the artifact, 64 lower-case hexadecimal digits.
        key_id: sha256 of the public key's 32 bytes, 64 lower-case hexadecimal digits.
        signed_at_s: When, in whole seconds since 1970 by the signer's clock, 0 to 2^53.
        signature: The 64 bytes of Ed25519, 128 lower-case hexadecimal digits.

    Raises:
        ValueError: A field is not as above.
    """

    artifact_id: str
    key_id: str
    signed_at_s: int
    signature: str

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            value: object = getattr(self, name)
            if not isinstance(value, str) or form.fullmatch(value) is None:
                msg = f"a signature's {name} is {form.pattern}, found {value!r:.200}"
                raise ValueError(msg)
        if type(self.signed_at_s) is not int or not 0 <= self.signed_at_s <= _LATEST_S:
            msg = f"a signature has whole seconds since 1970, found {self.signed_at_s!r:.100}"
            raise ValueError(msg)

    def statement(self) -> bytes:
        """Return what is signed."""
        return statement(self.artifact_id, self.key_id, self.signed_at_s)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Read the JSON form; the inverse of :meth:`to_document`.

        Raises:
            ValueError: It has other fields, or a value that it cannot have.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(document, dict) or document.keys() != names:
            msg = f"a signature has the fields {sorted(names)}, found {document!r:.300}"
            raise ValueError(msg)
        return cls(**document)


def statement(artifact_id: str, key_id: str, signed_at_s: int) -> bytes:
    """Return the bytes that the owner of a key signs."""
    return canonical_json.encode(
        {
            "artifact_id": artifact_id,
            "format": FORMAT,
            "key_id": key_id,
            "signed_at_s": signed_at_s,
        }
    )
