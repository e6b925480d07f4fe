"""Answers that can be kept, continued, and compared: entity tags and ranges, as of RFC 9110."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.ports import ANY
from esper.contracts.reference import is_digest
from esper.server import models

if TYPE_CHECKING:
    from collections.abc import Mapping

_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {
        "model": models.Problem,
        "description": description,
        "content": {"application/problem+json": {}},
    }
    for status, description in {
        400: "The request is malformed",
        401: "There is no token that counts",
        403: "The token has not the scope",
        404: "There is no such thing",
        408: "The body came too slowly",
        413: "The body is too long",
        415: "The body is encoded",
        429: "Too many requests at once; see Retry-After",
        503: "A store did not do its part; see Retry-After",
    }.items()
}
"""What any route may answer in place of what it is for."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return ``REFUSALS`` and some more statuses, as problems."""
    more: dict[int | str, dict[str, Any]] = {
        s: {**REFUSALS[400], "description": _MORE[s]} for s in statuses
    }
    return {**REFUSALS, **more}


_MORE: Final = {
    409: "A tag points to it",
    412: "The tag is not where If-Match says",
    500: "The stored bytes are damaged or gone",
}


def etag(digest: str) -> str:
    """Return the entity tag of what a digest names."""
    return f'"{digest}"'


def is_known(headers: Mapping[str, str], tag: str) -> bool:
    """Say whether a reader has this already, by its ``If-None-Match``."""
    given = headers.get("if-none-match", "")
    return given.strip() == "*" or tag in {each.strip() for each in given.split(",")}


def expected_by(headers: Mapping[str, str]) -> str | None:
    """Return where a mover has seen a tag point: a digest, None for nowhere, or ``ANY``.

    Raises:
        ValueError: ``If-Match`` or ``If-None-Match`` says something else.
    """
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None and none_match is None and is_digest(match.strip().strip('"')):
        return match.strip().strip('"')
    if match is None and none_match is not None and none_match.strip() == "*":
        return None
    if match is None and none_match is None:
        return ANY
    msg = 'a tag is moved with If-Match: "DIGEST" or with If-None-Match: *, or without either'
    raise ValueError(msg)


def part_asked_for(headers: Mapping[str, str], tag: str, size_bytes: int) -> range | None:
    """Return the bytes that a reader asks for; None for all, empty where there are none such."""
    found = _RANGE.fullmatch(headers.get("range", "").strip())
    if found is None or found[0] == "bytes=-" or headers.get("if-range", tag).strip() != tag:
        return None
    first, last = found.groups()
    if not first:
        return range(max(0, size_bytes - int(last)), size_bytes)
    end = min(size_bytes, int(last) + 1) if last else size_bytes
    if last and int(last) < int(first):
        return None
    return range(int(first), max(int(first), end))
