"""A registry that is awaited: the same answers, no loop of its own, and a cancellation is one."""

import asyncio
import inspect
import threading
import time

import pytest
from far_registries import FarRegistry
from kernel_artifacts import artifact
from misbehaving_servers import DATA, DIGEST, serving

from esper.contracts.errors import KernelNotFoundError
from esper.contracts.ports import Registry
from esper.registry import AsyncRegistry
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry


def test_it_has_every_operation_of_a_registry_alike():
    """Names and parameters are the port's, close apart, which does not wait."""
    for name, operation in vars(Registry).items():
        if inspect.isfunction(operation) and not name.startswith("_") and name != "close":
            awaited = getattr(AsyncRegistry, name)
            assert inspect.iscoroutinefunction(awaited), name
            assert inspect.signature(awaited) == inspect.signature(operation), name


def test_what_is_awaited_is_what_the_registry_answers():
    """Publishing, naming, searching and fetching, with the errors that the registry raises."""

    async def work(registry):
        digest = await registry.put(artifact(1), record={"toolchain": "x"})
        await registry.tag("mlp", "prod", digest, expected=None)
        assert await registry.fetch(await registry.resolve("mlp:prod")) == artifact(1)
        assert [entry.digest for entry in await registry.search(mode="add")] == [digest]
        with pytest.raises(KernelNotFoundError):
            await registry.get("0" * 64)

    asyncio.run(work(AsyncRegistry(MemoryRegistry())))


def test_loops_share_one():
    """Nothing is bound to the loop of whoever asked first."""
    registry = AsyncRegistry(FarRegistry(MemoryRegistry()))
    digest = asyncio.run(registry.put(artifact(1)))

    assert asyncio.run(registry.get(digest)) == artifact(1)


@pytest.mark.network
def test_who_is_cancelled_goes_on_at_once_and_others_are_unharmed():
    """One who gives up waits for no server; what it asked for ends by itself."""
    both_asked, go_on = threading.Barrier(3), threading.Event()

    def late(handler):
        both_asked.wait(30)
        go_on.wait(30)
        handler.answer()

    async def work(registry):
        impatient = asyncio.create_task(registry.fetch(DIGEST))
        patient = asyncio.create_task(registry.fetch(DIGEST))
        await asyncio.to_thread(both_asked.wait, 30)
        start = time.perf_counter()
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert time.perf_counter() - start < 1.0
        assert not go_on.is_set()
        go_on.set()
        assert await patient == DATA

    with serving(late) as server:
        registry = HttpRegistry(server.url, timeout_s=60)
        asyncio.run(work(AsyncRegistry(registry)))
        assert registry.endpoint.breaker.stats().failed == 0
        registry.close()
