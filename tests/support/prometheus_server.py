"""A Prometheus on loopback that asks pages several times a second, and is asked for series."""

from __future__ import annotations

import contextlib
import json
import time

import httpx2
from real_servers import PATIENCE_S, find, free_ports, running, wait_until


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, address):
        self.address = address

    def series(self, expression):
        """Return the series that an expression has now, by their labels."""
        found = self._get("query", query=expression)
        return found["result"]

    def wait_for(self, expression):
        """Ask until an expression has a series."""
        end = time.monotonic() + PATIENCE_S
        while not self.series(expression):
            assert time.monotonic() < end, f"no series: {expression}"
            time.sleep(0.05)

    def _get(self, path, **params):
        answer = httpx2.get(f"{self.address}/api/v1/{path}", params=params, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]


@contextlib.contextmanager
def prometheus(folder, targets):
    """Run a Prometheus that asks targets, as ``host:port``, with a token where one is given."""
    program = find("prometheus")
    folder.mkdir()
    (port,) = free_ports(1)
    jobs = [
        {
            "job_name": f"job{number}",
            "static_configs": [{"targets": [target]}],
            **({"authorization": {"credentials": token}} if token else {}),
        }
        for number, (target, token) in enumerate(targets)
    ]
    asked = {"global": {"scrape_interval": "300ms", "scrape_timeout": "300ms"}}
    (folder / "prometheus.yml").write_text(json.dumps({**asked, "scrape_configs": jobs}))
    address = f"http://127.0.0.1:{port}"
    command = [program, f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]

    def is_ready():
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"{address}/-/ready", trust_env=False).status_code == 200
        return False

    with running(command, folder) as (process, log):
        wait_until(is_ready, process, log)
        yield Prometheus(address)
