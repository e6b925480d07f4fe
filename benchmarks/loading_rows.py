"""Rows 6 to 9 and 12: what happens to a kernel between its blueprint and its seed."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cachetools import LRUCache
from measure import MS, Figure, Prepare, one_by_one, take_turns, turns_one_by_one
from peers import Lora
from subjects import BATCH, FEATURES, blueprint, sharing
from torch import nn

import esper
from esper.contracts.artifact import CompiledKernelArtifact
from esper.contracts.ports import KernelSource, Registry
from esper.execution.host_class import adopt
from esper.execution.kasmina_layer import KasminaLayer
from esper.fetching.kernel_cache import KernelCache
from esper.registry.http import HttpKernelSource
from esper.registry.open import open_registry

_HIDDEN_OF_1_MB = 256


class Sites:
    """Layers over one host, each a site that no kernel was probed at yet."""

    def __init__(self) -> None:
        self._host = nn.Linear(FEATURES, FEATURES)
        self._example = torch.randn(BATCH, FEATURES)
        self._num_made = 0

    def site(self) -> KasminaLayer:
        """Return a layer of a name of its own; what was probed is remembered by name."""
        self._num_made += 1
        return adopt(sharing(self._host), name=f"site{self._num_made}")

    def load(self, layer: KasminaLayer, artifact_id: str) -> Callable[[], object]:
        """Return what loads a kernel into seed 0 of a layer until it is live."""
        return lambda: layer.load_kernel_sync(0, artifact_id, example=self._example)


def _with_cache(layer: KasminaLayer, source: KernelSource, cache: KernelCache) -> KasminaLayer:
    record = layer._kasmina  # noqa: SLF001 - a cache of its own is what each round needs
    record.source, record.cache = source, cache
    return layer


def live(rounds: int) -> Iterator[Figure]:
    """Rows 6 to 8: a kernel until it is live, from the cache, a directory and over HTTP."""
    lora = Lora(nn.Linear(FEATURES, FEATURES))
    with TemporaryDirectory() as folder, TemporaryDirectory() as adapters:
        registry = open_registry(folder)
        artifact = _put(registry, esper.compile_blueprint(blueprint()))
        yield from _from_cache(registry, artifact, lora, adapters, rounds)
        yield from _from_directory(registry, artifact, lora.live_load(adapters), rounds)
        large = _put(registry, esper.compile_blueprint(blueprint(hidden=_HIDDEN_OF_1_MB)))
        with _served(large) as address:
            first = _first_time(HttpKernelSource(address), large)
            yield one_by_one(first, rounds=2 * rounds).took("live http", MS)


def _put(registry: Registry, artifact: CompiledKernelArtifact) -> CompiledKernelArtifact:
    registry.put(artifact.kernel_binary, digest=artifact.artifact_id)
    return artifact


def _from_cache(
    source: KernelSource, artifact: CompiledKernelArtifact, lora: Lora, folder: str, rounds: int
) -> Iterator[Figure]:
    cache, sites = KernelCache(source=source), Sites()
    cache.prewarm([artifact.artifact_id])
    swaps = {"memory": lora.hotswap(), "folder": lora.hotswap_from(folder)}
    swap = take_turns(swaps, rounds=rounds, number=5)
    memory_ms, folder_ms = (swap[name].median_s * MS for name in swaps)
    beside = f"PEFT hotswap {folder_ms:.2f} ms, {memory_ms:.2f} in memory"

    def first() -> Callable[[], object]:
        layer = _with_cache(sites.site(), source, cache)
        return sites.load(layer, artifact.artifact_id)

    again = _with_cache(sites.site(), source, cache)
    sites.load(again, artifact.artifact_id)()

    def anew() -> Callable[[], object]:
        again.unload_kernel(0)
        return sites.load(again, artifact.artifact_id)

    yield one_by_one(first, rounds=4 * rounds).took("live first", MS, beside=beside)
    yield one_by_one(anew, rounds=4 * rounds).took("live again", MS, beside=beside)


def _from_directory(
    source: KernelSource, artifact: CompiledKernelArtifact, peft: Prepare, rounds: int
) -> Iterator[Figure]:
    """Row 7, beside PEFT, which verifies nothing and probes nothing; each reads its file anew."""
    sites = Sites()
    probed = sites.site()

    def again() -> Callable[[], object]:
        if probed.seed_kernel(0) is not None:
            probed.unload_kernel(0)
        _with_cache(probed, source, KernelCache(source=source))
        return sites.load(probed, artifact.artifact_id)

    prepares = {"first": _first_time(source, artifact), "again": again, "peft": peft}
    for prepare in prepares.values():
        prepare()()
    took = turns_one_by_one(prepares, rounds=2 * rounds)
    beside = f"PEFT load_adapter {took['peft'].median_s * MS:.2f} ms"
    yield took["first"].took("live directory", MS, beside=beside)
    yield took["first"].ratio(took["peft"], "live directory over PEFT")
    yield took["again"].ratio(took["peft"], "live directory again over PEFT")


def _first_time(source: KernelSource, artifact: CompiledKernelArtifact) -> Prepare:
    """Return what loads a kernel at a site that has never seen it, by a cache that is empty."""
    sites = Sites()

    def prepare() -> Callable[[], object]:
        layer = _with_cache(sites.site(), source, KernelCache(source=source))
        return sites.load(layer, artifact.artifact_id)

    prepare()()  # connections are kept, code is loaded
    return prepare


@contextmanager
def _served(artifact: CompiledKernelArtifact) -> Iterator[str]:
    """Serve one artifact on loopback, from a thread; yield the server's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(artifact.kernel_binary)))
            self.end_headers()
            self.wfile.write(artifact.kernel_binary)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def cache_hit(rounds: int) -> Figure:
    """Row 9: a hit of the cache, which locks, over one of cachetools, which does not."""
    with TemporaryDirectory() as folder:
        registry = open_registry(folder)
        artifact = _put(registry, esper.compile_blueprint(blueprint(8, 2)))
        cache = KernelCache(source=registry)
        cache.prewarm([artifact.artifact_id])
    return _hit(cache, artifact, rounds)


def _hit(cache: KernelCache, artifact: CompiledKernelArtifact, rounds: int) -> Figure:
    wanted, lock = artifact.artifact_id, threading.Lock()
    plain: LRUCache[str, object] = LRUCache(maxsize=128)
    plain[wanted] = artifact

    def locked() -> object:
        with lock:
            return plain[wanted]

    calls = {
        "cache": lambda: cache.load_kernel_sync(wanted),
        "plain": lambda: plain[wanted],
        "locked": locked,
    }
    took = take_turns(calls, rounds=2 * rounds, number=2000)
    safe = took["cache"].median_s / took["locked"].median_s
    return took["cache"].ratio(took["plain"], "cache hit", beside=f"{safe:.2f}x of it in a lock")


def stored(rounds: int) -> Figure:
    """Row 12: kernels of one graph and ever other weights, as a Grower compiles and stores them."""
    seeds = iter(range(10**6))
    with TemporaryDirectory() as folder, TemporaryDirectory() as other:
        registry = open_registry(folder)

        def store() -> None:
            artifact = esper.compile_blueprint(replace(blueprint(), init_seed=next(seeds)))
            registry.put(artifact.kernel_binary, digest=artifact.artifact_id)

        data = esper.compile_blueprint(blueprint()).kernel_binary
        store()
        calls = {"store": store, "write": lambda: _write(Path(other) / str(next(seeds)), data)}
        took = take_turns(calls, rounds=2 * rounds, number=3)
    beside = f"write, fsync, rename, fsync: {took['write'].median_s * MS:.2f} ms"
    return took["store"].took("stored", MS, beside=beside)


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it survives a power failure; the least that a store has to do."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
