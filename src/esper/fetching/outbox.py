"""Publishing beside a run: what was compiled goes to a registry when the registry takes it."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from esper.contracts.errors import KernelSourceRefused, KernelSourceUnavailable
from esper.resilience.attempt import Done, attempt
from esper.resilience.clock import MonotonicClock
from esper.resilience.retry import RetryPolicy
from esper.resilience.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from esper.contracts.ports import Clock

_LOG = logging.getLogger(__name__)

PATIENT: Final = RetryPolicy(base_delay_s=1.0, max_delay_s=60.0)
"""How long is waited before a parcel is sent again; how often does not matter here."""


class TakesKernels(Protocol):
    """What of a registry an outbox needs."""

    def put(self, data: bytes, *, digest: str, record: Mapping[str, object] | None) -> str:
        """Publish an artifact; see :class:`~esper.contracts.ports.Registry`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """An artifact on its way.

    Attributes:
        digest: The sha256 of its bytes.
        data: Its bytes.
        record: What is kept beside it.
    """

    digest: str
    data: bytes
    record: Mapping[str, object] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hitch:
    """Why a parcel has not arrived.

    Attributes:
        digest: The artifact.
        error: What the registry answered, or that it did not.
        is_final: Whether it is not sent again.
    """

    digest: str
    error: Exception
    is_final: bool


class Outbox:
    """Sends artifacts to a registry in their order, on a thread that lives while there are any.

    A registry that does not answer is asked again, after a wait that doubles up to a minute; one
    that refuses an artifact is not asked for that one again. In a forked process the box is empty:
    what was in it is the parent's to send.

    Args:
        registry: Where to.
        folder: Keeps what has not arrived, each under its digest, for when the process dies; None
            keeps nothing.
        policy: How long is waited before a parcel is sent again.
        clock: Measures how long closing may take.
    """

    def __init__(
        self,
        registry: TakesKernels,
        *,
        folder: Path | None = None,
        policy: RetryPolicy = PATIENT,
        clock: Clock | None = None,
    ) -> None:
        self._registry = registry
        self._folder = folder
        self._policy = policy
        self._clock = clock or MonotonicClock()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._parcels: deque[Parcel] = deque()
        self._digests: set[str] = set()
        self._hitches: deque[Hitch] = deque()
        self._worker: threading.Thread | None = None
        self._is_closed = False

    def send(self, parcel: Parcel) -> None:
        """Take an artifact, unless it is on its way or there; never waits."""
        if self._pid != os.getpid():
            self._start()
        with self._changed:
            if parcel.digest in self._digests:
                return
            self._digests.add(parcel.digest)
            self._parcels.append(parcel)
            if self._worker is None and not self._is_closed:
                self._worker = threading.Thread(target=self._work, name="esper outbox", daemon=True)
                self._worker.start()

    def hitches(self) -> list[Hitch]:
        """Return what went wrong since the last call: of each parcel the first time and the end."""
        found = []
        while self._hitches:
            found.append(self._hitches.popleft())
        return found

    def close(self, timeout_s: float = 5.0) -> list[str]:
        """Try once more what is left, for so many seconds, and send nothing after that.

        Returns:
            The digests of what has not arrived; with a folder, it is there.
        """
        until_s = self._clock.now() + timeout_s
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._worker is None, max(0.0, until_s - self._clock.now())
            )
            left = list(self._parcels)
        for parcel in left:
            self._keep(parcel)
        return [parcel.digest for parcel in left]

    def _work(self) -> None:
        """Send until nothing is left; the next parcel starts another thread."""
        while True:
            with self._changed:
                if not self._parcels:
                    self._worker = None
                    self._changed.notify_all()
                    return
                parcel = self._parcels[0]
            self._keep(parcel)
            if self._deliver(parcel):
                self._discard(parcel)
                with self._changed:
                    self._parcels.popleft()
                continue
            with self._changed:  # it was closed, and did not arrive
                self._worker = None
                self._changed.notify_all()
                return

    def _deliver(self, parcel: Parcel) -> bool:
        """Send a parcel until it has arrived or is refused; give up once the box is closed."""
        tries = 0
        while True:
            was_closed = self._is_closed
            sent = attempt(
                functools.partial(
                    self._registry.put, parcel.data, digest=parcel.digest, record=parcel.record
                )
            )
            if isinstance(sent, Done):
                return True
            is_final = not isinstance(sent.error, KernelSourceUnavailable) or isinstance(
                sent.error, KernelSourceRefused
            )
            if tries == 0 or is_final:
                hitch = Hitch(digest=parcel.digest, error=sent.error, is_final=is_final)
                self._hitches.append(hitch)
            if is_final:
                return True
            if was_closed:
                return False
            with self._changed:
                wait_s = self._policy.longest_delay_s(tries)
                self._changed.wait_for(lambda: self._is_closed, wait_s)
            tries += 1

    def _keep(self, parcel: Parcel) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / parcel.digest, parcel.data)
        except OSError as error:
            _LOG.warning("a kernel on its way to the registry could not be kept: %s", error)

    def _discard(self, parcel: Parcel) -> None:
        if self._folder is None:
            return
        try:
            (self._folder / parcel.digest).unlink(missing_ok=True)
            self._folder.rmdir()
        except OSError:
            pass  # others are still on their way
