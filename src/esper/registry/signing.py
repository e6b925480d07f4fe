"""Making and checking signatures of kernels; needs the extra ``sign``.

A private key is a PEM file, PKCS #8, as ``openssl genpkey -algorithm ed25519`` writes it. A public
key is ``ed25519:`` and the 44 letters of its 32 bytes in base64, or a PEM block as
``openssl pkey -pubout`` writes it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import TYPE_CHECKING, Final, final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
)

from esper.contracts.errors import KernelRefusedError
from esper.contracts.reference import check_digest
from esper.contracts.signature import KernelSignature, statement

if TYPE_CHECKING:
    from collections.abc import Iterable

_PREFIX: Final = "ed25519:"
_PEM: Final = re.compile(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@final
class SigningKey:
    """A private key that signs kernels.

    Args:
        pem: The text of its file, without a password.

    Raises:
        ValueError: It is no Ed25519 key, or has a password.
    """

    def __init__(self, pem: bytes) -> None:
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _no_private_key() from error
        if not isinstance(key, Ed25519PrivateKey):
            raise _no_private_key()
        self._key = key
        self._public = key.public_key().public_bytes_raw()
        self.key_id = key_id(self._public)

    @property
    def public_text(self) -> str:
        """The public key, as it is written where it is to be trusted."""
        return _PREFIX + base64.b64encode(self._public).decode()

    def sign(self, digest: str, *, now_s: int) -> KernelSignature:
        """Return a signature of an artifact.

        Args:
            digest: The artifact.
            now_s: Whole seconds since 1970.

        Raises:
            ValueError: ``digest`` is no digest.
        """
        signed = self._key.sign(statement(check_digest(digest), self.key_id, now_s))
        return KernelSignature(
            artifact_id=digest, key_id=self.key_id, signed_at_s=now_s, signature=signed.hex()
        )


@final
class TrustedKeys:
    """The public keys whose owners' word counts.

    Args:
        text: ``ed25519:...`` keys, between commas or on lines of their own, the rest of a line
            behind a ``#`` being a remark; or PEM blocks.

    Raises:
        ValueError: There is no key in it, or something else.
    """

    def __init__(self, text: str) -> None:
        blocks = _PEM.findall(text)
        keys = [_from_pem(block) for block in blocks]
        words = re.sub(r"#[^\n]*", "", _PEM.sub("", text)).replace(",", " ").split()
        keys += [_from_word(word) for word in words]
        if not keys:
            msg = f"there is no trusted key in {text!r:.100}; expected {_PREFIX}BASE64"
            raise ValueError(msg)
        self._keys = {key_id(raw): raw for raw in (key.public_bytes_raw() for key in keys)}

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of the keys, sorted."""
        return tuple(sorted(self._keys))

    def vouches(self, digest: str, signature: KernelSignature) -> bool:
        """Say whether a signature is one of a trusted key over this artifact."""
        raw = self._keys.get(signature.key_id)
        if raw is None or signature.artifact_id != digest:
            return False
        key = Ed25519PublicKey.from_public_bytes(raw)
        try:
            key.verify(bytes.fromhex(signature.signature), signature.statement())
        except InvalidSignature:
            return False
        return True

    def check(self, digest: str, signatures: Iterable[KernelSignature]) -> KernelSignature:
        """Return the first signature that counts.

        Raises:
            KernelRefusedError: None does; ``check`` is ``"signature"``.
        """
        found = list(signatures)
        for signature in found:
            if self.vouches(digest, signature):
                return signature
        by = ", ".join(sorted({signature.key_id[:12] for signature in found})) or "nobody"
        msg = (
            f"kernel {digest} is signed by {by}, and not by a trusted key "
            f"({', '.join(key[:12] for key in self.key_ids)}); nothing of it was read: have it "
            "signed with `esper kernels sign`, or trust another key"
        )
        raise KernelRefusedError(msg, check="signature")


def key_id(public: bytes) -> str:
    """Return the name of a public key of 32 bytes."""
    return hashlib.sha256(public).hexdigest()


def _from_pem(block: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(block.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        msg = "a PEM block among the trusted keys is no public key"
        raise ValueError(msg) from error
    if not isinstance(key, Ed25519PublicKey):
        msg = f"a trusted key is one of Ed25519, found a {type(key).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - what is wrong is the text
    return key


def _from_word(word: str) -> Ed25519PublicKey:
    prefix, letters = word[: len(_PREFIX)], word[len(_PREFIX) :]
    try:
        raw = base64.b64decode(letters if prefix == _PREFIX else "", validate=True)
        return Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, binascii.Error) as error:
        msg = f"{word!r:.100} is no trusted key: expected {_PREFIX} and 32 bytes in base64"
        raise ValueError(msg) from error


def _no_private_key() -> ValueError:
    return ValueError(
        "this is no private key of Ed25519 in PEM without a password; "
        "openssl genpkey -algorithm ed25519 -out key.pem makes one"
    )
