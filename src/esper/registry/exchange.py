"""Requests to one server that is not trusted to behave, each under one deadline.

An exchange follows no redirect, accepts no content encoding, sends no cookies, and reads neither
proxies nor passwords from the environment. It does not retry, which is decided around it, and
leaves a server alone for as long as that says in ``Retry-After``.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import weakref
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Final, final
from urllib.parse import urlsplit

import httpx2

from esper.contracts.errors import (
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.registry import refusals
from esper.registry.timed_transport import SLOWEST, TimedTransport
from esper.registry.upload import SLOWEST_BYTES_PER_S
from esper.resilience.clock import MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from esper.contracts.ports import Clock

_LONGEST_REST_S: Final = 60.0
_ROOM_FOR_WORDS: Final = 1 << 16


@final
class Exchange:
    """A client of one server; threads may share it.

    One that is pickled, or that is used in a forked process, opens connections of its own.

    Args:
        base_url: ``http://`` or ``https://``, a host, and what comes before ``prefix``.
        timeout_s: Seconds for a whole request with its answer, above 0.
        client: What sends the requests; it stays the caller's. None makes one.
        token: Sent as a bearer token, where there is one.
        clock: Measures what is left.
        prefix: What every path comes behind.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        client: httpx2.Client | None = None,
        token: str | None = None,
        clock: Clock | None = None,
        prefix: str = "/api/v1",
    ) -> None:
        if not 0 < timeout_s < float("inf"):
            msg = f"a request needs time: timeout_s above 0, found {timeout_s}"
            raise ValueError(msg)
        self.base_url = _checked_base(base_url)
        if token is not None:
            refusals.check_token(token)
        self._prefix = prefix
        self.timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._rests_until_s = float("-inf")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._given_client = client
        self._own_client: tuple[int, httpx2.Client] | None = None

    def until_s(self) -> float:
        """Return the clock's reading at which a request that begins now has to be over."""
        return self._clock.now() + self.timeout_s

    def left_s(self, until_s: float) -> float:
        """Return the seconds until a reading of the clock."""
        return until_s - self._clock.now()

    @contextlib.contextmanager
    def answer(
        self,
        method: str,
        path: str,
        *,
        until_s: float,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        elsewhere: str | None = None,
        is_artifact: bool = False,
    ) -> Iterator[httpx2.Response]:
        """Ask for a path behind the prefix; yields the answer, whose body is yet to be read.

        Args:
            method: The request's.
            path: Behind the prefix.
            until_s: The clock's reading at which it has to be over.
            headers: Sent beside those of every request.
            content: The request's body.
            params: The request's query.
            elsewhere: A whole address that is asked in place of the path, without the token;
                whoever gives one has looked at it.
            is_artifact: Whether it is answered with an artifact, whose bytes give it time as they
                come, as ``SLOWEST_BYTES_PER_S`` says.

        Raises:
            KernelSourceSuspended: The server has said when to come again, and it is not then yet.
            KernelSourceUnavailable: There was no answer, or not in time, or it was cut off; in the
                block that reads it, too.
        """
        url = elsewhere or f"{self.base_url}{self._prefix}{path}"
        own = self._headers if elsewhere is None else {}
        rest_s = self.left_s(self._rests_until_s)
        if rest_s > 0:
            msg = f"{url} was not asked: the server wants to be left alone for {rest_s:.3g} s more"
            suspended = KernelSourceSuspended(msg)
            suspended.retry_after_s = rest_s
            raise suspended
        left_s = self.left_s(until_s)
        try:
            if left_s <= 0:
                raise httpx2.ReadTimeout("the time for this request is over")
            client = self._client()
            request = client.build_request(
                method,
                url,
                headers={"Accept-Encoding": "identity", **own, **(headers or {})},
                content=content,
                params=params,
                timeout=left_s,
                extensions={SLOWEST: SLOWEST_BYTES_PER_S} if is_artifact else None,
            )
            answer = client.send(request, stream=True, follow_redirects=False)
            self._note_rest(answer)
            try:
                yield answer
            finally:
                answer.close()
        except httpx2.HTTPError as error:
            msg = f"{url} did not answer: {error!r:.300} (it had {max(0.0, left_s):.3g} s)"
            raise KernelSourceUnavailable(msg) from error

    def read(self, answer: httpx2.Response, until_s: float) -> Iterator[bytes]:
        """Yield an answer's bytes as they come.

        Raises:
            httpx2.ReadTimeout: They are still coming when the clock reads ``until_s``, and what an
                artifact's bytes have given it beside is over.
        """
        size_bytes = 0
        slowest_bytes_per_s = answer.request.extensions.get(SLOWEST, math.inf)
        for part in answer.iter_raw():
            size_bytes += len(part)
            yield part
            if self._clock.now() >= until_s + size_bytes / slowest_bytes_per_s:
                msg = f"{size_bytes} bytes came in time"
                raise httpx2.ReadTimeout(msg)

    def body(self, answer: httpx2.Response, until_s: float, *, most: int) -> bytes:
        """Return an answer's bytes, of which a refusal has room for its words.

        Raises:
            KernelSourceRefused: They are more than ``most``, and than a refusal takes.
            httpx2.ReadTimeout: As :meth:`read`.
        """
        most = max(most, _ROOM_FOR_WORDS)
        data = bytearray()
        for part in self.read(answer, until_s):
            data += part
            if len(data) > most:
                msg = f"{answer.request.url} answers with more than {most} bytes"
                raise KernelSourceRefused(msg)
        return bytes(data)

    def _note_rest(self, answer: httpx2.Response) -> None:
        """Keep to what an overloaded server says of when to come again, within reason."""
        after = answer.headers.get("Retry-After", "")
        if answer.status_code in (429, 503) and re.fullmatch("[0-9]{1,9}", after):
            self._rests_until_s = self._clock.now() + min(float(after), _LONGEST_REST_S)

    def close(self) -> None:
        """Close the connections that this process opened here; a later request opens others."""
        if self._own_client is not None and self._own_client[0] == os.getpid():
            self._own_client[1].close()
        self._own_client = None

    def __getstate__(self) -> dict[str, object]:
        if self._given_client is not None:
            msg = f"the source of {self.base_url} has a client that cannot be pickled with it"
            raise TypeError(msg)
        return {**self.__dict__, "_own_client": None}

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
