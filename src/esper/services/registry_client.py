"""A registry as a command names it: with the token that is its own, and the keys that count."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError, KernelNotFoundError
from esper.contracts.reference import is_digest
from esper.registry.open import directory_of, open_registry
from esper.registry.trusted_source import sign_extra
from esper.services.settings import token_in

if TYPE_CHECKING:
    from pathlib import Path

    from esper.contracts.ports import Registry
    from esper.contracts.signature import KernelSignature
    from esper.registry.signing import SigningKey
    from esper.services.settings import Environment


_BEGINNING: Final = re.compile(r"[0-9a-f]{8,63}")


def address_and_token(
    address: str | None,
    environment: Environment,
    *,
    token_file: Path | None = None,
    takes_token: bool = True,
) -> tuple[str, str | None]:
    """Return the address that a command is about, and the token that goes there.

    The environment's token is sent to the environment's address, or where that says none to the
    one that the command names; never to another.

    Args:
        address: What the command names; None takes ``URZA_API_URL``.
        environment: What the process was given.
        token_file: A file whose first line is the token of this address.
        takes_token: Whether the environment's token is this address's where nothing says whose.

    Raises:
        EsperError: There is no address, or the file cannot be read.
    """
    named = address or environment.api_url
    if named is None:
        msg = "which registry? name one with --registry ADDRESS, or set URZA_API_URL"
        raise EsperError(msg)
    if token_file is not None:
        return named, token_in(token_file, "the option for a token's file")
    is_its_own = takes_token if environment.api_url is None else named == environment.api_url
    return named, environment.api_token if is_its_own else None


def open_named(
    address: str | None,
    environment: Environment,
    *,
    token_file: Path | None = None,
    takes_token: bool = True,
    checks_signatures: bool = True,
    makes: bool = False,
) -> Registry:
    """Open the registry that a command is about, with the token of :func:`address_and_token`.

    Args:
        address: As ``open_registry`` takes it; None takes ``URZA_API_URL``.
        environment: What the process was given.
        token_file: A file whose first line is the token of this address.
        takes_token: Whether the environment's token is this address's where nothing says whose.
        checks_signatures: Whether the trusted keys of the environment count.
        makes: Whether a directory that is not there is made.

    Raises:
        EsperError: There is no address, or the file cannot be read.
        FileNotFoundError: There is no such directory, and none is to be made.
        KernelSourceUnavailable, TypeError, ValueError: See ``open_registry``.
    """
    named, token = address_and_token(
        address, environment, token_file=token_file, takes_token=takes_token
    )
    directory = directory_of(named)
    if not (makes or directory is None or directory.exists()):
        msg = f"there is no registry in {named}: no such directory"
        raise FileNotFoundError(msg)
    trusted = environment.trusted_keys if checks_signatures else None
    return open_registry(
        named,
        token=token,
        cache=environment.cache_dir,
        cache_bytes=environment.cache_bytes,
        offline=environment.offline,
        trusted_keys=trusted,
    )


def digest_of(registry: Registry, reference: str) -> str:
    """Return the digest that a reference stands for.

    Args:
        registry: Where it is looked up.
        reference: A digest, its first 8 letters or more, or ``name:tag``.

    Raises:
        KernelNotFoundError: There is no such tag, or no digest that begins so.
        ValueError: It is none of these, or several digests begin so.
    """
    if is_digest(reference):
        return reference
    if _BEGINNING.fullmatch(reference) is None:
        return registry.resolve(reference)
    found = [e.digest for e in registry.search() if e.digest.startswith(reference)]
    if not found:
        msg = f"no kernel whose digest begins with {reference} is published here"
        raise KernelNotFoundError(msg)
    if len(found) > 1:
        msg = f"{len(found)} digests begin with {reference}, {found[0]} for one; give more letters"
        raise ValueError(msg)
    return found[0]


def signing_key(path: Path) -> SigningKey:
    """Return the private key in a file.

    Raises:
        EsperError: The extra is not installed.
        OSError: The file cannot be read.
        ValueError: There is no such key in it.
    """
    with sign_extra():
        from esper.registry.signing import SigningKey
    return SigningKey(path.read_bytes())


def trusted_of(digest: str, signature: KernelSignature, environment: Environment) -> str:
    """Say in words whether a signature counts, as far as the trusted keys tell."""
    if environment.trusted_keys is None:
        return "not checked: no trusted keys"
    with sign_extra():
        from esper.registry.signing import TrustedKeys
    counts = TrustedKeys(environment.trusted_keys).vouches(digest, signature)
    return "trusted" if counts else "not trusted"
