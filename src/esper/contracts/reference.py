"""How a kernel is named: a digest says which bytes, a name and a tag say which one today.

    digest     64 lower-case hexadecimal digits, the sha256 of the artifact's bytes
    name, tag  [a-z0-9][a-z0-9._-]{0,63}
    reference  name:tag

Nothing else is ever part of an address or of a file name.
"""

from __future__ import annotations

import re
from typing import Final

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_digest(text: str) -> bool:
    """Say whether ``text`` is a digest, in the one spelling that there is."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str) -> str:
    """Return ``text`` where it is a digest.

    Raises:
        ValueError: It is anything else.
    """
    if not is_digest(text):
        msg = (
            f"{_shown(text)} is not a digest: expected 64 lower-case hexadecimal digits, "
            "the artifact_id of a compiled kernel; a name:tag is resolved by the registry first, "
            "and the name of a kernel of the catalog goes to layer.graft"
        )
        raise ValueError(msg)
    return text


def is_name(text: str) -> bool:
    """Say whether ``text`` can be a name or a tag."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, *, what: str = "name") -> str:
    """Return ``text`` where it can be a name or a tag.

    Args:
        text: The candidate.
        what: What the message calls it.

    Raises:
        ValueError: It does not match ``[a-z0-9][a-z0-9._-]{0,63}``.
    """
    if not is_name(text):
        msg = (
            f"{_shown(text)} cannot be a {what}: expected 1 to 64 of a-z 0-9 . _ - and a letter "
            "or digit first; choose another"
        )
        raise ValueError(msg)
    return text


def split_reference(reference: str) -> tuple[str, str]:
    """Return the name and the tag of ``name:tag``.

    Raises:
        ValueError: It is not one name, a colon and one tag.
    """
    name, colon, tag = reference.partition(":")
    if not colon:
        msg = f"{_shown(reference)} has no tag: expected name:tag, for example mlp:latest"
        raise ValueError(msg)
    return check_name(name), check_name(tag, what="tag")


def _shown(text: str) -> str:
    """Quote what came from outside, cut to a length that a log can bear."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def without_password(address: str) -> str:
    """Return an address as it may be shown: without user, password and query.

    Args:
        address: ``scheme://user:password@host/path?query``, or a path, which stays as it is.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
