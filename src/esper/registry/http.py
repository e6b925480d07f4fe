"""Kernels over HTTP, from a server that is not trusted to behave.

    GET {base}/api/v1/kernels/{digest}/binary
        200 application/octet-stream: the artifact's bytes, as they are
        206 those that were asked for, where the server said before that it gives parts
        404 where there is none

The address is built from the source's own base and a digest, and nothing that a server says leads
to another one.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, Protocol, final

from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.contracts.reference import check_digest
from esper.registry.exchange import Exchange
from esper.registry.screening import MAX_ARTIFACT_BYTES
from esper.registry.upload import SLOWEST_BYTES_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    import httpx2

    from esper.contracts.ports import Clock

_BINARY_TYPES: Final = frozenset({"application/octet-stream", "binary/octet-stream", ""})
_PASSING_REFUSALS: Final = frozenset({408, 409, 421, 423, 425, 429})
"""Statuses of the 400s that another try may not meet."""

_NO_SUCH: Final = (404, 410)
_NEVER_SERVED: Final = frozenset({501, 505})
_ACCEPT: Final = {"Accept": "application/octet-stream"}


@final
class HttpKernelSource:
    """A :class:`esper.contracts.ports.KernelSource` behind an HTTP address; threads may share it.

    Every fetch ends by one deadline, whatever the server does, and takes no more bytes than it
    was told to; each 64 KiB that have come put it off by a second. One that is cut off goes on
    where it was, as long as time is left and every connection brings something. For the rest see
    :class:`esper.registry.exchange.Exchange`: it does not retry, which is decided around it.

    Args:
        base_url: ``http://`` or ``https://``, a host, and what comes before ``/api/v1``.
        timeout_s: Seconds for a whole fetch, above 0, beside what its bytes have given it.
        max_size_bytes: Longest artifact that is taken, at least 1.
        client: What sends the requests, for example one with credentials in its headers; it stays
            the caller's, to close and to configure, proxies included. The deadline is kept to the
            millisecond by one over :class:`esper.registry.timed_transport.TimedTransport`; over
            another transport, it is looked at whenever bytes arrive.
        token: Sent as a bearer token, where there is one.
        clock: Measures what is left.

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
        token: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if max_size_bytes < 1:
            msg = f"a fetch needs room: max_size_bytes at least 1, found {max_size_bytes}"
            raise ValueError(msg)
        self._max_size_bytes = max_size_bytes
        self._exchange = Exchange(
            base_url, timeout_s=timeout_s, client=client, token=token, clock=clock
        )

    @property
    def base_url(self) -> str:
        """Where it is, without a slash at its end."""
        return self._exchange.base_url

    def fetch(
        self, digest: str, *, shelf: Shelf | None = None, until_s: float | None = None
    ) -> bytes:
        """Return the artifact whose sha256 is ``digest``, compared with it.

        Args:
            digest: 64 lower-case hexadecimal digits.
            shelf: Has what has come of it before, and keeps what comes.
            until_s: The clock's reading at which it has to be over; by default after
                ``timeout_s``.

        Raises:
            KernelNotFoundError: The server answered that it has none (404, 410).
            KernelCorruptError: It answered with other bytes.
            KernelSourceRefused: It answered that it does not give it (a status of the 300s or 400s
                that stays), or with too much; another try would be answered so, too.
            KernelSourceUnavailable: It answered something else, or not in time.
            ValueError: ``digest`` is not a digest.
        """
        path = f"/kernels/{check_digest(digest)}/binary"
        exchange = self._exchange
        end_s = exchange.until_s() if until_s is None else until_s

        def ask(
            headers: Mapping[str, str], until_s: float
        ) -> AbstractContextManager[httpx2.Response]:
            return exchange.answer("GET", path, until_s=until_s, headers=headers, is_artifact=True)

        download = Download(
            digest,
            f"{self.base_url}/api/v1{path}",
            tag=f'"{digest}"',
            max_size_bytes=self._max_size_bytes,
            shelf=shelf,
        )
        return download.run(ask, exchange, end_s)

    def close(self) -> None:
        """Close the connections that this process opened here; a later fetch opens others."""
        self._exchange.close()

    def __copy__(self) -> HttpKernelSource:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> HttpKernelSource:
        return self


class Shelf(Protocol):
    """Where what has come of an artifact is kept, for whoever goes on with it."""

    def content(self) -> bytes:
        """Return what has come so far."""
        ...

    def append(self, data: bytes) -> None:
        """Keep some more."""
        ...

    def clear(self) -> None:
        """Begin anew."""
        ...


@final
class Download:
    """An artifact that has come as far as it has.

    Args:
        digest: Which one.
        url: Where it comes from, for messages.
        tag: The ``ETag`` by which the server calls it.
        max_size_bytes: Longest artifact that is taken.
        shelf: Has what has come of it before, and keeps what comes.
    """

    def __init__(
        self, digest: str, url: str, *, tag: str, max_size_bytes: int, shelf: Shelf | None = None
    ) -> None:
        self.size_bytes = 0
        self.can_go_on = False
        self._came_bytes = 0
        self._digest = digest
        self._url = url
        self._tag = tag
        self._max_size_bytes = max_size_bytes
        self._shelf = shelf
        self._parts: list[bytes] = []
        self._sha256 = hashlib.sha256()
        self._is_from_shelf = False
        found = b"" if shelf is None else shelf.content()
        if found:
            self._count(found)
            self._is_from_shelf = True

    def run(
        self,
        ask: Callable[[Mapping[str, str], float], AbstractContextManager[httpx2.Response]],
        exchange: Exchange,
        until_s: float,
    ) -> bytes:
        """Ask for what is lacking, again as long as every answer brings something.

        What has come gives it time beside ``until_s``, in all that is asked from then on.
        Where it went on from the shelf and comes out wrong, what was there may have been damaged:
        then all of it is asked for once.
        """
        while self._sha256.hexdigest() != self._digest or not self._is_from_shelf:
            num_before, end_s = self.size_bytes, self._end_s(until_s)
            try:
                with ask(self.headers(), end_s) as answer:
                    self.begin(answer)
                    for data in exchange.read(answer, end_s):
                        self.take(data)
                return self.finish()
            except KernelCorruptError:
                was_from_shelf = self._is_from_shelf
                self._begin_anew()
                if not was_from_shelf:
                    raise
            except KernelSourceUnavailable:
                in_time = exchange.left_s(self._end_s(until_s)) > 0
                if not (self.can_go_on and self.size_bytes > num_before and in_time):
                    raise
        return b"".join(self._parts)

    def headers(self) -> dict[str, str]:
        """Return what asks for the rest, and for all if it is not what it was."""
        if not self.size_bytes:
            return _ACCEPT
        return {
            **_ACCEPT,
            "Range": f"bytes={self.size_bytes}-",
            "If-Range": self._tag,
        }

    def begin(self, answer: httpx2.Response) -> None:
        """Look at an answer before any of its bytes are read."""
        tag = answer.headers.get("ETag", "")
        if self.size_bytes and answer.status_code == 200 and tag == self._tag:
            self._begin_anew()  # it gives no parts any more
        if self.size_bytes and answer.status_code in (200, 416):
            msg = f"{self._url} is not what it was when half of it had come (now {tag:.80})"
            raise KernelCorruptError(msg)
        _check_answer(answer, self._url, 206 if self.size_bytes else 200)
        if self.size_bytes and not answer.headers.get("Content-Range", "").startswith(
            f"bytes {self.size_bytes}-"
        ):
            msg = f"{self._url} answered with another part than the rest"
            raise KernelSourceRefused(msg)
        self._check_size(self.size_bytes + int(answer.headers.get("Content-Length", "0")))
        takes_ranges = answer.headers.get("Accept-Ranges", "") == "bytes"
        self.can_go_on = takes_ranges and tag == self._tag

    def take(self, data: bytes) -> None:
        """Take some bytes."""
        self._check_size(self.size_bytes + len(data))
        self._came_bytes += len(data)
        self._count(data)
        if self._shelf is not None:
            self._shelf.append(data)

    def finish(self) -> bytes:
        """Return all of it, compared with its digest."""
        found = self._sha256.hexdigest()
        if found != self._digest:
            msg = (
                f"{self._url} answered with {self.size_bytes} other bytes (sha256 {found}); do "
                "not trust the server until that is explained"
            )
            raise KernelCorruptError(msg)
        return b"".join(self._parts)

    def _end_s(self, until_s: float) -> float:
        return until_s + self._came_bytes / SLOWEST_BYTES_PER_S

    def _count(self, data: bytes) -> None:
        self.size_bytes += len(data)
        self._sha256.update(data)
        self._parts.append(data)

    def _begin_anew(self) -> None:
        self.size_bytes = 0
        self._parts, self._sha256 = [], hashlib.sha256()
        self._is_from_shelf = False
        if self._shelf is not None:
            self._shelf.clear()

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_size_bytes:
            msg = (
                f"{self._url} answers with {size_bytes} bytes or more, and at most "
                f"{self._max_size_bytes} are taken; raise max_size_bytes if that is right"
            )
            raise KernelSourceRefused(msg)


def _check_answer(answer: httpx2.Response, url: str, expected: int) -> None:
    """Refuse what is not an artifact's bytes as they are, before any of them are read.

    Raises:
        KernelNotFoundError: The server says that there is none.
        KernelSourceRefused: It is another answer that stays.
        KernelSourceUnavailable: It is one that may pass.
    """
    if answer.status_code in _NO_SUCH:
        msg = f"{url} has no such kernel ({answer.status_code})"
        raise KernelNotFoundError(msg)
    content_type = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    encoding = answer.headers.get("Content-Encoding", "identity")
    length = answer.headers.get("Content-Length", "0")
    for what, found, is_expected in (
        ("status", answer.status_code, answer.status_code == expected),
        ("content type", content_type, content_type in _BINARY_TYPES),
        ("content encoding", encoding, encoding.lower() == "identity"),
        ("content length", length, re.fullmatch("[0-9]{1,18}", length) is not None),
    ):
        if not is_expected:
            msg = (
                f"{url} answered with {what} {found!r:.80}; expected {expected} with an artifact's "
                "bytes as application/octet-stream, not encoded and not elsewhere"
            )
            is_another_form = what in ("content type", "content encoding")  # which it stays
            raise (KernelSourceRefused if is_another_form else error_of(answer.status_code))(msg)


def length_of(answer: httpx2.Response) -> int:
    """Return the length that an answer without a body says that an artifact has.

    Raises:
        KernelSourceRefused: It says none.
    """
    said = answer.headers.get("Content-Length", "")
    if re.fullmatch("[0-9]{1,18}", said) is None:
        msg = f"{answer.request.url} says no length of an artifact, but {said!r:.80}"
        raise KernelSourceRefused(msg)
    return int(said)


def check_part(answer: httpx2.Response, data: bytes, start: int, length: int) -> None:
    """Refuse another part of an artifact than the one that was asked for, up to its end.

    Raises:
        KernelSourceRefused: It is one.
    """
    said = answer.headers.get("Content-Range", "")
    found = re.fullmatch("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", said)
    if found is not None:
        first, last, size = map(int, found.groups())
        if (first, last + 1, len(data)) == (start, min(start + length, size), last + 1 - first):
            return
    msg = f"{answer.request.url} answered with {len(data)} bytes as {said!r:.80}, another part"
    raise KernelSourceRefused(msg)


def error_of(status: int) -> type[KernelSourceUnavailable]:
    """Return what an answer that is no artifact means, by its status."""
    stays = (300 <= status < 500 and status not in _PASSING_REFUSALS) or status in _NEVER_SERVED
    return KernelSourceRefused if stays else KernelSourceUnavailable
