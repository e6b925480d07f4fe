"""Real servers on loopback, started for the tests that talk to them; each ends with its block."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import pytest

PATIENCE_S = 60.0


def find(program, *places):
    """Return where a program is, or skip the test."""
    path = os.pathsep.join([*places, os.environ.get("PATH", "")])
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"needs the program {program}")
    return found


def free_ports(count):
    """Return ports that nobody listens at, from 10,000 up to 20,000.

    Some servers add 10,000 to theirs, and from 32,768 on ports are those of connections.
    """
    ports, start = [], os.getpid() * 7
    for port in (10_000 + (start + i) % 10_000 for i in range(10_000)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


def wait_until(is_there, process, log):
    """Ask again and again; a server that ended says why."""
    end = time.monotonic() + PATIENCE_S
    while not is_there():
        assert process.poll() is None, f"it ended: {log.read_text()[-2_000:]}"
        assert time.monotonic() < end, f"it did not start: {log.read_text()[-2_000:]}"
        time.sleep(0.02)


@contextlib.contextmanager
def running(command, folder, **options):
    """Run a server until the end of the block; yields the process and its log."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
        )
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def postgres():
    """Run a PostgreSQL of its own; yields its address."""
    with killable_postgres() as cluster:
        yield cluster.url


@contextlib.contextmanager
def killable_postgres():
    """Run a PostgreSQL of its own; yields a ``Cluster``."""
    with tempfile.TemporaryDirectory(prefix="esper-postgres-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class Cluster:
    """A PostgreSQL that can be killed as by a power failure, and started again.

    It refuses to run as root. Nothing is synced: what a kill leaves, the machine still has.
    """

    def __init__(self, folder):
        places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
        initdb, self._server = find("initdb", *places), find("postgres", *places)
        self._folder, self._process = folder, None
        self._user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(folder, **self._user)
        command = [initdb, "-D", folder / "data", "-U", "esper", "--auth=trust", "-N"]
        subprocess.run(
            [*command, "--locale=C.UTF-8"], check=True, capture_output=True, cwd="/", **self._user
        )
        (self._port,) = free_ports(1)
        self.url = f"postgresql://esper@127.0.0.1:{self._port}/postgres"

    def start(self):
        """Start it, and wait until it takes connections."""
        command = [self._server, "-D", self._folder / "data", "-h", "127.0.0.1", "-F"]
        command += ["-p", str(self._port), "-c", f"unix_socket_directories={self._folder}"]
        log = self._folder / "log"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd="/",
                **self._user,
            )
        ready = b"ready to accept connections"
        wait_until(lambda: ready in log.read_bytes(), self._process, log)

    def kill_all(self):
        """Kill every process of it at once."""
        own = self._process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        for process in [own, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def await_end(self):
        """End it where it was not killed, and wait until it is gone."""
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def stop(self):
        """End it in order, where it is there."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(PATIENCE_S)


@contextlib.contextmanager
def seaweed(folder):
    """Run a SeaweedFS of its own; yields the address of its S3, keys ``esper`` and ``secret``."""
    weed = find("weed", str(Path(sys.executable).parent))
    folder.mkdir()
    (folder / "data").mkdir()
    keys = [{"accessKey": "esper", "secretKey": "secret"}]
    actions = ["Admin", "Read", "Write", "List"]
    identities = [{"name": "esper", "credentials": keys, "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3 = free_ports(4)
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-filer", "-s3"]
    command += [f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64"]
    address = f"http://127.0.0.1:{s3}"

    def answers():
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(address, trust_env=False).status_code == 403
        return False

    with running(command, folder) as (process, log):
        wait_until(answers, process, log)
        yield address


@contextlib.contextmanager
def docker_registry(folder, *, users=None):
    """Run a registry of images of its own, without or with a file of users; yields host:port."""
    program = find("docker-registry")
    folder.mkdir()
    (port,) = free_ports(1)
    settings = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if users is not None:
        settings["auth"] = {"htpasswd": {"realm": "kernels", "path": str(users)}}
    (folder / "config.yml").write_text(json.dumps(settings))

    def answers():
        with contextlib.suppress(httpx2.HTTPError):
            address = f"http://127.0.0.1:{port}/v2/"
            return httpx2.get(address, trust_env=False).status_code in (200, 401)
        return False

    command = [program, "serve", str(folder / "config.yml")]
    with running(command, folder) as (process, log):
        wait_until(answers, process, log)
        yield f"127.0.0.1:{port}"
