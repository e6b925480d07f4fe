"""Sending beside a run: kernels and field reports go to a registry when the registry takes them."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from esper.contracts.errors import KernelSourceSuspended
from esper.contracts.kernel_reports import FieldReport
from esper.contracts.reference import is_digest
from esper.fetching.hitch import Hitch, is_answer
from esper.resilience.attempt import Done, attempt
from esper.resilience.clock import MonotonicClock
from esper.resilience.forked import Forked
from esper.resilience.retry import RetryPolicy
from esper.resilience.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from esper.contracts.choices import RegistryOperation
    from esper.contracts.ports import Clock

_LOG = logging.getLogger(__name__)

_REPORT: Final = ".report.json"
_ADDRESS: Final = "address"
"""A file that says which registry the others are for."""

LINGER_S: Final = 60.0
"""Seconds that a thread with nothing to send stays: who starts one waits until it runs."""
PATIENT: Final = RetryPolicy(base_delay_s=1.0, max_delay_s=60.0)
"""How long is waited before a parcel is sent again; how often does not matter here."""


class TakesKernels(Protocol):
    """What of a registry an outbox needs; see :class:`~esper.contracts.ports.Registry`."""

    def put(self, data: bytes, *, digest: str, record: Mapping[str, object] | None) -> str:
        """Publish an artifact."""
        ...

    def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft brought."""
        ...


class Parcel(Protocol):
    """Something on its way to a registry, which may be sent any number of times.

    Attributes:
        operation: What the registry is asked with it.
    """

    operation: ClassVar[RegistryOperation]

    @property
    def digest(self) -> str:
        """The artifact that it is, or is about."""
        ...

    @property
    def name(self) -> str:
        """What it is called among all parcels, and the name of its file."""
        ...

    @property
    def data(self) -> bytes:
        """What is kept of it in a file."""
        ...

    def deliver(self, registry: TakesKernels) -> None:
        """Hand it over; raises what the registry raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelParcel:
    """An artifact on its way.

    Attributes:
        digest: The sha256 of its bytes.
        data: Its bytes.
        record: What is kept beside it.
    """

    operation: ClassVar[RegistryOperation] = "put"
    digest: str
    data: bytes
    record: Mapping[str, object] | None

    @property
    def name(self) -> str:
        """Its digest."""
        return self.digest

    def deliver(self, registry: TakesKernels) -> None:
        """Publish it."""
        registry.put(self.data, digest=self.digest, record=self.record)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportParcel:
    """A field report on its way.

    Attributes:
        report: The report.
    """

    operation: ClassVar[RegistryOperation] = "report"
    report: FieldReport

    @property
    def digest(self) -> str:
        """The artifact that it is about."""
        return self.report.artifact_id

    @property
    def name(self) -> str:
        """Of run and graft, which say which report it is."""
        both = f"{self.report.run_id}\n{self.report.graft_id}".encode()
        return f"{hashlib.sha256(both).hexdigest()}{_REPORT}"

    @property
    def data(self) -> bytes:
        """Its JSON."""
        return json.dumps(self.report.to_document(), sort_keys=True).encode()

    def deliver(self, registry: TakesKernels) -> None:
        """Report it."""
        registry.report_outcome(self.report)


class Outbox(Forked):
    """Sends parcels to a registry in their order, on a thread that lives while there are any.

    A registry that does not answer is asked again, after a wait that doubles up to a minute; one
    that refuses a parcel is not asked for that one again. In a forked process the box is empty:
    what was in it is the parent's to send. A registry takes a parcel twice as it takes it once.

    Args:
        registry: Where to.
        address: Says which registry it is, for :meth:`adopt`; None where none does.
        folder: Keeps what has not arrived, each under its name, for when the process dies; None
            keeps nothing.
        policy: How long is waited before a parcel is sent again.
        clock: Measures how long closing may take.
    """

    def __init__(
        self,
        registry: TakesKernels,
        *,
        folder: Path | None = None,
        address: str | None = None,
        policy: RetryPolicy = PATIENT,
        clock: Clock | None = None,
    ) -> None:
        self._registry = registry
        self._folder = folder
        self._address = address
        self._policy = policy
        self._clock = clock or MonotonicClock()
        super().__init__()

    def _begin(self) -> None:
        """Begin empty."""
        self._changed = threading.Condition()
        self._parcels: deque[Parcel] = deque()
        self._names: set[str] = set()
        self._hitches: deque[Hitch] = deque()
        self._left_by_others: dict[str, Path] = {}
        self._worker: threading.Thread | None = None
        self._is_closed = False

    @property
    def takes_reports(self) -> bool:
        """Whether its registry keeps reports, as any does that does not say otherwise."""
        return bool(getattr(self._registry, "keeps_reports", True))

    def send(self, parcel: Parcel) -> None:
        """Take a parcel, unless it is on its way or there; never waits."""
        with self._changed:
            if parcel.name in self._names:
                return
            self._names.add(parcel.name)
            self._parcels.append(parcel)
            self._see_to_a_worker()

    def _see_to_a_worker(self) -> None:
        """Wake the worker, or start one; where no thread starts, the next parcel tries."""
        if self._worker is None and not self._is_closed:
            worker = threading.Thread(target=self._work, name="esper outbox", daemon=True)
            with suppress(RuntimeError):  # too many threads, or a process that is at its end
                worker.start()
                self._worker = worker
        self._changed.notify_all()

    def adopt(self, folder: Path) -> int:
        """Send what another box has left in its folder, where it was for the same registry.

        Kernels go first, since a report is of one that is published. What arrives is taken from
        there. Nothing is sent of a folder, or of a file in it, that cannot be read. The other
        box may be in use: then some parcels are sent twice.

        Returns:
            How many parcels were found.
        """
        if self._address is None or _address_in(folder) != self._address:
            return 0
        found = [(path, parcel) for path in _files_of(folder) if (parcel := _parcel_in(path))]
        found.sort(key=lambda each: isinstance(each[1], ReportParcel))
        for path, parcel in found:
            self._left_by_others[parcel.name] = path
            self.send(parcel)
        return len(found)

    def hitches(self) -> list[Hitch]:
        """Return what went wrong since the last call: of each parcel the first time and the end."""
        found = []
        while self._hitches:
            found.append(self._hitches.popleft())
        return found

    def close(self, timeout_s: float = 5.0) -> list[Parcel]:
        """Try once more what is left, for so many seconds, and send nothing after that.

        Returns:
            What has not arrived; with a folder, it is there.
        """
        until_s = self._clock.now() + timeout_s
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            worker = self._worker
            self._changed.wait_for(
                lambda: self._worker is None, max(0.0, until_s - self._clock.now())
            )
            left = list(self._parcels)
        if worker is not None:
            worker.join(max(0.0, until_s - self._clock.now()))
        for parcel in left:
            self._keep(parcel)
        return left

    def _work(self) -> None:
        """Send until nothing is left; the next parcel starts another thread."""
        while True:
            with self._changed:
                if not self._parcels:
                    self._changed.wait_for(lambda: self._is_closed or self._parcels, LINGER_S)
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
        """Send a parcel until it has arrived or is refused; give up once the box is closed.

        What was not asked, by a registry's breaker, is no try: the breaker waits already.
        """
        tries, is_told = 0, False
        while True:
            was_closed = self._is_closed
            sent = attempt(lambda: parcel.deliver(self._registry))
            if isinstance(sent, Done):
                return True
            is_final = is_answer(sent.error)
            if is_final or not is_told:
                is_told = True
                hitch = Hitch(
                    operation=parcel.operation,
                    digest=parcel.digest,
                    error=sent.error,
                    is_final=is_final,
                )
                self._hitches.append(hitch)
            if is_final:
                return True
            if was_closed:
                return False
            with self._changed:
                wait_s = self._policy.longest_delay_s(tries)
                self._changed.wait_for(lambda: self._is_closed, wait_s)
            tries += not isinstance(sent.error, KernelSourceSuspended)

    def _keep(self, parcel: Parcel) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._address is not None:
                write_whole(self._folder / _ADDRESS, self._address.encode())
            write_whole(self._folder / parcel.name, parcel.data)
        except OSError as error:
            _LOG.warning("what is on its way to the registry could not be kept: %s", error)

    def _discard(self, parcel: Parcel) -> None:
        left = self._left_by_others.pop(parcel.name, None)
        own = None if self._folder is None else self._folder / parcel.name
        for path in filter(None, (own, left)):
            try:
                path.unlink(missing_ok=True)
                if [each.name for each in path.parent.iterdir()] == [_ADDRESS]:
                    (path.parent / _ADDRESS).unlink()
                path.parent.rmdir()
            except OSError:
                pass  # others are still on their way


def _files_of(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _address_in(folder: Path) -> str | None:
    try:
        return (folder / _ADDRESS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _parcel_in(path: Path) -> Parcel | None:
    """Return the parcel that a file keeps; None where it keeps none."""
    try:
        if is_digest(path.name):
            return KernelParcel(digest=path.name, data=path.read_bytes(), record=None)
        if path.name.endswith(_REPORT):
            report = FieldReport.from_document(json.loads(path.read_bytes()))
            return ReportParcel(report=report)
    except (OSError, ValueError, RecursionError) as error:
        _LOG.warning("%s is on its way to a registry, and cannot be read: %s", path, error)
    return None
