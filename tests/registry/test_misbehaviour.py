"""Every misbehaviour of a server, met in every way in which a kernel is fetched."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from misbehaving_servers import BAD, CHUNKED, DIGEST, ENDLESS, dripping, serving

from esper.contracts.errors import (
    KernelLoadError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.registry import AsyncRegistry
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk_cache import DiskCache
from esper.registry.http import HttpKernelSource
from esper.registry.http_registry import HttpRegistry
from esper.registry.oci_registry import OciRegistry

pytestmark = pytest.mark.network

LIMIT_BYTES = 10_000
PATIENCE_S = 0.2
SLACK_S = 0.1
ROOM_BYTES = 64 * 2**20


def alone(server, folder, **settings):
    """A source by itself, which repeats nothing."""
    return HttpKernelSource(server.url, **settings).fetch


def in_a_registry(server, folder, **settings):
    """A registry, which repeats what may pass."""
    return HttpRegistry(server.url, sleep=lambda _: None, **settings).fetch


def in_threads(server, folder, **settings):
    """Three threads that share a registry; what one of them met who was let through."""
    fetch = in_a_registry(server, folder, **settings)

    def together(digest):
        with ThreadPoolExecutor(3) as threads:
            met = [threads.submit(fetch, digest) for _ in range(3)]
        return next(m for m in met if type(m.exception()) is not KernelSourceSuspended).result()

    return together


def awaited(server, folder, **settings):
    """An event loop."""
    registry = AsyncRegistry(HttpRegistry(server.url, sleep=lambda _: None, **settings))
    return lambda digest: asyncio.run(registry.fetch(digest))


def through_a_cache(server, folder, **settings):
    """A cache on disk, which holds nothing yet."""
    far = HttpRegistry(server.url, sleep=lambda _: None, **settings)
    return CachedRegistry(far, DiskCache(folder)).fetch


def from_a_registry_of_images(server, folder, max_size_bytes, **settings):
    """A registry of images."""
    address = f"oci://127.0.0.1:{server.server_port}/team/kernels"
    return OciRegistry(
        address, sleep=lambda _: None, max_artifact_bytes=max_size_bytes, **settings
    ).fetch


WAYS = [
    alone,
    in_a_registry,
    in_threads,
    awaited,
    through_a_cache,
    from_a_registry_of_images,
]


def met_by(fetch):
    """Return what a fetch raised, and the seconds that it took."""
    start = time.perf_counter()
    with pytest.raises(KernelLoadError) as raised:
        fetch(DIGEST)
    return raised.value, time.perf_counter() - start


def met_in_every_way(behave, folder, **settings):
    """Return what each way met, all at the same time."""
    with serving(behave) as server, ThreadPoolExecutor(len(WAYS)) as threads:
        fetches = [
            way(server, folder / way.__name__, max_size_bytes=LIMIT_BYTES, **settings)
            for way in WAYS
        ]
        return dict(zip(WAYS, threads.map(met_by, fetches), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ENDLESS)
def test_a_fetch_ends_at_its_deadline(behaviour, tmp_path):
    """However a server drags on, a fetch is over within 100 ms of its time, retries included."""
    late = set(WAYS)
    for _ in range(5):  # a busy machine may take the time that a fetch did not
        met = met_in_every_way(ENDLESS[behaviour], tmp_path, timeout_s=PATIENCE_S)
        assert all(type(error) is KernelSourceUnavailable for error, _ in met.values())
        assert all(took_s > PATIENCE_S * 0.9 for _, took_s in met.values())
        late -= {way for way, (_, took_s) in met.items() if took_s < PATIENCE_S + SLACK_S}
        if not late:
            break
    assert late == set()


@pytest.mark.parametrize("behaviour", BAD)
def test_every_misbehaviour_has_its_error(behaviour, tmp_path):
    """What a server did decides the error, long before the deadline, whoever asks."""
    behave, expected = BAD[behaviour]

    met = met_in_every_way(behave, tmp_path, timeout_s=60)

    assert {type(error) for error, _ in met.values()} == {expected or KernelSourceUnavailable}
    for kept in tmp_path.rglob("artifacts/*"):
        raise AssertionError(f"{kept} was kept")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_endless_answer_takes_no_more_memory_than_was_allowed(way, tmp_path):
    """Sixteen MiB are allowed, and an answer without end takes less than sixty-four."""
    behave = dripping(CHUNKED, b"100000\r\n" + bytes(2**20) + b"\r\n")
    with serving(behave) as server:
        fetch = way(server, tmp_path, timeout_s=60, max_size_bytes=2**24)
        tracemalloc.start()
        error, _ = met_by(fetch)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert type(error) is KernelSourceRefused
    assert peak_bytes < ROOM_BYTES


@pytest.mark.torture
@pytest.mark.parametrize("turn", range(10))
def test_every_misbehaviour_again_and_again(turn, tmp_path):
    """Ten times every behaviour: the same errors, and none later than its deadline allows."""
    for behaviour in ENDLESS:
        test_a_fetch_ends_at_its_deadline(behaviour, tmp_path / "endless")
    for behaviour in BAD:
        test_every_misbehaviour_has_its_error(behaviour, tmp_path / "bad")
