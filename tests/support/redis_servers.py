"""A Redis of one's own on loopback, which can be killed, stopped and started again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from pathlib import Path

from real_servers import find, free_ports, wait_until


class RedisServer:
    """A server at one port, with what it has in a folder."""

    def __init__(self, folder):
        self._program, self._folder = find("redis-server"), folder
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process = None

    def start(self):
        log = self._folder / "log"
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder, "save": '""'}
        options |= {"appendonly": "yes", "appendfsync": "always"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with log.open("ab") as out:
            self._process = subprocess.Popen([self._program, *words], stdout=out, stderr=out)
        wait_until(self._answers, self._process, log)

    def _answers(self):
        import redis

        with contextlib.suppress(redis.RedisError):
            return redis.Redis(port=self.port, socket_timeout=1.0).ping()
        return False

    def hang(self):
        """Let it take connections and answer none."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def redis_server():
    """Run a Redis until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="esper-redis-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()
