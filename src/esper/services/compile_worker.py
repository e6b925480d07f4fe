"""A worker: it claims blueprints at a registry's server, compiles them in a sandbox, and says so.

It publishes, then finishes: whoever dies in between leaves bytes that the next worker makes again
to the bit. While it works a thread renews its lease; where that is lost, so is the work. A server
that does not answer is asked again, however long that takes.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeVar, final

from esper.contracts.artifact_format import digest_of
from esper.contracts.compile_job import failure
from esper.contracts.errors import (
    CircuitOpenError,
    JobLostError,
    KernelCorruptError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.registry.http_registry import HttpRegistry
from esper.resilience.clock import MonotonicClock
from esper.resilience.retry import JITTER, RetryPolicy
from esper.services.job_lease import JobLease
from esper.services.sandbox import Answered, Broken, Confinement, Sandbox, SandboxLimits
from esper.services.work_format import Finished, decode_finished, encode_work

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.compile_job import CompileJob

T = TypeVar("T")

WORK: Final = "esper.services.compiling:work"
"""What a worker does in its sandbox."""

_WAIT_S: Final = 2.0
_ASKING_S: Final = 30.0
_PUBLISHING_S: Final = 300.0
_LONGEST_NAME: Final = 100
_TRANSIENT: Final = (KernelSourceUnavailable, CircuitOpenError)
_PATIENCE: Final = RetryPolicy(base_delay_s=0.5, max_delay_s=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker works.

    Attributes:
        name: Its name, which no other worker has; 1 to 100 characters.
        num_jobs: How many jobs it does at once, at least 1.
        lease_s: Seconds until others may have a job of a worker that says nothing any more; from
            0.1 to 3,600. It is renewed three times in that.
        limits: What one job may take.
        confinement: Whether jobs run inside of bubblewrap.
        work: What is done in the sandbox, as ``module:function``.

    Raises:
        ValueError: A value is out of its range.
    """

    name: str
    num_jobs: int = 1
    lease_s: float = 30.0
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    confinement: Confinement = "auto"
    work: str = WORK

    def __post_init__(self) -> None:
        for expected, is_so in (
            (f"a name of 1 to {_LONGEST_NAME} characters", 0 < len(self.name) <= _LONGEST_NAME),
            ("at least 1 job at once", self.num_jobs >= 1),
            ("a lease of 0.1 to 3,600 s", 0.1 <= self.lease_s <= 3_600),
        ):
            if not is_so:
                msg = f"a worker has {expected}, found {self}"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a worker says of itself; as text, a line for people.

    Attributes:
        worker: Its name, with the number of the slot.
        said: What it says.
        job_id: The job that it is about; None where it is about none.
        blueprint_id: The name of that job's blueprint.
    """

    worker: str
    said: str
    job_id: str | None = None
    blueprint_id: str | None = None

    def __str__(self) -> str:
        if self.job_id is None:
            return f"{self.worker} {self.said}"
        return f"{self.job_id} {self.blueprint_id}: {self.said}"


def name_of_this_process() -> str:
    """Return a name that no other worker has: the host's, and the process's number."""
    return f"{socket.gethostname()[:80]}-{os.getpid()}"


@final
class CompileWorker:
    """Does jobs until it is stopped, as many at once as its options say.

    Args:
        address: Where the registry is served.
        options: How it works.
        token: Its token, with the scopes work and publish.
        tell: Called whenever something was done, by any thread.

    Raises:
        ValueError: The address is none.
    """

    def __init__(
        self,
        address: str,
        options: WorkerOptions,
        *,
        token: str | None,
        tell: Callable[[Told], None],
    ) -> None:
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._slots = [
            Slot(address, options, number, token=token, stopping=self._stopping, tell=tell)
            for number in range(options.num_jobs)
        ]

    def run(self) -> None:
        """Do jobs until ``stop``.

        Raises:
            KernelSourceRefused: The server does not take the token, or is none of ours.
            OSError: The sandbox cannot be started.
        """
        threads = [threading.Thread(target=self._run, args=(slot,)) for slot in self._slots]
        for thread in threads:
            thread.start()
        self._stopping.wait()
        for slot in self._slots:
            slot.interrupt()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End as soon as what is in hand is given back; a signal's handler may call it."""
        self._stopping.set()

    def _run(self, slot: Slot) -> None:
        try:
            slot.run()
        except Exception as error:  # noqa: BLE001 - raised again by ``run``, when all have ended
            self._error = error
        finally:
            self.stop()


class Slot:
    """One job after the other, in a sandbox of its own.

    Args:
        address: Where the registry is served.
        options: How its worker works.
        number: Which of the worker's slots it is.
        token: The worker's token.
        stopping: Set when the worker is to end.
        tell: Called whenever something was done.
    """

    def __init__(
        self,
        address: str,
        options: WorkerOptions,
        number: int,
        *,
        token: str | None,
        stopping: threading.Event,
        tell: Callable[[Told], None],
    ) -> None:
        def client(timeout_s: float) -> HttpRegistry:
            return HttpRegistry(address, token=token, timeout_s=timeout_s)

        self._asking, self._publishing = client(_ASKING_S), client(_PUBLISHING_S)
        self._renewing = client(max(1.0, options.lease_s / 3))
        self._options, self._stopping, self._told = options, stopping, tell
        self._name = f"{options.name}/{number}"
        self._toolchain = f"torch {version('torch')}"
        self._clock = MonotonicClock()
        self._sandbox: Sandbox | None = None

    def interrupt(self) -> None:
        """End what is being done in the sandbox."""
        if self._sandbox is not None:
            self._sandbox.interrupt()

    def run(self) -> None:
        """Do jobs until the worker is to end.

        Raises:
            KernelSourceRefused: The server does not take the token, or is none of ours.
            OSError: The sandbox cannot be started.
        """
        options = self._options
        with closing(self._asking), closing(self._publishing), closing(self._renewing):
            self._sandbox = Sandbox(
                options.work, limits=options.limits, confinement=options.confinement
            )
            with self._sandbox as sandbox:
                where = "inside of bubblewrap" if sandbox.is_confined else "in a process"
                self._tell(f"works with {self._toolchain}, {where}")
                while (job := self._claimed()) is not None:
                    self._do_or_tell(job, sandbox)

    def _claimed(self) -> CompileJob | None:
        """Wait for a job; None where the worker is to end."""
        while not self._stopping.is_set():
            start_s = self._clock.now()
            try:
                job = self._persistently(self._claim)
            except KernelSourceRefused:
                raise
            except _TRANSIENT:
                return None
            if job is not None:
                return job
            if self._clock.now() - start_s < _WAIT_S / 2:  # there was no room to wait there
                self._stopping.wait(JITTER.uniform(0.0, _WAIT_S))  # not all at once
        return None

    def _claim(self) -> CompileJob | None:
        return self._asking.jobs.claim(
            self._name,
            toolchain=self._toolchain,
            lease_s=self._options.lease_s,
            wait_s=_WAIT_S,
        )

    def _do_or_tell(self, job: CompileJob, sandbox: Sandbox) -> None:
        try:
            came_of_it = self._do(job, sandbox)
        except JobLostError:
            came_of_it = "another worker has it by now"
        except KernelSourceRefused:
            raise
        except _TRANSIENT as error:
            came_of_it = f"left to others: {error}"
        self._tell(came_of_it, job)

    def _tell(self, said: str, job: CompileJob | None = None) -> None:
        about = {} if job is None else {"job_id": job.id, "blueprint_id": job.blueprint_id}
        self._told(Told(worker=self._name, said=said, **about))

    def _do(self, job: CompileJob, sandbox: Sandbox) -> str:
        """Do a job, and return in words what came of it.

        Raises:
            JobLostError: It is another's by now.
            KernelSourceUnavailable, CircuitOpenError: The server does not answer, and the worker
                is to end.
        """
        with JobLease(
            self._renewing.jobs,
            job,
            lease_s=self._options.lease_s,
            on_lost=sandbox.interrupt,
        ) as lease:
            answer = self._worked(job, sandbox)
            if lease.is_lost:
                msg = "the lease ran out while it was done"
                raise JobLostError(msg)
            if isinstance(answer, Broken) and answer.is_ours:
                if self._stopping.is_set():
                    self._asking.jobs.give_back(job)
                    return "given back"
                return f"left until its lease runs out: {answer.reason}"
            return self._reported(job, _finished(answer, self._toolchain))

    def _worked(self, job: CompileJob, sandbox: Sandbox) -> Answered | Broken:
        if self._stopping.is_set():
            return Broken(reason="the worker ends", is_ours=True)
        return sandbox.run(encode_work(job))

    def _reported(self, job: CompileJob, finished: Finished) -> str:
        """Publish what there is, then finish the job."""
        artifact_id = None
        if finished.binary:
            try:
                artifact_id = self._published(finished.binary)
            except (KernelCorruptError, ValueError) as refused:
                reason = f"the registry does not take the artifact: {refused}"
                finished = Finished(report=failure(reason, toolchain=self._toolchain), binary=b"")
        self._finish(job, artifact_id, finished)
        return (
            f"VALIDATED {artifact_id}" if artifact_id else f"INVALID: {finished.report['reason']}"
        )

    def _published(self, binary: bytes) -> str:
        digest = digest_of(binary)
        return self._persistently(lambda: self._publishing.put(binary, digest=digest))

    def _finish(self, job: CompileJob, artifact_id: str | None, finished: Finished) -> None:
        self._persistently(
            lambda: self._asking.jobs.finish(job, artifact_id=artifact_id, report=finished.report)
        )

    def _persistently(self, call: Callable[[], T]) -> T:
        """Ask until there is an answer, or the worker is to end.

        Raises:
            KernelSourceRefused: The answer will not change.
            KernelSourceUnavailable, CircuitOpenError: There is none, and the worker is to end.
        """
        num_failures = 0
        while True:
            try:
                return call()
            except KernelSourceRefused:
                raise
            except _TRANSIENT as error:
                if num_failures == 0:
                    self._tell(f"asks again: {error}")
                longest_s = _PATIENCE.longest_delay_s(num_failures)
                num_failures += 1
                if self._stopping.wait(JITTER.uniform(0.0, longest_s)):
                    raise


def _finished(answer: Answered | Broken, toolchain: str) -> Finished:
    """Return what came of a job, whatever its sandbox said."""
    reason = answer.reason if isinstance(answer, Broken) else ""
    if isinstance(answer, Answered):
        try:
            return decode_finished(answer.data)
        except ValueError as error:
            reason = str(error)
    return Finished(report=failure(reason, toolchain=toolchain), binary=b"")
