"""Requests to a registry of container images: whoever asks is told, once, where to log in.

The protocol is the OCI distribution specification 1.1, below ``/v2/REPOSITORY``. Credentials are
sent to the registry itself, or to the token server that it names: over https, or on its own host.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from typing import TYPE_CHECKING, Final, final
from urllib.parse import urljoin, urlsplit

from esper.contracts.errors import KernelSourceRefused, KernelSourceUnavailable
from esper.registry.exchange import Exchange
from esper.registry.http import error_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx2

    from esper.contracts.ports import Clock

_ADDRESS: Final = re.compile(r"oci://([^/@\s]+)/([a-z0-9]+(?:[._/-]+[a-z0-9]+)*)", re.ASCII)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_FIELD: Final = re.compile(r'([a-z]+)="([^"]*)"', re.IGNORECASE)
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,32768}")
_MAX_TOKEN_BYTES: Final = 1 << 20
_HOPS: Final = (302, 307)
"""Statuses by which a registry says that a blob is at a store next door."""


@final
class OciSession:
    """A repository of one OCI registry; threads may share it.

    Args:
        address: ``oci://host/repository``; a loopback host is spoken to over http, any other over
            https.
        credentials: ``user:password``, or a token that stands for a password; None asks as nobody.
        timeout_s: Seconds for a whole request, above 0.
        clock: Measures what is left.

    Attributes:
        address: As given.
        exchange: What sends the requests.
        url: Where the repository is, for messages.

    Raises:
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: str | None = None,
        timeout_s: float,
        clock: Clock | None = None,
    ) -> None:
        found = _ADDRESS.fullmatch(address.rstrip("/"))
        if found is None:
            msg = f"{address!r:.200} is no repository of images: expected oci://host/repository"
            raise ValueError(msg)
        host, repository = found.groups()
        scheme = "http" if urlsplit(f"//{host}").hostname in _LOOPBACK else "https"
        self.address = address.rstrip("/")
        prefix = f"/v2/{repository}"
        self.exchange = Exchange(
            f"{scheme}://{host}", timeout_s=timeout_s, clock=clock, prefix=prefix
        )
        self.url = f"{self.exchange.base_url}{prefix}"
        self._credentials = credentials
        self._authorization: dict[str, str] = {}

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
        is_artifact: bool = False,
    ) -> Iterator[httpx2.Response]:
        """Ask for a path of the repository, after logging in where that is asked for.

        Args:
            method: The request's.
            path: Below the repository; or where the registry said that an upload goes on, which is
                on its own host.
            until_s: The clock's reading at which it has to be over.
            headers: Sent beside those of every request.
            content: The request's body.
            params: The request's query.
            is_artifact: As there.

        Raises:
            KernelSourceUnavailable: As :meth:`Exchange.answer`.
            KernelSourceRefused: It says to log in where no credentials are sent.
        """
        elsewhere = path if "://" in path else None

        def ask() -> contextlib.AbstractContextManager[httpx2.Response]:
            return self.exchange.answer(
                method,
                path,
                until_s=until_s,
                headers={**(headers or {}), **self._authorization},
                content=content,
                params=params,
                elsewhere=elsewhere,
                is_artifact=is_artifact,
            )

        with ask() as first:
            challenge = first.headers.get("WWW-Authenticate", "")
            if first.status_code != 401 or not self._can_meet(challenge):
                yield first
                return
        self._authorization = self._log_in(challenge, until_s)
        with ask() as second:
            yield second

    @contextlib.contextmanager
    def blob(
        self, method: str, digest: str, *, until_s: float, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Ask for a blob, following one hop to the store that it is in, without credentials.

        Raises:
            KernelSourceUnavailable: As :meth:`Exchange.answer`.
            KernelSourceRefused: The hop leads to where nothing is asked.
        """
        path = f"/blobs/sha256:{digest}"
        with self.answer(
            method, path, until_s=until_s, headers=headers, is_artifact=True
        ) as answer:
            if answer.status_code not in _HOPS:
                yield answer
                return
            store = self.followed(answer.headers.get("Location", ""), f"{self.url}{path}")
        with self.exchange.answer(
            method, path, until_s=until_s, headers=headers, elsewhere=store, is_artifact=True
        ) as answer:
            yield answer

    def followed(self, location: str, url: str, *, only_here: bool = False) -> str:
        """Return where an answer leads to.

        Args:
            location: What it says.
            url: What was asked.
            only_here: Whether it has to stay on the registry's own host.

        Raises:
            KernelSourceRefused: That is neither https nor the registry's own host.
        """
        target = urljoin(url, location)
        there, here = urlsplit(target), urlsplit(self.url)
        is_here = (there.scheme, there.netloc) == (here.scheme, here.netloc)
        is_secure = there.scheme == "https" and bool(there.hostname) and "@" not in there.netloc
        if not location or not (is_here or (is_secure and not only_here)):
            where = "stay on its host" if only_here else "be https, or on its own host"
            msg = f"{url} leads to {target!r:.200}, which is not followed: it has to {where}"
            raise KernelSourceRefused(msg)
        return target

    def _can_meet(self, challenge: str) -> bool:
        scheme = challenge.partition(" ")[0].lower()
        return scheme == "bearer" or (scheme == "basic" and self._credentials is not None)

    def _log_in(self, challenge: str, until_s: float) -> dict[str, str]:
        """Return the header that meets a challenge."""
        scheme, _, rest = challenge.partition(" ")
        basic = self._basic()
        if scheme.lower() == "basic":
            return basic
        fields = {name.lower(): value for name, value in _FIELD.findall(rest)}
        realm = self.followed(fields.get("realm", ""), self.url)
        params = {name: fields[name] for name in ("service", "scope") if name in fields}
        with self.exchange.answer(
            "GET", "", until_s=until_s, headers=basic, params=params, elsewhere=realm
        ) as answer:
            data = self.exchange.body(answer, until_s, most=_MAX_TOKEN_BYTES)
        if answer.status_code != 200:
            msg = f"{realm:.200} gives no token for {self.url} ({answer.status_code})"
            raise error_of(answer.status_code)(msg)
        return {"Authorization": f"Bearer {_token_in(data, realm)}"}

    def _basic(self) -> dict[str, str]:
        if self._credentials is None:
            return {}
        pair = self._credentials if ":" in self._credentials else f"token:{self._credentials}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _token_in(data: bytes, realm: str) -> str:
    try:
        said = json.loads(data)
        token = said.get("token") or said.get("access_token")
    except (AttributeError, ValueError, RecursionError):
        token = None
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        msg = f"{realm:.200} answered with no token"
        raise KernelSourceUnavailable(msg)
    return token
