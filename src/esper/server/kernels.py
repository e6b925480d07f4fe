"""The routes of artifacts: publish, look, get, withdraw, and what is said of them later."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Final, get_args

from fastapi import APIRouter, Header, Path, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.security import SecurityScopes

from esper.contracts.errors import KernelCorruptError
from esper.contracts.kernel_reports import FieldReport, ValidationReport
from esper.contracts.ports import RegistryEntry, SearchOrder
from esper.contracts.signature import KernelSignature
from esper.registry import documents
from esper.registry.criteria import CRITERIA, KINDS, from_text
from esper.registry.stored import StoredRegistry
from esper.registry.upload import Upload
from esper.server import answers, models
from esper.server.authority import (
    Admin,
    Credentials,
    Promoter,
    Publisher,
    Reader,
    Worker,
    token_of,
)
from esper.server.problems import StoredBytesGone, problem

MOST_ON_A_PAGE: Final = 500
LAST_ON_A_PAGE: Final = (1 << 63) - 1
"""The highest number that a database counts to."""

_CHUNK_BYTES: Final = 1 << 20
_SHA256: Final = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")
_PAGING: Final = frozenset({"limit", "after", "order"})

router = APIRouter(prefix="/kernels", tags=["kernels"], responses=answers.REFUSALS)

Digest = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{64}$", description="sha256 of it.")]


def registry_of(request: Request) -> StoredRegistry:
    """Return the registry that a request is about."""
    registry: StoredRegistry = request.app.state.registry
    return registry


_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, openapi_extra=_BODY)
async def publish(
    request: Request,
    response: Response,
    token: Publisher,
    content_digest: Annotated[
        str | None, Header(description="sha-256=:BASE64: of the body, compared before storing.")
    ] = None,
    esper_record: Annotated[
        str | None, Header(description="What is kept beside it: a JSON object.", max_length=8_192)
    ] = None,
) -> models.Published:
    """Publish an artifact: its bytes, as they are. Publishing it again changes nothing."""
    upload = registry_of(request).receive(
        digest=_digest_in(content_digest), record=_record_in(esper_record), actor=token.name
    )
    try:
        await _write_all(request, upload)
        digest = await run_in_threadpool(upload.publish)
    finally:
        await run_in_threadpool(upload.close)
    response.headers["Location"] = _address(request, digest)
    return models.Published(id=digest)


_FORMS: Final[dict[type, dict[str, Any]]] = {
    str: {"type": "string"},
    int: {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
    bool: {"type": "boolean"},
}
_CRITERIA: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {"enum": list(KINDS)} if name == "kind" else _FORMS[kind],
        }
        for name, kind in CRITERIA.items()
    ]
}


@router.get("", openapi_extra=_CRITERIA)
def search(
    request: Request,
    _: Reader,
    limit: Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)] = 100,
    after: Annotated[
        int | None, Query(ge=0, le=LAST_ON_A_PAGE, description="As the page before says.")
    ] = None,
    order: Annotated[str, Query(json_schema_extra={"enum": [*get_args(SearchOrder)]})] = "oldest",
) -> models.KernelPage:
    """Return what meets every criterion, page by page."""
    criteria = {
        name: from_text(name, text)
        for name, text in request.query_params.items()
        if name not in _PAGING
    }
    found = registry_of(request).search(limit=limit, after=after, order=order, **criteria)  # type: ignore[arg-type] # checked there
    return models.KernelPage(
        kernels=[_entry(request, documents.of_entry(entry)) for entry in found],
        after=found[-1].number if len(found) == limit else None,
    )


def _entry_for_reader(
    request: Request, digest: Digest, needed: SecurityScopes, given: Credentials
) -> RegistryEntry:
    """Check the token and look the kernel up on one thread: to change threads takes longer."""
    token_of(request, needed, given)
    return registry_of(request).entry(digest)


@router.get("/{id}", response_model=models.KernelOut, responses={304: {"description": "As it was"}})
@router.head("/{id}", response_model=None, operation_id="head_kernel")
async def look(
    request: Request,
    found: Annotated[RegistryEntry, Security(_entry_for_reader, scopes=["read"])],
) -> Response:
    """Return what is known of an artifact."""
    entry = _entry(request, documents.of_entry(found))
    text = entry.model_dump_json().encode()
    tag = answers.etag(hashlib.sha256(text).hexdigest())
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if answers.is_known(request.headers, tag):
        return Response(status_code=304, headers=headers)
    return Response(text, headers=headers, media_type="application/json")


@router.get(
    "/{id}/binary",
    response_class=StreamingResponse,
    responses={
        **answers.refusals(500),
        200: {"content": {"application/octet-stream": {}}, "description": "The bytes"},
        206: {"content": {"application/octet-stream": {}}, "description": "The part"},
        304: {"description": "The bytes that the reader has"},
        416: {**answers.REFUSALS[400], "description": "There are no such bytes"},
    },
)
@router.head("/{id}/binary", response_model=None, operation_id="head_binary")
def binary(request: Request, digest: Digest, _: Reader) -> Response:
    """Return an artifact's bytes, or the part of them that ``Range`` asks for."""
    registry = registry_of(request)
    size = registry.stat(digest)
    tag = answers.etag(digest)
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if answers.is_known(request.headers, tag):
        return Response(status_code=304, headers=headers)
    part = answers.part_asked_for(request.headers, tag, size)
    if part is not None and not part:
        headers = {"Content-Range": f"bytes */{size}"}
        return problem(416, f"{digest} has {size} bytes", kind="invalid", headers=headers)
    asked = part or range(size)
    headers["Content-Length"] = str(len(asked))
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    chunks = _chunks(registry, digest, asked)
    return StreamingResponse(chunks, status, headers, media_type="application/octet-stream")


@router.delete("/{id}", status_code=204, responses=answers.refusals(409))
def withdraw(request: Request, digest: Digest, token: Admin) -> None:
    """Withdraw an artifact that no tag points to. Its bytes go at a later collection."""
    registry_of(request).delete(digest, actor=token.name)


@router.put("/{id}/deprecation", status_code=204)
def deprecate(
    request: Request, digest: Digest, token: Promoter, said: models.DeprecationIn
) -> None:
    """Say that an artifact should not be used any more. It can be had as before."""
    registry_of(request).deprecate(
        digest, reason=said.reason, successor=said.successor, actor=token.name
    )


@router.delete("/{id}/deprecation", status_code=204)
def reinstate(request: Request, digest: Digest, token: Promoter) -> None:
    """Take a deprecation back."""
    registry_of(request).reinstate(digest, actor=token.name)


@router.get("/{id}/outcomes")
def outcomes(request: Request, digest: Digest, _: Reader) -> models.Outcomes:
    """Return what grafts of an artifact brought."""
    found = registry_of(request).outcomes(digest)
    return models.Outcomes.model_validate({"outcomes": [each.to_document() for each in found]})


@router.post("/{id}/outcomes", status_code=204)
def report_outcome(
    request: Request, digest: Digest, _: Publisher, report: models.OutcomeIn
) -> None:
    """Report what a graft brought. One run reports one graft once."""
    _check_same(digest, report.artifact_id)
    registry_of(request).report_outcome(FieldReport.from_document(report.model_dump()))


@router.get("/{id}/validations")
def validations(request: Request, digest: Digest, _: Reader) -> models.Validations:
    """Return what validations of an artifact found."""
    found = registry_of(request).validations(digest)
    return models.Validations.model_validate({"validations": [r.to_document() for r in found]})


@router.post("/{id}/validations", status_code=204)
def report_validation(
    request: Request, digest: Digest, _: Worker, report: models.ValidationIn
) -> None:
    """Report what a validation found."""
    _check_same(digest, report.artifact_id)
    registry_of(request).report_validation(ValidationReport.from_document(report.model_dump()))


@router.get("/{id}/signatures")
def signatures(request: Request, digest: Digest, _: Reader) -> models.Signatures:
    """Return an artifact's signatures, which whoever reads them checks."""
    found = registry_of(request).signatures(digest)
    return models.Signatures.model_validate({"signatures": [s.to_document() for s in found]})


@router.post("/{id}/signatures", status_code=204)
def attach_signature(
    request: Request, digest: Digest, token: Publisher, signature: models.SignatureIn
) -> None:
    """Keep a signature beside an artifact. The same one again changes nothing."""
    _check_same(digest, signature.artifact_id)
    signed = KernelSignature.from_document(signature.model_dump())
    registry_of(request).attach_signature(signed, actor=token.name)


async def _write_all(request: Request, upload: Upload) -> None:
    """Write a body to where artifacts are stored, and hold no more of it than a chunk."""
    waiting = bytearray()
    async for data in request.stream():
        waiting += data
        if len(waiting) >= _CHUNK_BYTES:
            await run_in_threadpool(upload.write, bytes(waiting))
            waiting.clear()
    await run_in_threadpool(upload.write, bytes(waiting))


def _chunks(registry: StoredRegistry, digest: str, asked: range) -> Iterator[bytes]:
    """Yield the bytes asked for. The first are read before an answer is begun."""
    try:
        first = registry.read(digest, asked.start, min(len(asked), _CHUNK_BYTES))
    except KernelCorruptError as error:
        raise StoredBytesGone(error) from error

    def rest() -> Iterator[bytes]:
        yield first
        start = asked.start + len(first)
        while start < asked.stop and (
            data := registry.read(digest, start, min(asked.stop - start, _CHUNK_BYTES))
        ):
            yield data
            start += len(data)

    return rest()


def _entry(request: Request, document: dict[str, Any]) -> models.KernelOut:
    reference = f"{_address(request, document['id'])}/binary"
    return models.KernelOut(**document, kernel_binary_ref=reference)


def _address(request: Request, digest: str) -> str:
    """Return an artifact's address as a path: names of hosts are not taken from requests."""
    return f"{request.scope.get('root_path', '')}/api/v1/kernels/{digest}"


def _check_same(digest: str, artifact_id: str) -> None:
    if digest != artifact_id:
        msg = f"a report of {artifact_id} was sent to {digest}"
        raise ValueError(msg)


def _digest_in(content_digest: str | None) -> str | None:
    """Return the sha256 that a Content-Digest header says.

    Raises:
        ValueError: It says another hash, or none.
    """
    if content_digest is None:
        return None
    found = _SHA256.fullmatch(content_digest.strip())
    try:
        return base64.b64decode(found[1], validate=True).hex() if found else _not_a_digest()
    except binascii.Error:
        return _not_a_digest()


def _not_a_digest() -> str:
    msg = "Content-Digest is sha-256=:BASE64: of the body"
    raise ValueError(msg)


def _record_in(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"Esper-Record is a JSON object: {error}"
        raise ValueError(msg) from error
    if not isinstance(record, dict):
        msg = "Esper-Record is a JSON object"
        raise ValueError(msg)  # noqa: TRY004 - a client's mistake, not a caller's
    return record
