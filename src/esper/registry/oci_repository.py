"""What is done with kernels in a repository of images: each operation with all its requests."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final, final
from urllib.parse import parse_qs, urlsplit

from esper.contracts.errors import (
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.registry import oci_manifest, refusals
from esper.registry.http import Download, error_of
from esper.registry.oci_manifest import MANIFEST_TYPE, blob_name, published_tag

if TYPE_CHECKING:
    import httpx2

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.kernel_reports import Deprecation
    from esper.contracts.ports import RegistryEntry
    from esper.contracts.signature import KernelSignature
    from esper.registry.http import Shelf
    from esper.registry.oci import OciSession

_MAX_MANIFEST_BYTES: Final = 1 << 22
_PAGE: Final = 500
_BLOB_UNKNOWN: Final = b"MANIFEST_BLOB_UNKNOWN"
_TRIES_OF_A_BLOB_UNKNOWN: Final = 10
"""Times that a manifest is sent whose blobs are there but said to be unknown: registries on a file
system empty the link to a blob for a moment where somebody else puts the same blob."""
_NEXT: Final = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?', re.IGNORECASE)


@final
class OciRepository:
    """Kernels in a repository; every method ends when the clock reads ``until_s``.

    Args:
        session: Who asks.
        max_bytes: Longest artifact that is taken.
    """

    def __init__(self, session: OciSession, max_bytes: int) -> None:
        self._session = session
        self._max_bytes = max_bytes

    def publish(self, entry: RegistryEntry, data: bytes, until_s: float) -> None:
        """Publish an artifact; what is published stays as it is, and its bytes are looked for."""
        tag = published_tag(entry.digest)
        is_published = self._manifest(tag, until_s) is not None
        for blob in (oci_manifest.EMPTY, data):
            self._upload(blob, until_s)
        if not is_published:
            self._write_manifest(tag, oci_manifest.of_entry(entry), until_s)

    def fetch(self, digest: str, shelf: Shelf | None, until_s: float) -> bytes:
        """Return an artifact's bytes, compared with its digest."""
        url = f"{self._session.url}/blobs/sha256:{digest}"
        download = Download(
            digest, url, tag=f'"sha256:{digest}"', max_size_bytes=self._max_bytes, shelf=shelf
        )
        return download.run(
            lambda headers, end_s: self._session.blob(
                "GET", digest, until_s=end_s, headers=headers
            ),
            self._session.exchange,
            until_s,
        )

    def size(self, digest: str, until_s: float) -> int:
        """Return an artifact's length in bytes.

        Raises:
            KernelNotFoundError: There is none.
        """
        with self._session.blob("HEAD", digest, until_s=until_s) as answer:
            if answer.status_code != 200:
                raise _failure(answer, b"", digest)
            return int(answer.headers["Content-Length"])

    def read(self, digest: str, start: int, length: int, until_s: float) -> bytes:
        """Return a part of an artifact."""
        asked = {"Range": f"bytes={start}-{start + length - 1}"}
        with self._session.blob("GET", digest, until_s=until_s, headers=asked) as answer:
            if answer.status_code == 416:
                return b""
            data = self._session.exchange.body(answer, until_s, most=length)
            if answer.status_code != 206:
                raise _failure(answer, data, digest)
            return data

    def tags(self, until_s: float) -> list[str]:
        """Return every manifest tag of the repository."""
        found: dict[str, None] = {}
        params = {"n": str(_PAGE)}
        while True:
            num_before = len(found)
            with self._session.answer(
                "GET", "/tags/list", until_s=until_s, params=params
            ) as answer:
                data = self._session.exchange.body(answer, until_s, most=_MAX_MANIFEST_BYTES)
            if answer.status_code == 404:  # nothing was ever put there
                return []
            if answer.status_code != 200:
                raise _failure(answer, data, "the list of tags")
            found |= dict.fromkeys(_tags_in(data, self._session.url))
            following = _NEXT.search(answer.headers.get("Link", ""))
            last = parse_qs(urlsplit(following[1]).query).get("last") if following else None
            if not last or len(found) == num_before:
                return list(found)
            params["last"] = last[0]

    def entries(self, until_s: float) -> list[RegistryEntry]:
        """Return what is known of everything that is published here by this library."""
        tags = self.tags(until_s)
        named = self._named(tags, until_s)
        found = []
        for digest in oci_manifest.published_in(tags):
            entry = self._entry(digest, until_s)
            if entry is not None:
                found.append(replace(entry, tags=tuple(named.get(digest, ()))))
        return _numbered(found)

    def pointed(self, tag: str, until_s: float) -> tuple[str, int] | None:
        """Return the digest and the size of what a manifest tag names; None where it is not."""
        data = self._manifest(tag, until_s)
        return None if data is None else oci_manifest.layer_of(data, f"{self._session.url}:{tag}")

    def point(self, tag: str, digest: str, moved: JsonObject, until_s: float) -> None:
        """Let a tag name a published artifact.

        Raises:
            KernelNotFoundError: It is not published.
        """
        found = self.pointed(published_tag(digest), until_s)
        if found is None:
            raise refusals.not_published(digest)
        self._write_manifest(tag, oci_manifest.of_move(*found, moved), until_s)

    def withdraw(self, tag: str, until_s: float) -> None:
        """Take a manifest away, and with it the tag.

        Raises:
            KernelNotFoundError: It is not there.
        """
        data = self._manifest(tag, until_s)
        if data is None:
            msg = f"there is no {tag} in {self._session.url}"
            raise KernelNotFoundError(msg)
        self._remove(f"/manifests/{blob_name(data)}", until_s)

    def delete(self, digest: str, until_s: float) -> None:
        """Withdraw an artifact, its bytes too.

        Raises:
            KernelNotFoundError: It is not published.
            ValueError: A tag points to it.
        """
        named = self._named(self.tags(until_s), until_s).get(digest)
        if named:
            raise refusals.still_tagged(digest, tuple(named))
        self.withdraw(published_tag(digest), until_s)
        self._remove(f"/blobs/sha256:{digest}", until_s)

    def deprecate(self, digest: str, said: Deprecation | None, until_s: float) -> None:
        """Say of an artifact that it should not be used; None takes that back.

        Raises:
            KernelNotFoundError: It is not published, or not by this library.
        """
        entry, signatures = self._published(digest, until_s)
        manifest = oci_manifest.of_entry(replace(entry, deprecation=said), signatures)
        self._write_manifest(published_tag(digest), manifest, until_s)

    def sign(self, signature: KernelSignature, until_s: float) -> None:
        """Keep a signature of an artifact.

        Raises:
            KernelNotFoundError: The artifact is not published, or not by this library.
            ValueError: It has as many as are kept.
        """
        digest = signature.artifact_id
        entry, signatures = self._published(digest, until_s)
        if refusals.keep_signature(signature, signatures):
            manifest = oci_manifest.of_entry(entry, signatures)
            self._write_manifest(published_tag(digest), manifest, until_s)

    def signatures(self, digest: str, until_s: float) -> list[KernelSignature]:
        """Return the signatures of an artifact; none where it is not published."""
        tag = published_tag(digest)
        data = self._manifest(tag, until_s)
        place = f"{self._session.url}:{tag}"
        return [] if data is None else oci_manifest.signatures_in(data, place)

    def entry(self, digest: str, until_s: float) -> RegistryEntry:
        """Return what is known of one artifact, with its tags.

        Raises:
            KernelNotFoundError: It is not published, or not by this library.
        """
        entry, _ = self._published(digest, until_s)
        named = self._named(self.tags(until_s), until_s)
        return replace(entry, tags=tuple(named.get(digest, ())))

    def _named(self, tags: list[str], until_s: float) -> dict[str, list[str]]:
        """Return every ``name:tag`` by the digest that it points to."""
        named: dict[str, list[str]] = {}
        for name, tag in oci_manifest.references_in(tags):
            pointed = self.pointed(oci_manifest.tag_of(name, tag), until_s)
            if pointed is not None:
                named.setdefault(pointed[0], []).append(f"{name}:{tag}")
        return named

    def _published(
        self, digest: str, until_s: float
    ) -> tuple[RegistryEntry, list[KernelSignature]]:
        tag = published_tag(digest)
        data, place = self._manifest(tag, until_s), f"{self._session.url}:{tag}"
        entry = None if data is None else oci_manifest.to_entry(data, place)
        if data is None or entry is None:
            raise refusals.not_published(digest)
        return entry, oci_manifest.signatures_in(data, place)

    def _entry(self, digest: str, until_s: float) -> RegistryEntry | None:
        tag = published_tag(digest)
        data = self._manifest(tag, until_s)
        return None if data is None else oci_manifest.to_entry(data, f"{self._session.url}:{tag}")

    def _manifest(self, tag: str, until_s: float) -> bytes | None:
        path, headers = f"/manifests/{tag}", {"Accept": MANIFEST_TYPE}
        with self._session.answer("GET", path, until_s=until_s, headers=headers) as answer:
            data = self._session.exchange.body(answer, until_s, most=_MAX_MANIFEST_BYTES)
        if answer.status_code in (404, 410):
            return None
        if answer.status_code != 200:
            raise _failure(answer, data, tag)
        return data

    def _write_manifest(self, tag: str, manifest: bytes, until_s: float) -> None:
        path, headers = f"/manifests/{tag}", {"Content-Type": MANIFEST_TYPE}
        self._write("PUT", path, until_s, headers=headers, content=manifest)

    def _upload(self, data: bytes, until_s: float) -> None:
        """Put a blob, where it is not there yet."""
        name = blob_name(data)
        try:
            self.size(name.removeprefix("sha256:"), until_s)
        except KernelNotFoundError:
            url = f"{self._session.url}/blobs/uploads/"
            begun = self._write("POST", "/blobs/uploads/", until_s)
            location = self._session.followed(
                begun.headers.get("Location", ""), url, only_here=True
            )
            location += ("&" if "?" in location else "?") + f"digest={name}"
            headers = {"Content-Type": "application/octet-stream"}
            self._write("PUT", location, until_s, headers=headers, content=data)

    def _write(
        self,
        method: str,
        path: str,
        until_s: float,
        *,
        headers: dict[str, str] | None = None,
        content: bytes = b"",
    ) -> httpx2.Response:
        num_left = _TRIES_OF_A_BLOB_UNKNOWN
        while True:
            with self._session.answer(
                method, path, until_s=until_s, headers=headers, content=content
            ) as answer:
                data = self._session.exchange.body(answer, until_s, most=0)
            if answer.status_code in (201, 202):
                return answer
            num_left -= 1
            if _BLOB_UNKNOWN not in data or num_left == 0:
                raise _failure(answer, data, path)

    def _remove(self, path: str, until_s: float) -> None:
        with self._session.answer("DELETE", path, until_s=until_s) as answer:
            data = self._session.exchange.body(answer, until_s, most=0)
        if answer.status_code not in (200, 202, 404):
            raise _failure(answer, data, path)


def _numbered(entries: list[RegistryEntry]) -> list[RegistryEntry]:
    """Return the entries in the order of their numbers, those that are equal a little apart."""
    found: list[RegistryEntry] = []
    for entry in sorted(entries, key=lambda entry: (entry.number, entry.digest)):
        least = found[-1].number + 1 if found else entry.number
        found.append(replace(entry, number=max(entry.number, least)))
    return found


def _tags_in(data: bytes, place: str) -> list[str]:
    try:
        return [str(tag) for tag in json.loads(data)["tags"] or ()]
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        msg = f"{place}/tags/list answered with what is not to be read: {error!r:.200}"
        raise KernelSourceUnavailable(msg) from error


def _failure(answer: httpx2.Response, data: bytes, what: str) -> Exception:
    """Return what an answer that is not the one asked for is raised as."""
    url = answer.request.url.copy_with(query=None)
    said = data[:300].decode(errors="replace")
    msg = f"{url}: {what} was answered with {answer.status_code} {said}"
    if answer.status_code in (404, 410):
        return KernelNotFoundError(msg)
    error = error_of(answer.status_code)
    if error is KernelSourceRefused and answer.status_code == 405:
        msg += "; the registry has to allow deletion (REGISTRY_STORAGE_DELETE_ENABLED of Docker's)"
    return error(msg)
