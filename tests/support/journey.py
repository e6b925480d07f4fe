"""Real processes of one registry: its server, workers, runs and whatever else is typed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

from workers import wait_for

from esper.registry.http_registry import HttpRegistry

SUPPORT = Path(__file__).parent
WITHIN_S = 90.0
"""How long anything is waited for; on a machine of one's own it takes a few seconds."""


class Journey:
    """A folder in which commands are typed; each process is known by it, its children too.

    Args:
        folder: Everything is below it; the server's data in ``kernels``.
    """

    def __init__(self, folder):
        self.folder, self.data = folder, folder / "kernels"
        self.address = self.client = None
        self._started = []
        self.token = secrets.token_hex(32)
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), *sys.path])),
            "OMP_NUM_THREADS": "1",
            "ESPER_JOURNEY": str(folder),
            "URZA_API_TOKEN": self.token,
        }

    def typed(self, *words, status=0, **environment):
        """Run a command to its end; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "esper", *words],
            env=self._surroundings(environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def json(self, *words, status=0, **environment):
        """Run a command that prints JSON; return what it says."""
        return json.loads(self.typed(*words, "--json", status=status, **environment))

    def start(self, name, *words, **environment):
        """Start a command; what it says is in ``said(name)``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "esper", *words],
                env=self._surroundings(environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def said(self, name):
        """Return what a process has said so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / f"{name}.log").read_text()
        return ""

    def serve(self, name):
        """Start the server, again at the port that it had; return its process when it answers."""
        port = "0" if self.address is None else self.address.rpartition(":")[2]
        process = self.start(
            name, "registry", "serve", "--data", str(self.data), "--port", port, URZA_API_URL=""
        )
        self.until(lambda: "serving on" in self.said(name), process, name)
        self.address = self.said(name).partition("serving on ")[2].split()[0]
        self.client = self.client or HttpRegistry(self.address, token=self.token, timeout_s=5.0)
        return process

    def grow(self, name, function, address):
        """Start a run with a cache of its own, whose registry is at an address."""
        words = ("grow", f"journey_job:{function}", "--registry", address, "--run-dir", name)
        return self.start(
            name,
            *words,
            URZA_API_URL=address,
            ESPER_JOURNEY_RUN=name,
            ESPER_CACHE_DIR=str(self.folder / f"{name}-cache"),
        )

    def open_gate(self, gate):
        """Let runs take a batch before which they are held."""
        (self.folder / f"go-{gate}").touch()

    def is_at(self, gate, name):
        """Say whether a run has come to a gate."""
        return (self.folder / f"{name}-at-{gate}").exists()

    def until(self, is_so, process=None, name=""):
        """Wait until something is so; a process that ends instead says why."""

        def look():
            assert process is None or process.poll() is None, self.said(name)
            return is_so()

        return wait_for(look, within_s=WITHIN_S, every_s=0.05)

    def left(self):
        """Return the processes of this journey that there are, children of killed ones too."""
        mark = f"ESPER_JOURNEY={self.folder}".encode()
        return [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and mark in _environment_of(process).split(b"\0")
        ]

    def end(self):
        """Kill what has not ended."""
        for process in self._started:
            process.kill()
            process.wait()
        if self.client is not None:
            self.client.close()

    def _surroundings(self, more):
        return {**self._environment, "URZA_API_URL": self.address or "", **more}


def _environment_of(process):
    with contextlib.suppress(OSError):
        return (process / "environ").read_bytes()
    return b""


@contextlib.contextmanager
def journey(folder):
    """Yield a journey of which no process is left behind."""
    made = Journey(folder)
    try:
        yield made
    finally:
        made.end()
