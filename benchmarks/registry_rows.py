"""``make bench-registry``: what a registry's server takes in a second, and from a thousand ranks.

Serves a registry from one process and from two, on SQLite with a directory and on PostgreSQL with
SeaweedFS, and asks from as many processes as there are servers; then lets ranks start at once, each
for itself and with one folder a node. Turns are interleaved and medians printed. Writes
``benchmarks/results/registry/<environment>.json``. Servers, clients and stores share this machine,
so that rates are lower bounds; what bounds them is read from the CPU time of the processes, and
from a server whose disk does not sync.
"""

import argparse
import contextlib
import functools
import http.client
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from subjects import blueprint

import esper
from esper.contracts.compile_options import CompileOptions
from esper.contracts.errors import KernelSourceUnavailable
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk import Disk
from esper.registry.disk_cache import DiskCache
from esper.registry.http_registry import HttpRegistry
from esper.registry.stored import StoredRegistry
from esper.services.registry_server import first_token, open_storage, serve
from esper.services.settings import Environment

CONTEXT = get_context("spawn")
DRAW = random.Random()  # noqa: S311 - names and waits, no secret
TOKEN = "b" * 64
THREADS, RANKS_A_NODE = 4, 8
WAITING, BACKLOG = 400, 3_000
WIDTHS = {"50 KB": 12, "1 MB": 256}
TICKS_A_S = os.sysconf("SC_CLK_TCK")


class Storage:
    """What a registry is kept in, as ``esper registry serve`` is told."""

    def __init__(
        self,
        data: str,
        database: str | None = None,
        blobs: str | None = None,
        *,
        endpoint: str | None = None,
        syncs: bool = True,
    ) -> None:
        self.where = {"data": Path(data), "database": database, "blobs": blobs}
        keys = {"endpoint": endpoint, "access_key": "esper", "secret_key": "secret"}
        self.bucket = {} if endpoint is None else keys
        self.syncs = syncs

    def open(self) -> StoredRegistry:
        """Open it; where it does not sync, nothing is waited for on the disk."""
        if not self.syncs:
            execute = Disk.execute
            os.fsync = lambda _: None
            Disk.execute = lambda disk, to, text, values: execute(
                disk, to, text.replace("synchronous = FULL", "synchronous = OFF"), values
            )
        return open_storage(**self.where, environment=Environment(bucket=self.bucket))


def run_server(calls: Any, storage: Storage) -> None:
    """Serve it."""
    registry = storage.open()
    first_token(registry, TOKEN)
    serve(registry, host="127.0.0.1", port=0, on_listening=calls.send)


def run_preparer(calls: Any, storage: Storage) -> None:
    """Publish what is fetched, and keep so many jobs waiting as are asked for."""
    registry = storage.open()
    number = 0
    for what in iter(calls.recv, None):
        if isinstance(what, bytes):
            calls.send(registry.put(what))
            continue
        with registry.book.transaction():
            lacking = what - registry.book.jobs.totals()["UNVALIDATED"]
            for _ in range(lacking):
                number += 1
                each = blueprint(hidden=12, init_seed=number)
                registry.book.jobs.submit(each, CompileOptions(), now_s=time.time())
        calls.send(max(0, lacking))


def cpu_s(process: int) -> float:
    """Return the CPU time of a process and of those that it started, in seconds."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return (int(stat[11]) + int(stat[12])) / TICKS_A_S + sum(cpu_s(int(each)) for each in below)


class Connection:
    """One kept connection to a server."""

    def __init__(self, port: int, templates: dict[str, bytes], digests: dict[str, str]) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._templates, self._digests = templates, digests
        self._name = DRAW.randbytes(8).hex()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask, and return the answer's bytes, or None where there are none."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            is_document = not isinstance(body, bytes)
            kind = "application/json" if is_document else "application/octet-stream"
            headers["Content-Type"] = kind
        self._http.request(method, path, data, headers)
        answer = self._http.getresponse()
        found = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {found[:300]!r}")
        return found or None

    def metadata(self) -> bool:
        """Look a kernel up."""
        return self.ask("GET", f"/api/v1/kernels/{self._digests['50 KB']}") is not None

    def fetch(self, size: str) -> bool:
        """Fetch a kernel's bytes."""
        found = self.ask("GET", f"/api/v1/kernels/{self._digests[size]}/binary")
        return len(found) == len(self._templates[size])

    def publish(self, size: str) -> bool:
        """Publish a kernel that there is not yet: another's, with other last weights."""
        return self.ask("POST", "/api/v1/kernels", self._templates[size][:-8] + DRAW.randbytes(8))

    def claim(self) -> bool:
        """Claim a job and finish it; False where there is none."""
        asked = {"worker": self._name, "toolchain": "bench", "lease_s": 30.0}
        found = self.ask("POST", "/api/v1/jobs/claim?wait=0", asked)
        if found is None:
            return False
        job = json.loads(found)
        said = {"toolchain": "bench", "reason": "only measured", "findings": {}}
        mine = {"worker": self._name, "attempt": job["attempts"], "artifact_id": None}
        self.ask("POST", f"/api/v1/jobs/{job['id']}/finish", mine | said)
        return True


ASKED: dict[str, Callable[[Connection], Any]] = {
    "metadata GETs": Connection.metadata,
    "fetches of 50 KB": functools.partial(Connection.fetch, size="50 KB"),
    "fetches of 1 MB": functools.partial(Connection.fetch, size="1 MB"),
    "publishes of 50 KB": functools.partial(Connection.publish, size="50 KB"),
    "publishes of 1 MB": functools.partial(Connection.publish, size="1 MB"),
    f"jobs, {WAITING} waiting": Connection.claim,
    f"jobs, {BACKLOG:,} waiting": Connection.claim,
}


def run_client(calls: Any, templates: dict[str, bytes]) -> None:
    """Ask over a few connections for as long as it is told, again and again."""
    for what, port, digests, seconds in iter(calls.recv, None):
        connections = [Connection(port, templates, digests) for _ in range(THREADS)]
        calls.send(asked(ASKED[what], connections, seconds))


def asked(
    ask: Callable[[Connection], Any], connections: list[Connection], seconds: float
) -> tuple[int, float]:
    """Return how often was asked, and in how many seconds."""
    counts, start_s = [0] * len(connections), time.perf_counter()

    def go_on(number: int, connection: Connection) -> None:
        while time.perf_counter() < start_s + seconds and ask(connection):
            counts[number] += 1

    in_threads(functools.partial(go_on, *each) for each in enumerate(connections))()
    return sum(counts), time.perf_counter() - start_s


def in_threads(calls: Iterator[Callable[[], None]]) -> Callable[[], None]:
    """Start threads, one for each call; returns what waits for them."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return lambda: [thread.join() for thread in threads] and None


def run_ranks(calls: Any, nodes: int) -> None:
    """Be one rank of each node: fetch one kernel, at once, until it is there."""
    for folder, port, digest in iter(calls.recv, None):
        ranks = [
            Rank(None if folder is None else f"{folder}/{each}", port) for each in range(nodes)
        ]
        begin = threading.Event()
        wait = in_threads(functools.partial(rank.fetch, digest, begin) for rank in ranks)
        calls.send(None)
        calls.recv()
        begin.set()
        wait()
        calls.send([(rank.took_s, rank.num_asks) for rank in ranks])


class Rank:
    """One of those who start at once."""

    def __init__(self, folder: str | None, port: int) -> None:
        far = HttpRegistry(f"http://127.0.0.1:{port}", token=TOKEN)
        self._registry = far if folder is None else CachedRegistry(far, DiskCache(folder))
        self.took_s, self.num_asks = 0.0, 0

    def fetch(self, digest: str, begin: threading.Event) -> None:
        """Ask until the kernel is there; the registry itself keeps to ``Retry-After``."""
        begin.wait()
        start_s = time.perf_counter()
        while not self.took_s:
            self.num_asks += 1
            try:
                self._registry.fetch(digest)
                self.took_s = time.perf_counter() - start_s
            except KernelSourceUnavailable:
                time.sleep(DRAW.uniform(0.5, 1.5))
        self._registry.close()


@contextlib.contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, int]]:
    """Run a process that is told what to do; yields the pipe to it, and its id."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(theirs, *args))
    process.start()
    try:
        yield ours, process.pid
    finally:
        process.kill()
        process.join()


class Registry:
    """A registry that is being served, by two processes."""

    def __init__(self, storage: Storage, stack: contextlib.ExitStack, stores: list[int]) -> None:
        self._preparer, _ = stack.enter_context(running(run_preparer, storage))
        self._stores = stores
        self.digests = {size: self._told(data) for size, data in TEMPLATES.items()}
        servers = [stack.enter_context(running(run_server, storage)) for _ in range(2)]
        self.ports, self.processes = [pipe.recv() for pipe, _ in servers], [p for _, p in servers]

    def prepare(self, what: str) -> None:
        """Have jobs waiting where they are what is asked for."""
        if what.startswith("jobs"):
            self._told(BACKLOG if f"{BACKLOG:,}" in what else WAITING)

    def turn(self, what: str, clients: list[Any], seconds: float) -> dict[str, float]:
        """Ask as many servers as there are clients, and return what came of it."""
        self.prepare(what)
        before = self._cpu_s()
        for client, port in zip(clients, self.ports, strict=False):
            client.send((what, port, self.digests, seconds))
        found = [client.recv() for client in clients]
        count, wall_s = sum(each for each, _ in found), max(each for _, each in found)
        servers_s, stores_s = (now - then for now, then in zip(self._cpu_s(), before, strict=True))
        return {
            "a second": count / wall_s,
            "cores of servers": servers_s / wall_s,
            "cores of stores": stores_s / wall_s,
            "server's CPU, ms": 1e3 * servers_s / max(1, count),
        }

    def _told(self, what: Any) -> Any:
        self._preparer.send(what)
        return self._preparer.recv()

    def _cpu_s(self) -> tuple[float, float]:
        return sum(map(cpu_s, self.processes)), sum(map(cpu_s, self._stores))


TEMPLATES: dict[str, bytes] = {}


def median_of(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def rates(
    registries: dict[str, Registry], clients: list[Any], rounds: int, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Return figures by what is asked and who is asked, interleaved; a first round is not kept."""
    turns = [
        (f"{name}, {number}", registry, clients[:number])
        for name, registry in registries.items()
        for number in ((1,) if "unsynced" in name else (1, 2))
    ]
    found: dict[str, dict[str, dict[str, float]]] = {}
    named = ("a second", "server cores", "store cores", "ms of server")
    print(f"\n{'':22}{'kept in, servers':28}" + "".join(f"{each:>13}" for each in named))
    for what in ASKED:
        kept: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in turns}
        for _ in range(rounds + 1):
            for name, registry, asking in turns:
                kept[name].append(registry.turn(what, asking, seconds))
        found[what] = {name: median_of(each[1:]) for name, each in kept.items()}
        for name, figures in found[what].items():
            shown = "".join(f"{figures[each]:>13.3g}" for each in figures)
            print(f"{what:22}{name:28}{shown}", flush=True)
    return found


def at_once(
    registry: Registry, groups: list[Any], size: str, folder: str | None
) -> dict[str, float]:
    """Return what ranks that start at once do to one server, and it to them."""
    before, before_cpu_s = answers_of(registry), cpu_s(registry.processes[0])
    for group in groups:
        group.send((folder, registry.ports[0], registry.digests[size]))
    for group in groups:
        group.recv()
    for group in groups:
        group.send(None)
    ranks = [rank for group in groups for rank in group.recv()]
    served, refused = (now - then for now, then in zip(answers_of(registry), before, strict=True))
    took = sorted(took_s for took_s, _ in ranks)
    return {
        "ranks": len(ranks),
        "half have it after, s": statistics.median(took),
        "all have it after, s": took[-1],
        "fetches served": served,
        "answers of 429": refused,
        "calls that a rank makes at most": max(num_asks for _, num_asks in ranks),
        "server's CPU, s": cpu_s(registry.processes[0]) - before_cpu_s,
    }


def answers_of(registry: Registry) -> tuple[int, int]:
    """Return how many kernels the first server has sent, and how many requests it refused."""
    asking = Connection(registry.ports[0], TEMPLATES, registry.digests)
    served = refused = 0
    for line in asking.ask("GET", "/metrics").decode().splitlines():
        if line.startswith("esper_requests_total{"):
            number = int(float(line.rpartition(" ")[2]))
            refused += number * ('status="429"' in line)
            served += number * ("/binary" in line and 'status="20' in line)
    return served, refused


def starts(registry: Registry, ranks: int, rounds: int, folder: str) -> dict[str, dict[str, float]]:
    """Return figures of ranks that start at once, without a cache and with one a node."""
    found: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        each = (run_ranks, ranks // RANKS_A_NODE)
        groups = [stack.enter_context(running(*each))[0] for _ in range(RANKS_A_NODE)]
        for number in range(rounds):
            for size in WIDTHS:
                for how, where in (("each", None), ("by node", f"{folder}/{number}-{size}")):
                    figures = at_once(registry, groups, size, where)
                    found.setdefault(f"{size}, {how}", []).append(figures)
    medians = {name: median_of(each) for name, each in found.items()}
    for name, figures in medians.items():
        print(f"\n{ranks:,} ranks, {name}")
        print("\n".join(f"    {what:36}{value:>10.3g}" for what, value in figures.items()))
    return medians


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=1_000)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--no-file", action="store_true", help="only print")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    import real_servers

    for size, width in WIDTHS.items():
        TEMPLATES[size] = esper.compile_blueprint(blueprint(hidden=width)).kernel_binary
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        database = stack.enter_context(real_servers.killable_postgres())
        endpoint = stack.enter_context(real_servers.seaweed(Path(folder, "bucket")))
        team = Storage(folder, database.url, "s3://kernels/bench", endpoint=endpoint)
        stores = children_of_this()
        clients = [stack.enter_context(running(run_client, TEMPLATES))[0] for _ in range(2)]
        registries = {
            "SQLite": Registry(Storage(f"{folder}/synced"), stack, []),
            "SQLite unsynced": Registry(Storage(f"{folder}/unsynced", syncs=False), stack, []),
            "PostgreSQL, S3": Registry(team, stack, stores),
        }
        one = registries["SQLite"]
        begun = starts(one, options.ranks, options.starts, f"{folder}/nodes")
        found = {
            "starts": begun,
            "rates": rates(registries, clients, options.rounds, options.seconds),
        }
    machine = f"{platform.system()}-{platform.machine()}-{os.cpu_count()}"
    where = f"{machine}-python-{platform.python_version()}"
    if not options.no_file:
        path = Path(__file__).parent / "results" / "registry" / f"{where.lower()}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def children_of_this() -> list[int]:
    """Return the processes that this one has started."""
    own = os.getpid()
    return [int(each) for each in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


if __name__ == "__main__":
    main()
