"""Processes that begin alike and at once: forked from one that has imported all that they need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager


class ForkServer:
    """A program that calls :func:`serve`, and forks a process for each request.

    Args:
        program: Path of the program.
    """

    def __init__(self, program):
        paths = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def run(self, *request, killed_after_s=None):
        """Let a process do what is asked for; return whether SIGKILL ended it, and its seconds."""
        self._process.stdin.write(json.dumps([killed_after_s, *request]) + "\n")
        self._process.stdin.flush()
        code, took_s = json.loads(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), f"the process ended with {code}"
        return code != 0, took_s

    def close(self):
        """Let the program end."""
        self._process.communicate(timeout=60)


def serve(do):
    """Fork a process for each request that is read, which does it and ends.

    Args:
        do: Called with what was asked for.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until it is waited for
    for line in sys.stdin:
        killed_after_s, *request = json.loads(line)
        begun_s = time.perf_counter()
        child = os.fork()
        if child == 0:
            with _ended():
                do(*request)
        if signal.sigtimedwait([signal.SIGCHLD], killed_after_s or 600) is None:
            os.kill(child, signal.SIGKILL)
            signal.sigwait([signal.SIGCHLD])
        _, status = os.waitpid(child, 0)
        answer = [os.waitstatus_to_exitcode(status), time.perf_counter() - begun_s]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@contextmanager
def _ended():
    """End the process behind a block, past what its parent would do at its own end."""
    code = 1
    try:
        yield
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)
