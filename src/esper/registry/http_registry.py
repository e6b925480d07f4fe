"""A registry over HTTP: what ``esper registry serve`` answers, as the port that all others fill."""

from __future__ import annotations

import base64
import json
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, final
from urllib.parse import quote

from esper.contracts import reference
from esper.contracts.errors import (
    BlueprintError,
    JobLostError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
    KernelSourceUnreadable,
    TagMovedError,
)
from esper.contracts.kernel_reports import FieldReport, ValidationReport
from esper.contracts.ports import ANY, RegistryCheck, RegistryEntry, TagMove
from esper.contracts.signature import KernelSignature
from esper.registry import criteria as searching
from esper.registry import documents, refusals
from esper.registry.endpoint import Endpoint
from esper.registry.exchange import Exchange
from esper.registry.http import HttpKernelSource, check_part, error_of, length_of
from esper.registry.http_jobs import HttpJobs
from esper.registry.screening import MAX_ARTIFACT_BYTES, record_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    import httpx2

    from esper.contracts.ports import SearchCriteria, SearchOrder
    from esper.registry.http import Shelf

T = TypeVar("T")

_NOT_TO_BE_READ: Final = (
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    KernelCorruptError,
)
"""What reading a document of another form than was asked for raises."""

_PAGE: Final = 500
_MAX_DOCUMENT_BYTES: Final = 1 << 23
_MAX_DOCUMENT_VALUES: Final = 1 << 19
"""More than a page of 500 kernels has; what is read takes a hundred times its length otherwise."""

_PROBLEMS: Final[dict[str, Callable[[str], Exception]]] = {
    "not-found": KernelNotFoundError,
    "not-a-blueprint": BlueprintError,
    "job-lost": JobLostError,
    "not-an-artifact": KernelCorruptError,
    "stored-bytes-gone": KernelCorruptError,
    "too-large": ValueError,
    "still-tagged": ValueError,
    "invalid": ValueError,
    "unknown-criterion": TypeError,
}
"""Last part of a problem's type -> what it is raised as here."""


@final
class HttpRegistry:
    """A :class:`~esper.contracts.ports.Registry` behind an address; threads may share it.

    Every request ends by one deadline; pages of a search are requests of their own. What may be
    asked twice is asked again after a failure that may pass, within that deadline and a budget of
    retries; a server that keeps failing is left alone for a while.

    Args:
        base_url: ``http://`` or ``https://``, a host, and what comes before ``/api/v1``.
        token: Sent as a bearer token, where there is one.
        timeout_s: Seconds for a request with its answer and its retries, above 0; an
            artifact has a second more for every 64 KiB, one that is fetched as they come.
        max_size_bytes: Longest artifact that is taken, at least 1.
        sleep: Waits before a retry, seconds.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_s: float = 10.0,
        max_size_bytes: int = MAX_ARTIFACT_BYTES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchange = Exchange(base_url, timeout_s=timeout_s, token=token)
        self.endpoint = Endpoint(self.base_url, timeout_s=timeout_s, sleep=sleep)
        self._source = HttpKernelSource(
            base_url, timeout_s=timeout_s, max_size_bytes=max_size_bytes, token=token
        )

    @property
    def base_url(self) -> str:
        """Where it is, without a slash at its end."""
        return self._exchange.base_url

    address = base_url

    @property
    def jobs(self) -> HttpJobs:
        """Its compile service: what is to be compiled, and who is at it."""
        return HttpJobs(self._ask, self._listed)

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        headers = {"Content-Type": "application/octet-stream"}
        if digest is not None:
            sha256 = base64.b64encode(bytes.fromhex(reference.check_digest(digest))).decode()
            headers["Content-Digest"] = f"sha-256=:{sha256}:"
        if record:
            headers["Esper-Record"] = record_text(record)
        return self._ask(
            "POST",
            "/kernels",
            headers=headers,
            content=bytes(data),
            read=lambda said: reference.check_digest(said["id"]),
            may_repeat=True,
        )

    def fetch(self, digest: str, *, shelf: Shelf | None = None, waited_s: float = 0.0) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`."""
        reference.check_digest(digest)
        return self.endpoint.call(
            lambda until_s: self._source.fetch(digest, shelf=shelf, until_s=until_s),
            may_repeat=True,
            waited_s=waited_s,
        )

    get = fetch

    def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        path = _path(digest, "/binary")
        return self.endpoint.call(lambda until_s: self._stat(path, until_s), may_repeat=True)

    def _stat(self, path: str, until_s: float) -> int:
        with self._exchange.answer("HEAD", path, until_s=until_s) as answer:
            if answer.status_code != 200:
                raise self._refusal(answer, b"", path)
            return length_of(answer)

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`."""
        refusals.check_range(start, length)
        if length == 0:
            self.stat(digest)
            return b""
        path = _path(digest, "/binary")
        return self.endpoint.call(
            lambda until_s: self._read(path, start, length, until_s), may_repeat=True
        )

    def _read(self, path: str, start: int, length: int, until_s: float) -> bytes:
        asked = {"Range": f"bytes={start}-{start + length - 1}"}
        with self._exchange.answer(
            "GET", path, until_s=until_s, headers=asked, is_artifact=True
        ) as answer:
            data = self._exchange.body(answer, until_s, most=length)
            if answer.status_code == 416:
                return b""
            if answer.status_code != 206:
                raise self._refusal(answer, data, path)
            check_part(answer, data, start, length)
            return data

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        try:
            self.stat(digest)
        except KernelNotFoundError:
            return False
        return True

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of an artifact; see :class:`~esper.contracts.ports.Registry`."""
        return self._ask("GET", _path(digest), read=documents.to_entry)

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        searching.as_sql(criteria)
        asked = {name: _text(value) for name, value in criteria.items()}
        asked["order"] = order
        return self._listed("/kernels", asked, after, limit, "kernels", documents.to_entry)

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        return self._listed("/names", {}, after or None, limit, "names", reference.check_name)

    def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        path = f"/names/{reference.check_name(name)}/tags"
        return self._ask("GET", path, read=lambda said: documents.to_tags(said["tags"]))

    def tag(
        self,
        name: str,
        tag: str,
        digest: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,  # noqa: ARG002 - the server knows who asks, and enters that
    ) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`.

        ``actor`` is not sent: the server enters whose token it was.
        """
        body = {"digest": reference.check_digest(digest)}
        self._ask("PUT", _tag_path(name, tag), headers=_condition(expected), body=body)

    def untag(
        self,
        name: str,
        tag: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,  # noqa: ARG002 - as for ``tag``
    ) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        self._ask("DELETE", _tag_path(name, tag), headers=_condition(expected))

    def resolve(self, name_and_tag: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        path = _tag_path(*reference.split_reference(name_and_tag))
        return self._ask("GET", path, read=lambda said: reference.check_digest(said["digest"]))

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        path = f"{_tag_path(name, tag)}/history"
        return self._ask("GET", path, read=_list_of("moves", documents.to_move))

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        self._ask("DELETE", _path(digest))

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_grace(grace_s)
        asked = {"grace_s": str(grace_s)}
        read = _list_of("removed", reference.check_digest)
        return tuple(self._ask("POST", "/upkeep/collect", params=asked, read=read))

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_limit(limit)
        looks, more = [], limit
        while True:
            num = _PAGE if more is None else min(more, _PAGE)
            asked = {"after": after, "limit": str(num)}
            read = documents.to_check
            looks.append(self._ask("POST", "/upkeep/verify", params=asked, read=read))
            more = None if more is None else more - num
            if looks[-1].after is None or more == 0:
                return _joined(looks)
            if looks[-1].after <= after:
                msg = f"{self.base_url} looks at one page for ever"
                raise KernelSourceRefused(msg)
            after = looks[-1].after

    def deprecate(
        self,
        digest: str,
        *,
        reason: str,
        successor: str | None = None,
        actor: str | None = None,  # noqa: ARG002 - as for ``tag``
    ) -> None:
        """Say not to use an artifact; see :class:`~esper.contracts.ports.Registry`."""
        refusals.check_reason(reason)
        if successor is not None:
            reference.check_digest(successor)
        body = {"reason": reason, "successor": successor}
        self._ask("PUT", _path(digest, "/deprecation"), body=body)

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        self._ask("DELETE", _path(digest, "/deprecation"))

    def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft brought; see :class:`~esper.contracts.ports.Registry`."""
        path, body = _path(report.artifact_id, "/outcomes"), report.to_document()
        self._ask("POST", path, body=body, may_repeat=True)

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return what grafts brought; see :class:`~esper.contracts.ports.Registry`."""
        read = _list_of("outcomes", FieldReport.from_document)
        return self._ask("GET", _path(digest, "/outcomes"), read=read)

    def report_validation(self, report: ValidationReport) -> None:
        """Keep what a validation found; see :class:`~esper.contracts.ports.Registry`."""
        self._ask("POST", _path(report.artifact_id, "/validations"), body=report.to_document())

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations found; see :class:`~esper.contracts.ports.Registry`."""
        read = _list_of("validations", ValidationReport.from_document)
        return self._ask("GET", _path(digest, "/validations"), read=read)

    def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`."""
        path = _path(signature.artifact_id, "/signatures")
        self._ask("POST", path, body=signature.to_document(), may_repeat=True)

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return an artifact's signatures; see :class:`~esper.contracts.ports.Registry`."""
        read = _list_of("signatures", KernelSignature.from_document)
        return self._ask("GET", _path(digest, "/signatures"), read=read)

    def close(self) -> None:
        """Close connections; a later request opens others."""
        self._exchange.close()
        self._source.close()

    def _listed(
        self,
        path: str,
        asked: Mapping[str, str],
        after: object,
        limit: int | None,
        key: str,
        read: Callable[[Any], T],
    ) -> list[T]:
        """Return a list that comes in pages, all of it or as much as the limit says."""
        found: list[T] = []
        page_of = _list_of(key, read)
        seen = {after}
        while limit is None or len(found) < limit:
            num = _PAGE if limit is None else min(limit - len(found), _PAGE)
            params = {**asked, "limit": str(num)}
            if after is not None:
                params["after"] = str(after)
            page, after = self._ask(
                "GET",
                path,
                params=params,
                read=lambda said: (page_of(said), documents.to_place(said["after"])),
            )
            found += page
            if after is None or not page:
                break
            if len(page) > num or after in seen:
                msg = f"{self.base_url}{path} lists more than was asked for, or one page for ever"
                raise KernelSourceRefused(msg)
            seen.add(after)
        return found[:limit]

    def _ask(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        read: Callable[[Any], T] = lambda said: said,
        may_repeat: bool = False,
    ) -> T:
        """Send a request, and return what ``read`` makes of its answer's document.

        What is a GET, or ``may_repeat``, is sent again where that may help.

        Raises:
            KernelSourceUnavailable: There was no answer that can be read.
            EsperError, ValueError, TypeError: What the answer says is raised as by a registry here.
        """
        sent = dict(headers or {})
        if body is not None:
            content, sent["Content-Type"] = json.dumps(body).encode(), "application/json"

        def once(until_s: float) -> T:
            with self._exchange.answer(
                method, path, until_s=until_s, headers=sent, content=content, params=params
            ) as answer:
                data = self._exchange.body(answer, until_s, most=_MAX_DOCUMENT_BYTES)
            if answer.status_code not in (200, 201, 202, 204):
                raise self._refusal(answer, data, path)
            if _is_another_form(answer):
                msg = (
                    f"{self.base_url}{path} answered in another form than JSON: {_form_of(answer)}"
                )
                raise KernelSourceUnreadable(msg)
            try:
                return read(_document(data))
            except _NOT_TO_BE_READ as error:
                msg = f"{self.base_url}{path} answered with what is not to be read: {error!r:.200}"
                raise KernelSourceUnavailable(msg) from error

        return self.endpoint.call(
            once, may_repeat=method == "GET" or may_repeat, num_bytes=len(content or b"")
        )

    def _refusal(self, answer: httpx2.Response, data: bytes, path: str) -> Exception:
        """Return what an answer that is not the one asked for is raised as here."""
        said = _problem(answer, data)
        words = str(said.get("detail", f"status {answer.status_code}"))[:1_000]
        detail = "".join(c if c.isprintable() else " " for c in words)  # terminals obey others
        msg = f"{self.base_url}{path}: {detail}"
        kind = str(said.get("type", "")).rpartition(":")[2]
        if kind == "tag-moved":
            found = said.get("found")
            return TagMovedError(msg, found=found if isinstance(found, str) else None)
        if kind in _PROBLEMS:
            return _PROBLEMS[kind](msg)
        if answer.status_code == 404:
            return KernelNotFoundError(msg)
        return error_of(answer.status_code)(msg)


def _document(data: bytes) -> Any:
    """Return what an answer's bytes say; None where there are none.

    Raises:
        ValueError: It is no JSON, or so much of it that it would fill the memory.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_DOCUMENT_VALUES:
        msg = f"a document with more than {_MAX_DOCUMENT_VALUES} values"
        raise ValueError(msg)
    return json.loads(data) if data else None


def _is_another_form(answer: httpx2.Response) -> bool:
    """Say whether an answer calls itself something else than the JSON that was asked for."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_plain = answer.headers.get("Content-Encoding", "identity").lower() == "identity"
    return not is_plain or kind not in ("", "application/json", "application/problem+json")


def _form_of(answer: httpx2.Response) -> str:
    """Return in which form an answer came, in words."""
    kind = answer.headers.get("Content-Type", "no type")
    encoding = answer.headers.get("Content-Encoding")
    return f"{kind:.80}" + (f", compressed ({encoding:.20})" if encoding else "")


def _problem(answer: httpx2.Response, data: bytes) -> dict[str, Any]:
    is_problem = answer.headers.get("Content-Type", "").startswith("application/problem+json")
    try:
        said = _document(data) if is_problem and data else {}
    except (ValueError, RecursionError):
        said = {}
    return said if isinstance(said, dict) else {}


def _list_of(key: str, read: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    """Return what reads the list under a key, item by item."""
    return lambda said: [read(item) for item in said[key]]


def _path(digest: str, rest: str = "") -> str:
    return f"/kernels/{reference.check_digest(digest)}{rest}"


def _tag_path(name: str, tag: str) -> str:
    key = reference.check_name(name), reference.check_name(tag, what="tag")
    return f"/names/{quote(key[0])}/tags/{quote(key[1])}"


def _condition(expected: str | None) -> dict[str, str]:
    """Return what tells the server where a tag was seen to point."""
    if expected == ANY:
        return {}
    if expected is None:
        return {"If-None-Match": "*"}
    return {"If-Match": f'"{reference.check_digest(expected)}"'}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(looks: list[RegistryCheck]) -> RegistryCheck:
    """Return several looks, one after the other, as one."""
    return RegistryCheck(
        intact=sum(look.intact for look in looks),
        quarantined=tuple(d for look in looks for d in look.quarantined),
        missing=tuple(d for look in looks for d in look.missing),
        unreferenced=tuple(d for look in looks for d in look.unreferenced),
        after=looks[-1].after,
    )
