"""Workers of a registry that is served in this process, in threads or as processes of their own."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from registries import served, token_for

from esper.registry.memory import MemoryRegistry

PROGRAM = Path(__file__).parent / "worker_program.py"
LEASE_S = 0.5


class Service:
    """A registry, served, with what tests ask of it."""

    def __init__(self, registry, address):
        self.registry, self.address = registry, address
        self.token = token_for(registry, "work", "publish")

    @property
    def jobs(self):
        return self.registry.book.jobs

    def submit(self, kind="plain", number=0, **options):
        """Ask for what ``compiled_work`` does by that name; return the job's id."""
        from kernel_blueprints import mlp_blueprint

        from esper.contracts.compile_options import CompileOptions

        named = mlp_blueprint(init_seed=number)
        object.__setattr__(named, "id", kind)
        return self.jobs.submit(named, CompileOptions(**options), now_s=float(number)).id

    def until(self, status, *job_ids, within_s=30.0):
        """Wait until jobs stand so; return them."""
        return wait_for(
            lambda: [self.jobs.find(each) for each in job_ids],
            lambda found: all(job.status == status for job in found),
            within_s=within_s,
        )

    def num_reports(self, job):
        """Return how often a job's artifact was said to be finished."""
        return len(self.registry.validations(job.artifact_id))


@contextlib.contextmanager
def service():
    """Serve a registry of its own."""
    registry = MemoryRegistry()
    with served(registry) as address:
        yield Service(registry, address)


def wait_for(look, is_right=bool, *, within_s=30.0, every_s=0.01):
    """Return what a look finds as soon as it is right."""
    end_s = time.monotonic() + within_s
    while not is_right(found := look()):
        assert time.monotonic() < end_s, f"in vain: {found}"
        time.sleep(every_s)
    return found


class WorkerProcess:
    """A worker as a process of its own; ``lines`` is what it has said."""

    def __init__(self, made, name, *order, folder="."):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROGRAM.parent), *sys.path])),
            "URZA_API_TOKEN": made.token,
            "TMPDIR": str(folder),
        }
        command = [sys.executable, str(PROGRAM), made.address, name, str(LEASE_S), *order]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def said(self, word):
        """Wait until it has said something."""
        return wait_for(lambda: [line for line in self.lines if word in line])

    def end(self):
        """Kill it if it has not ended."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()


@contextlib.contextmanager
def workers(made, *names, order=(), folder="."):
    """Start workers, all of which are at work when this yields them."""
    started = [WorkerProcess(made, name, *order, folder=folder) for name in names]
    try:
        for each in started:
            each.said("works with")
        yield started
    finally:
        for each in started:
            each.end()


@contextlib.contextmanager
def worker_thread(address, token, **options):
    """Run a worker in a thread; yields the lines that it says."""
    from esper.services.compile_worker import CompileWorker, WorkerOptions

    lines = []
    made = {
        "name": "ben",
        "lease_s": 5.0,
        "confinement": "process",
        "work": "compiled_work:work",
        **options,
    }
    worker = CompileWorker(
        address, WorkerOptions(**made), token=token, tell=lambda told: lines.append(str(told))
    )
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(worker.run)
        try:
            yield lines
        finally:
            worker.stop()
        running.result()
