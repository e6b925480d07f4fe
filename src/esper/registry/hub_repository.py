"""Files in a model repository of the Hugging Face Hub, read and changed through its own client.

The client has its own settings, credentials, proxies and waits.
"""

from __future__ import annotations

import functools
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, final

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from esper.contracts.artifact_format import digest_of
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.registry.http import error_of
from esper.registry.hub_index import HubIndex
from esper.resilience.retry import JITTER, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from esper.registry.endpoint import Endpoint

R = TypeVar("R")

_ADDRESS: Final = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
_INDEX: Final = "index.json"
_MOST_INDEX_BYTES: Final = 1 << 26
_TRIES: Final = 20
_PATIENCE: Final = RetryPolicy(base_delay_s=0.05, max_delay_s=2.0)
_MOVED: Final = (409, 412)
"""Statuses by which the Hub says that a commit's parent is not the latest any more."""


class Hub(Protocol):
    """What of ``huggingface_hub.HfApi`` is used."""

    def repo_info(self, repo_id: str) -> Any:
        """Return the repository, whose ``sha`` is its latest commit."""
        ...

    def get_paths_info(self, repo_id: str, paths: list[str], *, revision: str) -> list[Any]:
        """Return those of the files that are there, each with its ``size``."""
        ...

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str, local_dir: str) -> Any:
        """Write a file below a folder, and return its path."""
        ...

    def create_commit(
        self, repo_id: str, operations: list[Any], *, commit_message: str, parent_commit: str
    ) -> Any:
        """Change files in one commit."""
        ...


@final
class HubRepository:
    """The kernels in a repository, and the index beside them.

    Args:
        address: ``hf://owner/name``.
        hub: Who asks.
        endpoint: What guards it.
        max_bytes: Longest artifact that is taken.
        sleep: Waits before a change is tried again, seconds.

    Raises:
        ValueError: The address is not as above.
    """

    def __init__(
        self,
        address: str,
        hub: Hub,
        endpoint: Endpoint,
        *,
        max_bytes: int,
        sleep: Callable[[float], None],
    ) -> None:
        found = _ADDRESS.fullmatch(address)
        if found is None:
            msg = f"{address!r:.200} is no repository of the Hub: expected hf://owner/name"
            raise ValueError(msg)
        self.address = address
        self._repo = found[1]
        self._hub = hub
        self._endpoint = endpoint
        self._max_bytes = max_bytes
        self._sleep = sleep

    def index(self) -> HubIndex:
        """Return what the repository knows of its kernels now."""
        return self._call(self._read)[1]

    def change(self, what: str, change: Callable[[HubIndex], list[Any] | None]) -> None:
        """Change the index and files beside it in one commit, anew where somebody was faster.

        Args:
            what: The commit's message.
            change: Changes the index, and returns what is to be done to files; None where all is
                as it should be.
        """
        for number in range(_TRIES):
            head, index = self._call(self._read)
            files = change(index)
            if files is None:
                return
            operations = [*files, CommitOperationAdd(_INDEX, index.text())]
            commit = functools.partial(
                self._hub.create_commit,
                self._repo,
                operations,
                commit_message=what,
                parent_commit=head,
            )
            if self._call(functools.partial(self._has_committed, commit), may_repeat=False):
                return
            self._sleep(JITTER.uniform(0.0, _PATIENCE.longest_delay_s(number)))
        msg = f"{self.address} is changed by others all the time; come again"
        raise KernelSourceUnavailable(msg)

    def fetch(self, digest: str) -> bytes:
        """Return an artifact's bytes, compared with its digest."""
        return self._call(lambda: self._fetch(digest))

    def _has_committed(self, commit: Callable[[], Any]) -> bool:
        try:
            commit()
        except HfHubHTTPError as error:
            if error.response.status_code in _MOVED:
                return False
            raise
        return True

    def _read(self) -> tuple[str, HubIndex]:
        """Return the latest commit, and the index in it."""
        head = str(self._hub.repo_info(self._repo).sha)
        try:
            data = self._download(_INDEX, head, _MOST_INDEX_BYTES)
        except KernelNotFoundError:
            return head, HubIndex()
        return head, HubIndex.read(data, self.address)

    def _fetch(self, digest: str) -> bytes:
        data = self._download(path_of(digest), "main", self._max_bytes)
        if digest_of(data) != digest:
            msg = f"{self.address} has other bytes as {digest}; do not trust it until that is known"
            raise KernelCorruptError(msg)
        return data

    def _download(self, path: str, revision: str, most: int) -> bytes:
        """Return a file, which is not fetched where it is too long."""
        found = self._hub.get_paths_info(self._repo, [path], revision=revision)
        if not found:
            msg = f"there is no {path} in {self.address}"
            raise KernelNotFoundError(msg)
        if found[0].size > most:
            msg = f"{path} in {self.address} has {found[0].size} bytes, and {most} are taken"
            raise KernelSourceRefused(msg)
        with tempfile.TemporaryDirectory(prefix="esper-hub-") as folder:
            file = self._hub.hf_hub_download(self._repo, path, revision=revision, local_dir=folder)
            return Path(file).read_bytes()

    def _call(self, fn: Callable[[], R], *, may_repeat: bool = True) -> R:
        def once(_: float) -> R:
            with self._translated():
                return fn()

        return self._endpoint.call(once, may_repeat=may_repeat)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise the errors of the Hub's client as those of a registry."""
        try:
            yield
        except RepositoryNotFoundError as error:
            msg = (
                f"{self.address} is not there, or not for who asks: make the repository first, "
                "and log in to the Hub or give a token"
            )
            raise KernelSourceRefused(msg) from error
        except LocalEntryNotFoundError as error:
            msg = f"{self.address} was not reached: {error!s:.300}"
            raise KernelSourceUnavailable(msg) from error
        except EntryNotFoundError as error:
            msg = f"{self.address} has no such file: {error!s:.300}"
            raise KernelNotFoundError(msg) from error
        except HfHubHTTPError as error:
            msg = f"{self.address} answered {error.response.status_code}: {error!s:.300}"
            raise error_of(error.response.status_code)(msg) from error
        except (OSError, httpx2.HTTPError) as error:
            msg = f"{self.address} was not reached: {error!r:.300}"
            raise KernelSourceUnavailable(msg) from error


def path_of(digest: str) -> str:
    """Return the name of an artifact's file."""
    return f"kernels/{digest}"
