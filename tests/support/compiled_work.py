"""What a worker does in its sandbox in tests: no torch, and every poison; the blueprint says which.

``init_seed`` of a blueprint goes into its artifact, so that each has one of its own.
"""

import json
import os
import signal
import time
from pathlib import Path

import poison
from kernel_artifacts import artifact

from esper.services.work_format import Finished, encode_finished


def work(payload):
    """Return an artifact of the blueprint's number, or do what its name says."""
    blueprint = json.loads(payload)["blueprint"]
    kind, number = blueprint["id"], blueprint["init_seed"]
    if kind in ("memory", "cpu", "sleep", "crash", "flood", "fail"):
        poison.work(kind.encode())
    if kind == "detach":
        poison.work(f"detach {os.environ['TMPDIR']}".encode())
    if kind == "garbled":
        return b"{}\nno answer"
    if kind == "refused":
        return answer(binary=b"", reason="it is not the identity")
    if kind == "no-artifact":
        return answer(binary=b"these bytes are no artifact")
    if kind == "kills-worker":  # not the sandbox's host alone, but who started that, too
        host = os.getppid()
        worker = Path(f"/proc/{host}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(worker), signal.SIGKILL)
        time.sleep(60)
    if kind == "waits":
        folder = Path(os.environ["TMPDIR"])
        (folder / f"begun-{os.getpid()}").write_text("")
        while not (folder / "go").exists():
            time.sleep(0.005)
    return answer(binary=artifact(number))


def answer(*, binary, reason=""):
    report = {"toolchain": "none", "passed": not reason, "reason": reason, "findings": {"n": 1}}
    return encode_finished(Finished(report=report, binary=binary))
