"""A worker as a process of its own: ``worker_program.py ADDRESS NAME LEASE_S [ORDER]``.

The token comes from the environment. With the order ``finish-first`` it publishes last; with
``die-between`` it is killed between the two.
"""

import os
import signal
import sys

from esper.services import compile_worker
from esper.services.compile_worker import CompileWorker, WorkerOptions
from esper.services.sandbox import SandboxLimits


def die_between(slot, *args):
    os.kill(os.getpid(), signal.SIGKILL)


def finish_first(slot, job, finished):
    from esper.contracts.artifact_format import digest_of

    slot._finish(job, digest_of(finished.binary), finished)
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    address, name, lease_s, *order = sys.argv[1:]
    if order == ["die-between"]:
        compile_worker.Slot._finish = die_between
    elif order == ["finish-first"]:
        compile_worker.Slot._reported = finish_first
    compile_worker._WAIT_S = 0.2
    options = WorkerOptions(
        name=name,
        lease_s=float(lease_s),
        limits=SandboxLimits(memory_bytes=2**28, seconds=30.0, answer_bytes=2**20),
        confinement="process",
        work="compiled_work:work",
    )
    worker = CompileWorker(
        address,
        options,
        token=os.environ["URZA_API_TOKEN"],
        tell=lambda told: print(told, flush=True),  # noqa: T201 - a test reads it
    )
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.run()


if __name__ == "__main__":
    main()
