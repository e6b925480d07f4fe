"""Kernels over HTTP, from a server that is not trusted to behave.

    GET {base}/api/v1/kernels/{digest}/binary
        200 application/octet-stream: the artifact's bytes, as they are
        404 where there is none

The address is built from the source's own base and a digest, and nothing that a server says leads
to another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import weakref
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Final, final
from urllib.parse import urlsplit

import httpx2

from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.contracts.reference import check_digest
from esper.registry.screening import MAX_ARTIFACT_BYTES
from esper.registry.timed_transport import TimedTransport
from esper.resilience.clock import MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Iterator

_BINARY_TYPES: Final = frozenset({"application/octet-stream", "binary/octet-stream", ""})
_PASSING_REFUSALS: Final = frozenset({408, 409, 421, 423, 425, 429})
"""Statuses of the 400s that another try may not meet."""

_NEVER_SERVED: Final = frozenset({501, 505})
_REQUEST_HEADERS: Final = {
    "Accept": "application/octet-stream",
    "Accept-Encoding": "identity",
}


@final
class HttpKernelSource:
    """A :class:`esper.contracts.ports.KernelSource` behind an HTTP address; threads may share it.

    Every fetch ends by one deadline, whatever the server does, and takes no more bytes than it
    was told to. It follows no redirect, accepts no content encoding, sends no cookies, and reads
    neither proxies nor passwords from the environment. It does not retry: that, and to stop
    asking a server that fails, is decided around it. One that is pickled, or that is used in a
    forked process, opens connections of its own.

    Args:
        base_url: ``http://`` or ``https://``, a host, and what comes before ``/api/v1``.
        timeout_s: Seconds for a whole fetch, above 0.
        max_size_bytes: Longest artifact that is taken, at least 1.
        client: What sends the requests, for example one with credentials in its headers; it stays
            the caller's, to close and to configure, proxies included. The deadline is kept to the
            millisecond by one over :class:`esper.registry.timed_transport.TimedTransport`; over
            another transport, it is looked at whenever bytes arrive.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 10.0,
        max_size_bytes: int = MAX_ARTIFACT_BYTES,
        client: httpx2.Client | None = None,
    ) -> None:
        if not (0 < timeout_s < float("inf") and max_size_bytes >= 1):
            msg = (
                f"a fetch needs time and room: timeout_s above 0, found {timeout_s}; "
                f"max_size_bytes at least 1, found {max_size_bytes}"
            )
            raise ValueError(msg)
        self.base_url = _checked_base(base_url)
        self._timeout_s = timeout_s
        self._max_size_bytes = max_size_bytes
        self._clock = MonotonicClock()
        self._given_client = client
        self._own_client: tuple[int, httpx2.Client] | None = None

    def fetch(self, digest: str) -> bytes:
        """Return the artifact whose sha256 is ``digest``, compared with it.

        Args:
            digest: 64 lower-case hexadecimal digits.

        Raises:
            KernelNotFoundError: The server answered that it has none (404, 410).
            KernelCorruptError: It answered with other bytes.
            KernelSourceRefused: It answered that it does not give it (a status of the 300s or 400s
                that stays), or with too much; another try would be answered so, too.
            KernelSourceUnavailable: It answered something else, or not in time.
            ValueError: ``digest`` is not a digest.
        """
        url = f"{self.base_url}/api/v1/kernels/{check_digest(digest)}/binary"
        until_s = self._clock.now() + self._timeout_s
        try:
            with self._answer(url) as answer:
                _check_answer(answer, url)
                data, found = self._read(answer, url, until_s)
        except httpx2.HTTPError as error:
            msg = f"{url} did not answer within {self._timeout_s:g} s: {error!r:.300}"
            raise KernelSourceUnavailable(msg) from error
        if found != digest:
            msg = (
                f"{url} answered with {len(data)} other bytes (sha256 {found}); do not trust the "
                "server until that is explained"
            )
            raise KernelCorruptError(msg)
        return data

    def close(self) -> None:
        """Close the connections that this process opened here; a later fetch opens others."""
        if self._own_client is not None and self._own_client[0] == os.getpid():
            self._own_client[1].close()
        self._own_client = None

    def __copy__(self) -> HttpKernelSource:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> HttpKernelSource:
        return self

    def __getstate__(self) -> dict[str, object]:
        if self._given_client is not None:
            msg = f"the source of {self.base_url} has a client that cannot be pickled with it"
            raise TypeError(msg)
        return {**self.__dict__, "_own_client": None}

    @contextlib.contextmanager
    def _answer(self, url: str) -> Iterator[httpx2.Response]:
        client = self._client()
        request = client.build_request(
            "GET", url, headers=_REQUEST_HEADERS, timeout=self._timeout_s
        )
        answer = client.send(request, stream=True, follow_redirects=False)
        try:
            yield answer
        finally:
            answer.close()

    def _client(self) -> httpx2.Client:
        if self._given_client is not None:
            return self._given_client
        if self._own_client is None or self._own_client[0] != os.getpid():
            is_https = self.base_url.lower().startswith("https:")
            verify = httpx2.create_ssl_context(trust_env=False) if is_https else None
            client = httpx2.Client(
                transport=TimedTransport(verify=verify),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                trust_env=False,
            )
            weakref.finalize(self, client.close).atexit = False
            self._own_client = os.getpid(), client
        return self._own_client[1]

    def _read(self, answer: httpx2.Response, url: str, until_s: float) -> tuple[bytes, str]:
        """Return the answer's bytes and their sha256.

        Raises:
            httpx2.ReadTimeout: They are still coming when the clock reads ``until_s``.
            KernelSourceRefused: They are more than this source takes.
        """
        self._check_size(int(answer.headers.get("Content-Length", "0")), url)
        parts: list[bytes] = []
        size_bytes, sha256 = 0, hashlib.sha256()
        for part in answer.iter_raw():
            size_bytes += len(part)
            self._check_size(size_bytes, url)
            if self._clock.now() >= until_s:
                msg = f"{size_bytes} bytes came in time"
                raise httpx2.ReadTimeout(msg)
            sha256.update(part)
            parts.append(part)
        return b"".join(parts), sha256.hexdigest()

    def _check_size(self, size_bytes: int, url: str) -> None:
        if size_bytes > self._max_size_bytes:
            msg = (
                f"{url} answers with {size_bytes} bytes or more, and at most "
                f"{self._max_size_bytes} are taken; raise max_size_bytes if that is right"
            )
            raise KernelSourceRefused(msg)


def _checked_base(base_url: str) -> str:
    parts = urlsplit(base_url)
    odd = parts.username or parts.password or parts.query or parts.fragment or parts.port == 0
    if parts.scheme not in ("http", "https") or not parts.hostname or odd:
        msg = (
            "a source over HTTP is at http://host/prefix or https://host/prefix, without "
            f"credentials, query or fragment; found {parts.scheme!r} and host {parts.hostname!r}"
        )
        raise ValueError(msg)
    return base_url.rstrip("/")


def _check_answer(answer: httpx2.Response, url: str) -> None:
    """Refuse what is not an artifact's bytes as they are, before any of them are read.

    Raises:
        KernelNotFoundError: The server says that there is none.
        KernelSourceRefused: It is another answer that stays.
        KernelSourceUnavailable: It is one that may pass.
    """
    if answer.status_code in (404, 410):
        msg = f"{url} has no such kernel ({answer.status_code})"
        raise KernelNotFoundError(msg)
    content_type = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    encoding = answer.headers.get("Content-Encoding", "identity")
    length = answer.headers.get("Content-Length", "0")
    for what, found, is_expected in (
        ("status", answer.status_code, answer.status_code == 200),
        ("content type", content_type, content_type in _BINARY_TYPES),
        ("content encoding", encoding, encoding.lower() == "identity"),
        ("content length", length, re.fullmatch("[0-9]{1,18}", length) is not None),
    ):
        if not is_expected:
            msg = (
                f"{url} answered with {what} {found!r:.80}; expected 200 with the artifact's bytes "
                "as application/octet-stream, not encoded and not elsewhere"
            )
            raise _error_of(answer.status_code)(msg)


def _error_of(status: int) -> type[KernelSourceUnavailable]:
    """Return what an answer that is no artifact means, by its status."""
    stays = (300 <= status < 500 and status not in _PASSING_REFUSALS) or status in _NEVER_SERVED
    return KernelSourceRefused if stays else KernelSourceUnavailable
