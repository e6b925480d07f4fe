"""What a refusal looks like: a problem as of RFC 9457, with a type by which programs know it."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from esper.contracts.errors import (
    BlueprintError,
    JobLostError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceUnavailable,
    TagMovedError,
)
from esper.registry.refusals import StillTaggedError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 1

KINDS: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (TagMovedError, 412, "tag-moved"),
    (BlueprintError, 400, "not-a-blueprint"),
    (JobLostError, 409, "job-lost"),
    (KernelNotFoundError, 404, "not-found"),
    (KernelCorruptError, 400, "not-an-artifact"),
    (KernelSourceUnavailable, 503, "unavailable"),
    (TooLargeError, 413, "too-large"),
    (StillTaggedError, 409, "still-tagged"),
    (ValueError, 400, "invalid"),
    (TypeError, 400, "unknown-criterion"),
)
"""Class of an error -> status and type of its problem; the first that fits."""


class StoredBytesGone(HTTPException):
    """The bytes of something published are damaged or gone; putting it again repairs that."""

    def __init__(self, error: KernelCorruptError) -> None:
        super().__init__(500, str(error))


def problem(
    status: int,
    detail: str,
    *,
    kind: str = "",
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """Return a refusal as an answer.

    Args:
        status: Its HTTP status.
        detail: What was wrong and what to do, for people.
        kind: Last part of its type; empty where the status says it all.
        headers: What else the answer says.
        more: Members of the problem that belong to its type.
    """
    document = {
        "type": f"urn:esper:problem:{kind}" if kind else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **more,
    }
    return Response(json.dumps(document), status, dict(headers or {}), media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of a route as a problem."""
    for kind, *_ in KINDS:
        app.add_exception_handler(kind, _of_registry)
    app.add_exception_handler(RequestValidationError, _of_request)
    app.add_exception_handler(HTTPException, _of_http)


def leave_out_what_is_never_answered(app: FastAPI) -> None:
    """Take the framework's own form of a refusal, status 422, out of the document."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign] # how FastAPI has its document changed


async def _of_registry(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as handlers are called
    status, kind = next((status, name) for cls, status, name in KINDS if isinstance(error, cls))
    more = {"found": error.found} if isinstance(error, TagMovedError) else {}
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return problem(status, str(error), kind=kind, headers=headers, **more)


async def _of_request(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as handlers are called
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return problem(400, wrong[:1_000], kind="invalid")


async def _of_http(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as handlers are called
    assert isinstance(error, HTTPException)
    kind = "stored-bytes-gone" if isinstance(error, StoredBytesGone) else ""
    return problem(error.status_code, str(error.detail), kind=kind, headers=error.headers)
