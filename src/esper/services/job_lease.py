"""The lease of a job: kept by a thread for as long as the job takes, unless another has it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self, final

from esper.contracts.errors import EsperError, JobLostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from esper.contracts.compile_job import CompileJob
    from esper.registry.http_jobs import HttpJobs


@final
class JobLease:
    """Renews a job's lease while it is entered, three times in each.

    A renewal that does not arrive is tried again a third later; the job may be another's then.

    Args:
        jobs: Where it is renewed.
        job: As it was claimed.
        lease_s: How long it is leased each time, in seconds.
        on_lost: Called once, in a thread, when it is another's.
    """

    def __init__(
        self, jobs: HttpJobs, job: CompileJob, *, lease_s: float, on_lost: Callable[[], None]
    ) -> None:
        self._jobs, self._job, self._lease_s = jobs, job, lease_s
        self._on_lost = on_lost
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self.is_lost = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ending.wait(self._lease_s / 3):
            try:
                self._jobs.renew(self._job, lease_s=self._lease_s)
            except JobLostError:
                if not self._ending.is_set():  # else it was finished meanwhile
                    self.is_lost = True
                    self._on_lost()
                return
            except EsperError:
                continue  # the next one may arrive in time
